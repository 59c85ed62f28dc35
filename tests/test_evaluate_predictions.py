"""Predictions of a random policy on held-out questions, and the baselines."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax import sharding
from spatial_jax.data.pipeline import PipelineConfig
from spatial_jax.data.prompt_form import read_form
from spatial_jax.evaluate import baselines, predictions
from spatial_jax.evaluate.behaviour import behaviour
from spatial_jax.evaluate.predictions import EvaluationSet, Prediction
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.reward.parse import check_truth
from spatial_jax.rollout.config import SamplingParams
from spatial_jax.sharding import MeshConfig
from spatial_jax.stages.context import open_context
from tests import dummies
from tests import evaluate_fixtures as fixtures
from tests.test_evaluate_comparison import make_prediction

PIPELINE = PipelineConfig(workers=0, steps_ahead=1)
SAMPLED = SamplingParams(1.0, greedy=False, top_k=0, top_p=1.0, min_p=0.0, max_tokens_per_turn=0)
GREEDY = dataclasses.replace(SAMPLED, greedy=True)
COOL = dataclasses.replace(SAMPLED, temperature=0.3)


@pytest.fixture(scope="module")
def evaluation_set() -> EvaluationSet:
  generator = np.random.default_rng(0)
  tasks = [dummies.number_task(generator, f"room-{i}/chair.table") for i in range(10)]
  return EvaluationSet(tasks, (), fixtures.run_config().reward, seed=0)


@pytest.fixture(scope="module")
def engine_and_params():
  """A random policy on one device."""
  cfg = fixtures.run_config()
  mesh = sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
  policy = make_policy(fixtures.policy_config(), jnp.dtype("float32"), mesh)
  with open_context(policy, fixtures.policy_files(), read_form(cfg.text), cfg, None) as context:
    shapes = dataclasses.replace(cfg.rollout, prompts=8, slots=8, group=3)
    params = context.decode_params(fixtures.random_params(0))
    yield context.engine(shapes, 0, "config.evaluation.slots"), params


def number_and_choice(evaluation_set):
  number = evaluation_set.tasks[0]
  options = ("A. bed", "B. bin", "C. box")
  choice = dataclasses.replace(
    number, question_type="object_rel_distance", options=options, answer_kind="choice", answer="A"
  )
  return number, choice


def predict(engine_and_params, evaluation_set, sampling: SamplingParams) -> list[Prediction]:
  engine, params = engine_and_params
  return predictions.predict(engine, params, evaluation_set, [sampling], PIPELINE)[0]


def texts(found):
  return [tuple(turn.text for turn in prediction.turns) for prediction in found]


def test_every_task_has_one_prediction_in_order(evaluation_set, engine_and_params):
  assert len(evaluation_set.tasks) == 10  # a batch of the engine has 8
  found = predict(engine_and_params, evaluation_set, SAMPLED)
  assert [(p.task_id, p.truth) for p in found] == [
    (task.task_id, task.answer) for task in evaluation_set.tasks
  ]
  assert all(0 <= p.score <= 1 and p.tokens > 0 and p.turns and p.valid for p in found)
  assert all(p.logp < 0 for p in found)
  statistics = behaviour(found)
  ends = [share for name, share in statistics.items() if name.startswith("end/")]
  assert sum(ends) == pytest.approx(1)
  assert statistics["tokens"] == np.mean([p.tokens for p in found])


def test_a_prediction_depends_on_its_task_and_the_seed_alone(evaluation_set, engine_and_params):
  first = texts(predict(engine_and_params, evaluation_set, SAMPLED))
  fewer = dataclasses.replace(evaluation_set, tasks=evaluation_set.tasks[7:])
  assert texts(predict(engine_and_params, fewer, SAMPLED)) == first[7:]
  other = dataclasses.replace(evaluation_set, seed=1)
  assert texts(predict(engine_and_params, other, SAMPLED)) != first
  assert texts(predict(engine_and_params, evaluation_set, GREEDY)) != first


def test_several_sampling_settings_equal_separate_calls(evaluation_set, engine_and_params):
  engine, params = engine_and_params
  batches = []
  settings_ = [SAMPLED, GREEDY, COOL]
  together = predictions.predict(
    engine, params, evaluation_set, settings_, PIPELINE, lambda: batches.append(1)
  )
  assert len(batches) == predictions.batches(engine, evaluation_set) == 2
  for sampling, found in zip(settings_, together, strict=True):
    assert texts(found) == texts(predict(engine_and_params, evaluation_set, sampling))


def test_answers_are_scored_against_their_own_task(evaluation_set, engine_and_params, monkeypatch):
  """Scripted rollouts with drawings; the engine works in batches of 8 and 2."""
  generator = np.random.default_rng(0)
  answers = {
    task.task_id: (task.answer, "9999", None)[i % 3] for i, task in enumerate(evaluation_set.tasks)
  }

  def script(engine, params, job):
    tasks = [prompt.task for prompt in job.prompts]
    return [[dummies.trajectory(generator, t, answer=answers[t.task_id])] for t in tasks]

  monkeypatch.setattr(predictions, "generate_rollouts", script)
  found = predict(engine_and_params, evaluation_set, SAMPLED)
  assert [p.answer for p in found] == list(answers.values())
  assert [p.score for p in found] == [1.0, 0.0, 0.0] * 3 + [1.0]
  assert [p.parsed for p in found] == [True, True, False] * 3 + [True]
  assert all(1.0 <= p.reward <= 1.2001 for p in found[::3])
  drawn = [sum(len(turn.produced) for turn in p.turns) for p in found]
  assert [p.images for p in found] == [1 + count for count in drawn]
  assert any(drawn)


# --- other images ------------------------------------------------------------------------------


def test_other_images_come_from_another_scene_of_the_same_type(evaluation_set):
  number, choice = number_and_choice(evaluation_set)
  tasks = [
    dataclasses.replace(task, scene_id=f"room-{i // 2}", question_type=kind.question_type)
    for i, (task, kind) in enumerate(
      zip(evaluation_set.tasks[:8], [number, choice] * 4, strict=True)
    )
  ]
  changed = baselines.other_image_tasks(tasks)
  assert changed is not None
  owner = {id(task.media): task for task in tasks}
  for task, other in zip(tasks, changed, strict=True):
    source = owner[id(other.media)]
    assert source.scene_id != task.scene_id
    assert source.question_type == task.question_type
    assert (other.question, other.answer, other.boxes) == (task.question, task.answer, ())


def test_without_another_scene_there_are_no_other_images(evaluation_set):
  tasks = [dataclasses.replace(task, scene_id="one") for task in evaluation_set.tasks]
  assert baselines.other_image_tasks(tasks) is None


def test_other_images_change_the_predictions(evaluation_set, engine_and_params):
  tasks = [dataclasses.replace(t, scene_id=t.task_id) for t in evaluation_set.tasks]
  changed = baselines.other_image_tasks(tasks)
  other = dataclasses.replace(evaluation_set, tasks=changed)
  assert texts(predict(engine_and_params, other, GREEDY)) != texts(
    predict(engine_and_params, evaluation_set, GREEDY)
  )


# --- constants ---------------------------------------------------------------------------------


def test_constant_answers_are_medians_and_most_frequent_letters(evaluation_set):
  number, choice = number_and_choice(evaluation_set)
  examples = [dataclasses.replace(number, answer=text) for text in ("1", "3", "2.5", "100")]
  examples += [dataclasses.replace(choice, answer=letter) for letter in "CBACB"]
  answers = baselines.constant_answers(examples)
  assert answers == {number.question_type: "2.75", choice.question_type: "B"}


def test_a_type_with_several_kinds_of_answers_has_a_constant(evaluation_set):
  number, choice = number_and_choice(evaluation_set)
  choice = dataclasses.replace(choice, question_type=number.question_type, answer="C")
  for examples, answer in (([number, choice, choice], "C"), ([choice, number, number], None)):
    found = baselines.constant_answers(examples)[number.question_type]
    assert found == (answer or f"{check_truth(number).value:g}")


def test_constant_answers_are_scored_with_the_right_format(evaluation_set):
  number, choice = number_and_choice(evaluation_set)
  tasks = [
    dataclasses.replace(number, answer="2"),
    dataclasses.replace(number, answer="4"),
    dataclasses.replace(choice, answer="A"),
    dataclasses.replace(number, question_type="a type without examples"),
  ]
  small = dataclasses.replace(evaluation_set, tasks=tasks)
  answers = {number.question_type: "2", choice.question_type: "B"}
  found = baselines.predict_constant(small, answers)
  assert [p.score for p in found] == [1.0, pytest.approx(0.1), 0.0, 0.0]
  assert found[0].reward == pytest.approx(1.2)  # accuracy and format
  assert [p.parsed for p in found] == [True, True, True, False]
  assert [p.answer for p in found] == ["2", "2", "B", None]


@given(st.floats(0.3, 3.0), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_best_factor_undoes_a_wrong_scale(scale, seed):
  truth_Z = np.random.default_rng(seed).uniform(0.5, 5, 40).astype(np.float32)
  factor = baselines.best_factor(truth_Z / np.float32(scale), truth_Z, dummies.REWARD)
  assert factor == pytest.approx(scale, rel=0.06)  # MRA cannot tell errors below 5 % apart
  assert baselines.best_factor(truth_Z, truth_Z, dummies.REWARD) == pytest.approx(1, abs=1e-6)
  near = dataclasses.replace(dummies.REWARD, score="tolerance", tolerance=0.02)
  assert baselines.best_factor(truth_Z / np.float32(scale), truth_Z, near) == pytest.approx(
    scale, rel=0.03
  )


def test_the_fitted_factor_is_cross_fitted_per_type(evaluation_set):
  """Type one is 1.5 times too short; type two is right; a choice and an unread answer stay."""
  number, choice = number_and_choice(evaluation_set)
  short = [dataclasses.replace(number, answer=f"{1 + i / 4}") for i in range(20)]
  right = [dataclasses.replace(t, question_type="other_type") for t in short]
  small = dataclasses.replace(evaluation_set, tasks=[*short, *right, choice, short[0]])
  texts_ = [*(f"{float(t.answer) / 1.5:g}" for t in short), *(t.answer for t in right), "B", None]
  start = baselines.score_texts(small, texts_)
  found = baselines.predict_fitted_factor(small, start)
  assert np.mean([p.score for p in start[:20]]) < 0.5
  assert np.mean([p.score for p in found[:20]]) > 0.9
  assert [p.score for p in found[20:40]] == [1.0] * 20
  assert [(p.answer, p.parsed) for p in found[40:]] == [("B", True), (None, False)]


def test_no_question_fits_its_own_factor(evaluation_set):
  """Two questions of one type: each uses the factor of the other."""
  number, _ = number_and_choice(evaluation_set)
  tasks = [dataclasses.replace(number, answer=answer) for answer in ("2", "9")]
  small = dataclasses.replace(evaluation_set, tasks=tasks)
  start = baselines.score_texts(small, ["1", "3"])
  found = baselines.predict_fitted_factor(small, start)
  first, second = (float(p.answer or "nan") for p in found)
  assert first / 1 == pytest.approx(3, rel=0.06)
  assert second / 3 == pytest.approx(2, rel=0.06)


def test_the_most_likely_sample_has_an_answer_first():
  def sample(reason, logp):
    return dataclasses.replace(make_prediction(0, 1.0), end_reason=reason, logp=logp)

  endless, poor, good = sample("token_limit", -0.1), sample("answer", -2.0), sample("answer", -0.5)
  samples = [[poor, endless], [good, poor], [endless, endless]]
  assert predictions.most_likely_prediction(samples) == [good, poor]


def test_a_fault_without_sampled_tokens_has_a_finite_likelihood():
  generator = np.random.default_rng(0)
  (rollout,) = dummies.group(generator, dummies.number_task(generator), samples=1)
  fault = dataclasses.replace(rollout, trained_T=np.zeros_like(rollout.trained_T))
  assert predictions.mean_logp(fault) == 0.0
