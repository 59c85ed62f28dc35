"""Format, answer extraction, and the gated composition, from trajectories to Scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax import config
from spatial_jax.reward.compose import Answer, RewardConfig, score, score_answer
from spatial_jax.reward.format import final_answer, format_reward
from spatial_jax.reward.snra import Schedule
from spatial_jax.types import OperationError, Task, Trajectory, Turn

SCHEDULE = Schedule(kind="sigmoid", k_min=1.0, k_max=100.0, midpoint=0.5, steepness=10.0)
CFG = RewardConfig(
  number="sigmoid",
  choice="smooth",
  schedule=SCHEDULE,
  discrete_sharpness=None,
  strict_mra=False,
  score_threshold=0.0,
  format_weight=0.5,
  gate="format",
)
DISTANCE = Task(
  task_id="distance",
  question_type="object_abs_distance",
  question="What is the distance between the bed and the lamp (in meters)?",
  options=None,
  answer="2.0",
  answer_kind="number",
  images=(),
  source="procedural",
  scene_id="room-0",
  benchmark=None,
  boxes=(),
)
NEAREST = dataclasses.replace(
  DISTANCE,
  task_id="nearest",
  question_type="object_rel_distance",
  question="Which object is the closest to the bed?",
  options=("A. lamp", "B. chair", "C. sofa", "D. ball"),
  answer="B",
  answer_kind="choice",
)
DRAWS = '<think> Mark it. </think> Action: Object Mapper\n```json\n[{"index": 1}]\n```'


def says(text):
  return f"<think> So. </think> Action: Answer\n<answer> {text} </answer>"


def turn(text, executable=True, errors=()):
  return Turn(0, 0, text, (), tuple(errors), executable, ())


def rollout(*turns, task=DISTANCE, end_reason="answer", sample=0):
  """A trajectory of which only words and flags matter here; a str is a faultless turn."""
  empty = np.zeros(0, np.int32)
  return Trajectory(
    task_id=task.task_id,
    sample=sample,
    seed_path=(0, 0, 0, sample),
    temperature=1.0,
    forbidden_ids=(),
    token_ids_T=empty,
    position_TA=np.zeros((0, 3), np.int32),
    trained_T=np.zeros(0, bool),
    logp_T=np.zeros(0, np.float32),
    policy_step_T=empty,
    images=(),
    image_start=(),
    prompt_length=0,
    prompt_images=0,
    turns=tuple(turn(t) if isinstance(t, str) else t for t in turns),
    end_reason=end_reason,
  )


def scores_of(*rollouts, task=DISTANCE, cfg=CFG, k=1.0):
  """Scores of one group, each [G]."""
  scores = score([list(rollouts)], [task], cfg, k)
  return type(scores)(*(part[0] for part in scores))


# --- format ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("turns", "reward"),
  [
    ([says("2")], 1.0),
    ([DRAWS, says("2")], 1.0),
    ([DRAWS, DRAWS, says("2")], 1.0),
    ([turn(DRAWS, executable=False), says("2")], 0.0),
    ([turn(DRAWS, errors=[OperationError("bad_json", "")]), says("2")], 0.0),
    ([DRAWS.replace("</think>", ""), says("2")], 0.0),
    ([DRAWS.replace("Action:", "Do:"), says("2")], 0.0),
    (["Sure! " + DRAWS, says("2")], 0.0),
    ([DRAWS, "<answer> 2 </answer>"], 0.0),
    ([DRAWS, says("2") + says("2")], 0.0),
    ([DRAWS + "<answer> 2 </answer>", says("2")], 0.0),
    ([DRAWS + "<answer>", says("2")], 0.0),
    ([DRAWS, says("2").replace("</answer>", "")], 0.0),
  ],
)
def test_format(turns, reward):
  assert format_reward(rollout(*turns)) == reward


@pytest.mark.parametrize(
  ("turns", "end_reason", "answer"),
  [
    ([DRAWS, says("2.0")], "answer", "2.0"),
    ([says("a\nb")], "answer", "a\nb"),
    ([says("2"), says("3")], "answer", "3"),
    ([says("2") + says("3")], "answer", None),
    (["</answer> 2 <answer>"], "answer", None),
    ([DRAWS], "no_action", None),
    ([says("2")], "token_limit", None),
    ([says("2")], "fault", None),
    ([], "fault", None),
  ],
)
def test_final_answer(turns, end_reason, answer):
  assert final_answer(rollout(*turns, end_reason=end_reason)) == answer


# --- composition -------------------------------------------------------------------------------


def test_a_wild_guess_with_perfect_drawings_earns_no_format_reward():
  wild = rollout(DRAWS, DRAWS, says("4.1"))  # 105 % off: MRA 0, SNRA 0.50
  near = rollout(DRAWS, DRAWS, says("2.1"))
  ugly = rollout(turn(DRAWS, executable=False), says("4.1"))
  scores = scores_of(wild, near, ugly)
  np.testing.assert_array_equal(scores.format_BG, [1, 1, 0])
  np.testing.assert_allclose(scores.score_BG, [0, 1, 0])
  assert scores.accuracy_BG[0] == pytest.approx(0.499, abs=1e-3)
  assert scores.reward_BG[0] == scores.accuracy_BG[0] == scores.reward_BG[2]
  assert scores.reward_BG[1] == pytest.approx(scores.accuracy_BG[1] + 0.5)


def test_gate_all_is_the_published_equation():
  cfg = dataclasses.replace(CFG, gate="all", number="mra", strict_mra=True, format_weight=1.0)
  group = [rollout(DRAWS, says(text)) for text in ("2.0", "1.7", "9")]
  scores = scores_of(*group, rollout(says("1.7").replace("Action", "")), cfg=cfg)
  np.testing.assert_allclose(scores.reward_BG, [2.0, 1.7, 0.0, 0.7], atol=1e-6)


def test_gate_all_silences_the_smooth_part_too():
  scores = scores_of(rollout(says("4.1")), cfg=dataclasses.replace(CFG, gate="all"))
  assert scores.reward_BG[0] == scores.accuracy_BG[0] == 0.0


def test_the_gate_opens_above_the_threshold():
  cfg = dataclasses.replace(CFG, score_threshold=0.6)
  scores = scores_of(rollout(says("2.5")), rollout(says("2.38")), cfg=cfg)  # 25 and 19 % off
  np.testing.assert_allclose(scores.score_BG, [0.6, 0.7], atol=1e-6)
  np.testing.assert_allclose(scores.reward_BG - scores.accuracy_BG, [0.0, 0.5], atol=1e-6)


def test_at_the_least_sharpness_a_wrong_choice_still_gets_054():
  right, wrong = rollout(says("B"), task=NEAREST), rollout(says("A"), task=NEAREST)
  blunt = scores_of(right, wrong, task=NEAREST, k=1.0)
  np.testing.assert_allclose(blunt.reward_BG, [1.5, 0.5379], atol=1e-4)
  np.testing.assert_array_equal(blunt.score_BG, [1, 0])
  sharp = scores_of(right, wrong, task=NEAREST, k=100.0)
  np.testing.assert_allclose(sharp.reward_BG, [1.5, 0.0], atol=1e-6)


def test_discrete_sharpness_is_for_choices_alone():
  cfg = dataclasses.replace(CFG, discrete_sharpness=20.0)
  wrong = rollout(says("A"), task=NEAREST)
  for k in (1.0, 100.0):
    assert scores_of(wrong, task=NEAREST, cfg=cfg, k=k).reward_BG[0] < 1e-6
  off = rollout(says("4.0"))
  assert scores_of(off, cfg=cfg, k=1.0).reward_BG[0] == pytest.approx(0.5379, abs=1e-4)


@pytest.mark.parametrize(
  ("number", "choice", "off", "wrong"),
  [
    ("sigmoid", "smooth", 0.8756, 0.5379),
    ("tanh", "smooth", 0.7551, 0.2384),
    ("mra", "smooth", 0.1, 0.5379),
    ("ratio", "exact", 0.5, 0.0),
    ("sigmoid", "exact", 0.8756, 0.0),
  ],
)
def test_kinds_of_accuracy(number, choice, off, wrong):
  cfg = dataclasses.replace(CFG, number=number, choice=choice)
  assert scores_of(rollout(says("3.0")), cfg=cfg).accuracy_BG[0] == pytest.approx(off, abs=1e-4)
  scores = scores_of(rollout(says("A"), task=NEAREST), task=NEAREST, cfg=cfg)
  assert scores.accuracy_BG[0] == pytest.approx(wrong, abs=1e-4)


@pytest.mark.parametrize("text", ["", "two or three", "2 or 3", "B", "2 m²", "nan"])
def test_what_cannot_be_read_earns_nothing_and_is_counted(text):
  scores = scores_of(rollout(DRAWS, says(text)))
  assert not scores.parsed_BG[0]
  assert scores.valid_BG[0]
  assert scores.reward_BG[0] == scores.accuracy_BG[0] == scores.score_BG[0] == 0.0


def test_an_early_end_earns_nothing_even_where_a_reading_would_be_right():
  """0 is what an unread answer is filled with, so it must not be taken for a truth of 0."""
  none = dataclasses.replace(DISTANCE, question="How many beds?", answer="0")
  scores = scores_of(rollout(says("0"), task=none, end_reason="token_limit"), task=none)
  assert scores.reward_BG[0] == scores.score_BG[0] == 0.0


def test_a_fault_is_not_usable():
  scores = scores_of(rollout(says("2"), end_reason="fault"), rollout(says("2")))
  np.testing.assert_array_equal(scores.valid_BG, [False, True])
  np.testing.assert_array_equal(scores.parsed_BG, [False, True])
  assert scores.reward_BG[0] == 0.0


def test_units_are_those_of_the_question():
  scores = scores_of(*(rollout(says(text)) for text in ("200 cm", "2", "about 2.0 meters.")))
  np.testing.assert_array_equal(scores.score_BG, [1, 1, 1])


def test_numbers_and_choices_share_a_batch():
  groups = [
    [rollout(says("2")), rollout(says("9"))],
    [rollout(says("chair"), task=NEAREST), rollout(says("2"), task=NEAREST)],
  ]
  scores = score(groups, [DISTANCE, NEAREST], CFG, jnp.float32(100.0))
  np.testing.assert_allclose(scores.reward_BG, [[1.5, 0.0], [1.5, 0.0]], atol=1e-6)
  np.testing.assert_array_equal(scores.parsed_BG, [[True, True], [True, False]])
  for part in scores:
    assert isinstance(part, np.ndarray)
    assert part.shape == (2, 2)
  assert {part.dtype for part in scores} == {np.dtype(np.float32), np.dtype(bool)}


def test_a_task_without_a_usable_answer_is_named():
  for broken in (
    dataclasses.replace(DISTANCE, answer=""),
    dataclasses.replace(NEAREST, answer="E"),
  ):
    with pytest.raises(ValueError, match=broken.task_id):
      score([[rollout(says("2"), task=broken)]], [broken], CFG, 1.0)
  with pytest.raises(ValueError, match="nearest"):
    score([[rollout(says("2"))]], [NEAREST], CFG, 1.0)


def test_one_answer_traces_and_sharpness_never_recompiles():
  traces = []

  @jax.jit
  def one(answer, sharpness):
    traces.append(1)
    return score_answer(answer, sharpness, CFG).reward

  yes = jnp.array(True)
  answer = Answer(jnp.float32(3.0), jnp.float32(2.0), yes, yes, jnp.float32(1.0), yes)
  assert float(one(answer, jnp.float32(1.0))) > float(one(answer, jnp.float32(50.0)))
  assert len(traces) == 1


def test_built_from_a_config():
  mapping = dataclasses.asdict(CFG)
  assert config.build(RewardConfig, mapping) == CFG
  with pytest.raises(config.ConfigError, match="gate"):
    config.build(RewardConfig, mapping | {"gate": "none"})
