"""A policy of random weights is asked held-out questions, in a real loop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax import compiled, sharding
from spatial_jax.drawing.executor import Executor
from spatial_jax.evaluate import predictions
from spatial_jax.evaluate.behaviour import behaviour
from spatial_jax.evaluate.predictions import EvaluationSet, Prediction
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.rollout.config import SamplingParams
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.sharding import MeshConfig
from spatial_jax.stages.context import make_engine
from tests import dummies
from tests import evaluate_fixtures as fixtures
from tests.test_evaluate_comparison import answered

SAMPLED = SamplingParams(1.0, greedy=False, top_k=0, top_p=1.0, min_p=0.0, max_tokens_per_turn=0)
GREEDY = dataclasses.replace(SAMPLED, greedy=True)
COOL = dataclasses.replace(SAMPLED, temperature=0.3)


@pytest.fixture(scope="module")
def evaluation_set() -> EvaluationSet:
  generator = np.random.default_rng(0)
  tasks = [dummies.number_task(generator, f"room-{i}/chair.table") for i in range(10)]
  return EvaluationSet(tasks, fixtures.run_config().reward, 10.0, seed=0)


@pytest.fixture(scope="module")
def asked():
  """(engine, decode parameters) of a random policy on one device."""
  cfg = fixtures.run_config()
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  policy = make_policy(fixtures.policy_config(), jnp.dtype("float32"), mesh)
  words = Conversation(fixtures.tokenizer(), cfg.text, cfg.preprocess, policy.cfg)
  params = compiled.decode_params(policy, mesh, "compute")(fixtures.random_params(0))
  with Executor(cfg.executor, cfg.style) as executor:
    asking = dataclasses.replace(cfg.rollout, prompts=8, slots=8, group=3)
    yield make_engine(policy, words, executor, asking, 0, "config.evaluation.slots"), params


def number_and_choice(evaluation_set):
  number = evaluation_set.tasks[0]
  options = ("A. bed", "B. bin", "C. box")
  choice = dataclasses.replace(
    number, question_type="object_rel_distance", options=options, answer_kind="choice", answer="A"
  )
  return number, choice


def answer(
  asked, evaluation_set: EvaluationSet, mode: SamplingParams, grey: bool = False
) -> list[Prediction]:
  engine, params = asked
  return predictions.evaluate_policy(engine, params, evaluation_set, [mode], grey)[0]


def said(found):
  return [tuple(turn.text for turn in a.turns) for a in found]


def test_every_task_is_answered_in_order_the_last_batch_padded(evaluation_set, asked):
  assert len(evaluation_set.tasks) == 10  # the engine takes 8
  found = answer(asked, evaluation_set, SAMPLED)
  assert [(a.task_id, a.truth) for a in found] == [
    (t.task_id, t.answer) for t in evaluation_set.tasks
  ]
  assert len({a.task_id for a in found}) == 10
  assert all(0 <= a.score_ <= 1 and a.tokens > 0 and a.turns and a.valid for a in found)
  statistics = behaviour(found)
  assert sum(
    share for name, share in statistics.items() if name.startswith("end/")
  ) == pytest.approx(1)
  assert statistics["tokens"] == np.mean([a.tokens for a in found])


def test_an_answer_depends_on_its_task_and_the_seed_alone(evaluation_set, asked):
  first = said(answer(asked, evaluation_set, SAMPLED))
  fewer = dataclasses.replace(evaluation_set, tasks=evaluation_set.tasks[7:])
  assert said(answer(asked, fewer, SAMPLED)) == first[7:]
  other = dataclasses.replace(evaluation_set, seed=1)
  assert said(answer(asked, other, SAMPLED)) != first
  assert said(answer(asked, evaluation_set, GREEDY)) != first


def test_asking_in_several_modes_is_asking_in_each(evaluation_set, asked):
  """Prompts are read once for all; calls are counted as announced."""
  engine, params = asked
  made = []
  sampling_params = [SAMPLED, GREEDY, COOL]
  together = predictions.evaluate_policy(
    engine, params, evaluation_set, sampling_params, False, lambda: made.append(1)
  )
  assert len(made) == predictions.calls(engine, evaluation_set) == 2
  for mode, found in zip(sampling_params, together, strict=True):
    assert said(found) == said(answer(asked, evaluation_set, mode))


def test_grey_hides_what_tells_two_pictures_apart(evaluation_set, asked):
  one = evaluation_set.tasks[0]
  black = tuple(np.zeros_like(image) for image in one.images)
  other = dataclasses.replace(one, images=black)
  two = dataclasses.replace(evaluation_set, tasks=[one])
  changed = dataclasses.replace(evaluation_set, tasks=[other])
  seen = [[said(answer(asked, e, SAMPLED, grey)) for e in (two, changed)] for grey in (False, True)]
  assert seen[0][0] != seen[0][1]
  assert seen[1][0] == seen[1][1]


def test_greyed_keeps_size_and_question(evaluation_set):
  task = evaluation_set.tasks[0]
  grey = predictions.greyed(task)
  assert [image.shape for image in grey.images] == [image.shape for image in task.images]
  assert all((image == predictions.GREY).all() and image.dtype == np.uint8 for image in grey.images)
  assert (grey.task_id, grey.question, grey.answer) == (task.task_id, task.question, task.answer)


def test_answers_are_scored_against_their_own_task(evaluation_set, asked, monkeypatch):
  """Rollouts with drawings, scripted; the engine is asked in batches of 8 and 2."""
  generator = np.random.default_rng(0)
  texts = {
    task.task_id: (task.answer, "9999", None)[i % 3] for i, task in enumerate(evaluation_set.tasks)
  }

  def script(engine, params, prompts, seed, step, sampling_params):
    tasks = [prompt.task for prompt in prompts]
    return [[dummies.trajectory(generator, t, answer=texts[t.task_id])] for t in tasks]

  monkeypatch.setattr(predictions, "generate_rollouts", script)
  found = answer(asked, evaluation_set, SAMPLED)
  assert [a.answer for a in found] == list(texts.values())
  assert [a.score_ for a in found] == [1.0, 0.0, 0.0] * 3 + [1.0]
  assert [a.parsed for a in found] == [True, True, False] * 3 + [True]
  assert all(1.0 <= a.reward <= 1.2001 for a in found[::3])
  drawn = [sum(len(turn.produced) for turn in a.turns) for a in found]
  assert [a.pictures for a in found] == [1 + count for count in drawn]
  assert any(drawn)


# --- typical answers ---------------------------------------------------------------------------


def test_typical_answers_are_medians_and_most_frequent_letters(evaluation_set):
  number, choice = number_and_choice(evaluation_set)
  examples = [dataclasses.replace(number, answer=text) for text in ("1", "3", "2.5", "100")]
  examples += [dataclasses.replace(choice, answer=letter) for letter in "CBACB"]
  typical = predictions.baseline_answers(examples)
  assert typical == {number.question_type: "2.75", choice.question_type: "B"}


def test_typical_answers_are_marked_as_answers_in_perfect_form(evaluation_set):
  number, choice = number_and_choice(evaluation_set)
  tasks = [
    dataclasses.replace(number, answer="2"),
    dataclasses.replace(number, answer="4"),
    dataclasses.replace(choice, answer="A"),
    dataclasses.replace(number, question_type="never seen"),
  ]
  small = dataclasses.replace(evaluation_set, tasks=tasks)
  found = predictions.baseline_predictions(
    small, {number.question_type: "2", choice.question_type: "B"}
  )
  assert [a.score_ for a in found] == [1.0, pytest.approx(0.1), 0.0, 0.0]
  assert found[0].reward == pytest.approx(1.2)  # accuracy and form
  assert [a.parsed for a in found] == [True, True, True, False]
  assert [a.answer for a in found] == ["2", "2", "B", None]


def test_the_best_of_several_samples_is_an_answer_first_and_then_the_likeliest():
  def given(reason, logp):
    return dataclasses.replace(answered(0, 1.0), end_reason=reason, logp=logp)

  babble, poor, good = given("token_limit", -0.1), given("answer", -2.0), given("answer", -0.5)
  assert predictions.best_of([[poor, babble], [good, poor], [babble, babble]]) == [good, poor]


def test_samples_know_how_likely_they_are(evaluation_set, asked):
  engine, params = asked
  samples = predictions.evaluate_policy(engine, params, evaluation_set, [SAMPLED] * 3, False)
  best = predictions.best_of(samples)
  assert all(a.logp < 0 for prediction_set in samples for a in prediction_set)
  for chosen, given in zip(best, zip(*samples, strict=True), strict=True):
    whole = [a for a in given if a.end_reason == "answer"] or given
    assert chosen.logp == max(a.logp for a in whole)
