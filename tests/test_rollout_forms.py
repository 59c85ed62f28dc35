"""Rollouts under other prompt forms: no drawing, whole answers, turns that the template begins."""

import dataclasses
import json

import numpy as np
import pytest

from spatial_jax.data.chat_template import ChatTemplate
from spatial_jax.data.prompt_form import PromptForm
from spatial_jax.drawing.termination import StopLimits
from spatial_jax.errors import DataError
from spatial_jax.grammar import VILASR, Grammar
from spatial_jax.reward.format import final_answer, format_reward
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.types import ImageRef, VideoRef
from tests import rollout_fixtures as fixtures
from tests.policy_fixtures import pixels
from tests.rollout_fixtures import ANSWER_TURN, BOX_TURN, PADS, SAMPLED, TOKENIZER, turn_ids
from tests.test_chat_template import QWEN2_VL, QWEN3_THINKING

THINK, VANILLA = Grammar("think", False, "answer", False), Grammar("", False, "", False)
LONG = StopLimits(
  max_turns=3, max_images=8, max_image_tokens=256, max_response_tokens=400, near_duplicate_px=0.0
)
CFG = dataclasses.replace(fixtures.ROLLOUT, stop=LONG, max_tokens_per_turn=128)
THOUGHT = "<think> 2.1 m. </think>\n<answer> 2.1 </answer>"


def sample(turns, grammar, template=None, cfg=CFG):
  """The one rollout that writes these turns."""
  engine = fixtures.scripted_engine([turns], cfg)
  form = PromptForm(fixtures.WORDS, grammar)
  conversation = dataclasses.replace(engine.conversation, form=form)
  if template is not None:
    template = ChatTemplate(template, "")
    conversation = dataclasses.replace(conversation, template=template)
  engine = dataclasses.replace(engine, conversation=conversation)
  prompt = conversation.prompt(fixtures.task("room/one"))
  ((trajectory,),) = generate_rollouts(engine, {}, RolloutJob([prompt], 0, 0, [SAMPLED]))
  trajectory_lib.check(trajectory, PADS)
  return trajectory


@pytest.mark.parametrize(
  ("grammar", "text", "reason", "answer", "right"),
  [
    (THINK, THOUGHT, "answer", "2.1", 1.0),
    (THINK, ANSWER_TURN, "answer", "2.1", 0.0),
    (THINK, BOX_TURN, "no_action", None, 0.0),
    (THINK, "2.1", "no_action", None, 0.0),
    (VANILLA, "2.1", "answer", "2.1", 1.0),
    (VANILLA, THOUGHT, "answer", THOUGHT, 0.0),
    (VANILLA, BOX_TURN, "answer", BOX_TURN, 0.0),
    (VANILLA, "", "no_action", None, 0.0),
  ],
)
def test_a_rollout_that_may_not_draw_has_one_turn(grammar, text, reason, answer, right):
  trajectory = sample([text, "never sampled"], grammar)
  (turn,) = trajectory.turns
  assert (turn.text, turn.operations, turn.errors) == (text, (), ())
  assert trajectory.end_reason == reason
  assert trajectory.grammar == grammar
  assert final_answer(trajectory) == answer
  assert format_reward(trajectory) == right
  assert len(trajectory.images) == trajectory.prompt_images


def test_nothing_is_drawn_for_a_form_that_may_not_draw(monkeypatch):
  def submit(*_):
    raise AssertionError("a drawing was submitted")

  monkeypatch.setattr("spatial_jax.drawing.executor.Executor.submit", submit)
  sample([BOX_TURN], THINK)
  with pytest.raises(AssertionError, match="was submitted"):
    sample([BOX_TURN, ANSWER_TURN], VILASR)


def test_an_answer_without_an_end_is_no_answer():
  """ "12" may be the beginning of "120"; an answer block has its own end."""
  short = dataclasses.replace(CFG, max_tokens_per_turn=2)
  cut = sample(["120 m"], VANILLA, cfg=short)
  assert len(cut.turns[0].text) < 5
  assert (cut.end_reason, final_answer(cut)) == ("token_limit", None)
  count = len(TOKENIZER.encode(THOUGHT))  # the limit cuts off <|im_end|> alone
  closed = sample([THOUGHT], THINK, cfg=dataclasses.replace(CFG, max_tokens_per_turn=count))
  assert (closed.end_reason, final_answer(closed)) == ("answer", "2.1")


def test_turns_begin_with_what_the_template_writes():
  """Also after an observation; these tokens are not trained."""
  begun = "<think>\n"
  box, answer = (turn.replace("<think>", "") for turn in (BOX_TURN, ANSWER_TURN))
  trajectory = sample([box, answer], VILASR, QWEN3_THINKING)
  assert [turn.text for turn in trajectory.turns] == [begun + box, begun + answer]
  assert format_reward(trajectory) == 1.0
  assert fixtures.sampled_ids(trajectory) == turn_ids(box) + turn_ids(answer)
  assert trajectory.turns[0].produced
  for turn in trajectory.turns:
    before = trajectory.token_ids_T[: turn.start].tolist()
    text = TOKENIZER.inner.decode(before, skip_special_tokens=False)
    assert text.endswith(f"<|im_start|>assistant\n{begun}")


def test_the_template_adds_its_system_message_to_the_prompt():
  trajectory = sample([ANSWER_TURN], VILASR, QWEN2_VL)
  text = TOKENIZER.decode(trajectory.token_ids_T[: trajectory.prompt_length].tolist())
  assert text.startswith("system\nYou are a helpful assistant.\nuser\n")


@pytest.mark.parametrize(("grammar", "draws"), [(VILASR, True), (THINK, False)])
def test_the_frames_of_a_video_are_images_for_a_form_that_draws(grammar, draws):
  frames = tuple(ImageRef(pixels(i, 28, 28)) for i in range(4))
  task = dataclasses.replace(fixtures.task("room/x"), media=(VideoRef(frames),))
  conversation = dataclasses.replace(
    fixtures.conversation(), form=PromptForm(fixtures.WORDS, grammar)
  )
  assert not conversation.video.as_images
  prompt = conversation.prompt(task)
  pads = np.isin(prompt.token_ids_T, [conversation.policy.video_pad_id])
  assert pads.any() == (not draws)
  assert len(prompt.images) == (4 if draws else 1)
  assert prompt.grammar == grammar


def test_rollouts_of_earlier_versions_have_the_grammar_of_vilasr(tmp_path):
  path = tmp_path / "0.json"
  trajectory_lib.save(sample([ANSWER_TURN], VILASR), path)
  record = json.loads(path.read_text())
  path.write_text(json.dumps({key: record[key] for key in record if key != "grammar"}))
  old = trajectory_lib.load(path)
  assert old.grammar == VILASR
  assert (final_answer(old), format_reward(old)) == ("2.1", 1.0)
  path.write_text(json.dumps(record | {"grammar": {"reasoning": "think"}}))
  with pytest.raises(DataError, match=r"0\.json cannot be read"):
    trajectory_lib.load(path)
