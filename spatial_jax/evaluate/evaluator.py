"""One evaluation: held-out questions, policies and baselines that answer them, the result table.

TaskSource ─► Questions ─► PredictionSets (start, end, baselines, controls) ─► ResultTable
                 └──► a few groups of rollouts for the report
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

from spatial_jax.config import check_field
from spatial_jax.data.pipeline import interleave_types
from spatial_jax.data.source import Source
from spatial_jax.errors import DataError
from spatial_jax.evaluate import baselines, comparison, results
from spatial_jax.evaluate.behaviour import behaviour
from spatial_jax.evaluate.benchmarks.summary import heading, vsi_score
from spatial_jax.evaluate.comparison import PredictionSet, result_table
from spatial_jax.evaluate.console import show
from spatial_jax.evaluate.predictions import (
  EvaluationSet,
  Prediction,
  batches,
  most_likely_prediction,
  predict,
)
from spatial_jax.evaluate.results import PREDICTIONS, ResultColumn, ResultTable, write_results
from spatial_jax.reward.compose import RewardConfig, score
from spatial_jax.reward.snra import sharpness
from spatial_jax.rollout.config import RolloutConfig, SamplingParams
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.saved_groups import SavedGroup, make_saved_groups
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.types import Params, Task, TrainState


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """The size of an evaluation.

  Attributes:
    tasks: held-out questions; fewer if the source has fewer.
    progress_tasks: of them, questions that are answered during training; see `loop.evaluate_every`.
    train_tasks: questions of the training split that the median answers are computed from.
    temperatures: at which the start policy is sampled too: how much does sharpening alone give?
    best_of: number of samples of the end policy, of which the most likely one counts; 0: none.
    other_images: whether both policies also answer with the images of another scene.
    prompts: questions per call of the rollout engine.
    slots: of them, questions that are worked on at once.
    gallery: questions whose rollouts are saved for the report.
  """

  tasks: int
  progress_tasks: int
  train_tasks: int
  temperatures: tuple[float, ...]
  best_of: int
  other_images: bool
  prompts: int
  slots: int
  gallery: int

  def __post_init__(self):
    for name in ("tasks", "progress_tasks", "train_tasks", "prompts", "slots"):
      check_field(self, name, vars(self)[name] >= 1, "be at least 1")
    for name in ("best_of", "gallery"):
      check_field(self, name, vars(self)[name] >= 0, "be at least 0")
    valid = all(0 < t < math.inf for t in self.temperatures)
    check_field(self, "temperatures", valid, "have values above 0 only")


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
  """Held-out tasks, and tasks of the training split for the median answers."""

  tasks: Sequence[Task]
  examples: Sequence[Task]


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyPair:
  """Decode parameters of the policies to compare; `start` is None if there is only one."""

  start: Params | None
  end: Params


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
  """Everything that an evaluation needs.

  Attributes:
    engine: generates one rollout per prompt and sampling setting.
    policies: that answer.
    evaluation_set: questions and scoring.
    examples: tasks that the median answers are computed from.
    cfg: the size.
  """

  engine: Engine
  policies: PolicyPair
  evaluation_set: EvaluationSet
  examples: Sequence[Task]
  cfg: EvaluationConfig


def load_questions(source: Source, cfg: EvaluationConfig, seed: int) -> Questions:
  """The questions of an evaluation; `seed` chooses the examples for the median answers.

  Raises:
    DataError: if the source has no held-out question.
  """
  tasks = source.held_out(cfg.tasks)
  if not tasks:
    raise DataError("the source has no held-out question; see config.source.questions and .path")
  return Questions(tasks, source.examples(seed, cfg.train_tasks))


def progress_evaluation(
  engine: Engine,
  decode_params: Callable[[Params], Params],
  tasks: Sequence[Task],
  reward: RewardConfig,
  seed: int,
) -> Callable[[TrainState], dict[str, float]]:
  """A function: train state -> mean score of greedy answers to held-out tasks, and share parsed.

  Args:
    engine: of training.
    decode_params: train parameters -> parameters on the rollout mesh.
    tasks: held out.
    reward, seed: of the run.
  """
  evaluation_set = EvaluationSet(tasks, reward, float(sharpness(1.0, reward.schedule)), seed)
  greedy = dataclasses.replace(engine.cfg.sampling, greedy=True)

  def evaluate(state: TrainState) -> dict[str, float]:
    (answers,) = predict(engine, decode_params(state.params), evaluation_set, [greedy])
    valid = [answer for answer in answers if answer.valid] or answers
    return {
      "held_out_score": sum(answer.score for answer in valid) / len(valid),
      "held_out_parsed": sum(answer.parsed for answer in valid) / len(valid),
    }

  return evaluate


def evaluation_rollout_config(
  rollout: RolloutConfig, cfg: EvaluationConfig, has_start: bool
) -> RolloutConfig:
  """The rollout shapes of an evaluation: one rollout per question and sampling setting.

  Args:
    rollout: of training: limits, temperature, buckets.
    cfg: the size.
    has_start: whether a start policy is sampled at several temperatures.
  """
  prompts = min(cfg.prompts, cfg.tasks)
  group = max(2 + len(cfg.temperatures) if has_start else 2, cfg.best_of)
  slots = min(cfg.slots, prompts)
  rows = min(rollout.rows, slots * group)
  return dataclasses.replace(rollout, prompts=prompts, slots=slots, group=group, rows=rows)


def make_evaluator(
  make_engine: Callable[[RolloutConfig], Engine],
  rollout: RolloutConfig,
  questions: Questions,
  reward: RewardConfig,
  cfg: EvaluationConfig,
  seed: int,
  policies: PolicyPair,
) -> Evaluator:
  """An evaluator with an engine of the right shapes.

  Args:
    make_engine: of a rollout config.
    rollout: as in `evaluation_rollout_config`.
    questions: from `load_questions`.
    reward: scored at the sharpness of the end of its schedule.
    cfg: the size.
    seed: of sampling.
    policies: that answer.
  """
  final_sharpness = float(sharpness(1.0, reward.schedule))
  evaluation_set = EvaluationSet(questions.tasks, reward, final_sharpness, seed)
  available = dataclasses.replace(cfg, tasks=len(questions.tasks))
  shapes = evaluation_rollout_config(rollout, available, has_start=policies.start is not None)
  return Evaluator(make_engine(shapes), policies, evaluation_set, questions.examples, cfg)


def run_evaluation(
  evaluator: Evaluator,
  workdir: pathlib.Path,
  trained_on: str | None,
  fingerprint: dict[str, Any],
  console: Console,
) -> list[PredictionSet]:
  """Answers all questions, writes results.json and predictions.jsonl, and prints the table.

  Args:
    evaluator: questions and policies.
    workdir: of the results.
    trained_on: benchmark whose rooms the policy was trained on, None without one.
    fingerprint: as in `write`.
    console: for progress and table.
  """
  with Progress(console=console, transient=True) as bar:
    progress = bar.add_task("evaluating", total=count_batches(evaluator))
    found = list(prediction_sets(evaluator, lambda: bar.advance(progress)))
  table, above = make_table(evaluator, found), heading(evaluator.evaluation_set.tasks, trained_on)
  write(workdir, found, table, fingerprint | {"benchmark": above})
  show(table, above, console)
  return found


def prediction_sets(evaluator: Evaluator, on_batch: Callable[[], None]) -> Iterator[PredictionSet]:
  """All columns of the table, the most important first.

  Args:
    evaluator: questions and policies.
    on_batch: called after each batch of questions.
  """
  start, end = evaluator.policies.start, evaluator.policies.end
  tasks = evaluator.evaluation_set.tasks
  others = baselines.other_image_tasks(tasks) if evaluator.cfg.other_images else None
  prefix = "" if start is None else "end, "
  sampled = evaluator.engine.cfg.sampling
  greedy = dataclasses.replace(sampled, greedy=True)
  before: list[PredictionSet] = []
  if start is not None:
    yield from (before := _start_columns(evaluator, start, on_batch))
  end_greedy, end_sampled = _answer(evaluator, end, tasks, [greedy, sampled], on_batch)
  yield _column(results.END_GREEDY, f"{prefix}greedy", end_greedy)
  yield _column(results.END_SAMPLED, f"{prefix}sampled", end_sampled)
  if evaluator.cfg.best_of:
    settings = [sampled] * evaluator.cfg.best_of
    samples = _answer(evaluator, end, tasks, settings, on_batch)
    label = f"{prefix}most likely of {len(settings)}"
    yield _column(results.END_BEST_OF_N, label, most_likely_prediction(samples))
  answers = baselines.constant_answers(evaluator.examples)
  constant = baselines.predict_constant(evaluator.evaluation_set, answers)
  yield _column(results.MEDIAN, "median answer", constant)
  if before:
    fitted = baselines.predict_fitted_factor(evaluator.evaluation_set, before[0].predictions)
    yield _column(results.START_FITTED, "start greedy x fitted factor", fitted)
  if others is not None:
    if start is not None:
      (found,) = _answer(evaluator, start, others, [greedy], on_batch)
      yield _column(results.START_OTHER_IMAGE, "start greedy, other images", found)
    (found,) = _answer(evaluator, end, others, [greedy], on_batch)
    yield _column(results.END_OTHER_IMAGE, f"{prefix}greedy, other images", found)


def count_batches(evaluator: Evaluator) -> int:
  """The number of batches of questions of `prediction_sets`."""
  policies = 1 + (evaluator.policies.start is not None)
  others = evaluator.cfg.other_images
  if others:
    others = baselines.other_image_tasks(evaluator.evaluation_set.tasks) is not None
  passes = policies * (1 + others) + bool(evaluator.cfg.best_of)
  return passes * batches(evaluator.engine, evaluator.evaluation_set)


def make_table(evaluator: Evaluator, found: Sequence[PredictionSet]) -> ResultTable:
  """The table of all columns, with notes about the baselines."""
  tasks = evaluator.evaluation_set.tasks
  without = {t.question_type for t in tasks} - {t.question_type for t in evaluator.examples}
  notes = []
  if without:
    notes.append(f"No training question gives a median answer for: {', '.join(sorted(without))}.")
  if {t.task_id for t in evaluator.examples} >= {t.task_id for t in tasks}:
    notes.append("The median answers are those of these very questions: the best constants.")
  keys = {s.column.key for s in found}
  if results.START_FITTED in keys:
    notes.append(
      "The fitted factor is one constant per question type, cross-fitted with the true answers: "
      "what the end gains over it is more than a calibration of scale."
    )
  if results.START_BEST_TEMPERATURE in keys:
    notes.append(
      "The best temperature was chosen on these questions, which favours the start: what the "
      "sampled end gains over it is more than sharpening."
    )
  return result_table(found, evaluator.evaluation_set.sharpness, notes)


def gallery(evaluator: Evaluator, found: Sequence[PredictionSet]) -> list[SavedGroup]:
  """Rollouts for the report: greedy and sampled answers to a few questions, drawings first."""
  engine, evaluation_set = evaluator.engine, evaluator.evaluation_set
  answers = next(s.predictions for s in found if s.column.key == results.END_GREEDY)
  tasks = gallery_tasks(
    evaluation_set.tasks, answers, min(evaluator.cfg.gallery, engine.cfg.prompts)
  )
  if not tasks:
    return []
  settings = [dataclasses.replace(engine.cfg.sampling, greedy=True), engine.cfg.sampling]
  prompts = [engine.conversation.prompt(task) for task in tasks]
  job = RolloutJob(prompts, evaluation_set.seed, 0, settings)
  rollouts = generate_rollouts(engine, evaluator.policies.end, job)
  scores = score(rollouts, tasks, evaluation_set.reward, evaluation_set.sharpness)
  return make_saved_groups(prompts, rollouts, scores, None, None, greedy=(True, False))


def gallery_tasks(
  tasks: Sequence[Task], predictions: Sequence[Prediction], count: int
) -> list[Task]:
  """`count` tasks, question types in turn, those with drawings first."""
  drawn = [any(turn.produced for turn in prediction.turns) for prediction in predictions]
  order = sorted(range(len(tasks)), key=lambda i: not drawn[i])
  return interleave_types([tasks[i] for i in order])[:count]


def behaviours(found: Sequence[PredictionSet]) -> dict[str, dict[str, float]]:
  """Column key -> statistics, of the columns that a policy answered."""
  baselines_ = (results.MEDIAN, results.START_FITTED)
  return {s.column.key: behaviour(s.predictions) for s in found if s.column.key not in baselines_}


def write(
  workdir: pathlib.Path,
  found: Sequence[PredictionSet],
  table: ResultTable,
  fingerprint: dict[str, Any],
) -> None:
  """Writes results.json and predictions.jsonl.

  Args:
    workdir: created if missing.
    found: all columns.
    table: made of them.
    fingerprint: command, config, seed, ...: JSON values that reproduce the table.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  more = {
    "origin": fingerprint,
    "behaviour": behaviours(found),
    "vsi_bench": {s.column.key: vsi_score(s.predictions) for s in found},
  }
  lines = [_json(s.column.key, prediction) for s in found for prediction in s.predictions]
  partial = workdir / f"{PREDICTIONS}.partial"
  partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  partial.replace(workdir / PREDICTIONS)
  write_results(table, workdir, more)


def _start_columns(
  evaluator: Evaluator, start: Params, on_batch: Callable[[], None]
) -> list[PredictionSet]:
  """The start policy, greedy first; of the other temperatures only the best one."""
  sampled, tasks = evaluator.engine.cfg.sampling, evaluator.evaluation_set.tasks
  temperatures = evaluator.cfg.temperatures
  settings = [dataclasses.replace(sampled, greedy=True), sampled]
  settings += [dataclasses.replace(sampled, temperature=t) for t in temperatures]
  greedy, usual, *tried = _answer(evaluator, start, tasks, settings, on_batch)
  columns = [
    _column(results.START_GREEDY, "start, greedy", greedy),
    _column(results.START_SAMPLED, "start, sampled", usual),
  ]
  candidates = [
    _column(results.START_BEST_TEMPERATURE, f"start, sampled at {t:g}", predictions)
    for t, predictions in zip(temperatures, tried, strict=True)
  ]
  if candidates:
    best = max(candidates, key=lambda s: comparison.values(s.predictions, "score").mean())
    columns.append(best)
  return columns


def _answer(
  evaluator: Evaluator,
  params: Params,
  tasks: Sequence[Task],
  sampling_params: Sequence[SamplingParams],
  on_batch: Callable[[], None],
) -> list[list[Prediction]]:
  evaluation_set = dataclasses.replace(evaluator.evaluation_set, tasks=tasks)
  return predict(evaluator.engine, params, evaluation_set, sampling_params, on_batch)


def _column(key: str, label: str, predictions: list[Prediction]) -> PredictionSet:
  return PredictionSet(ResultColumn(key, label), predictions)


def _json(column: str, prediction: Prediction) -> str:
  names = [f.name for f in dataclasses.fields(prediction) if f.name != "turns"]
  record = {"column": column} | {name: vars(prediction)[name] for name in names}
  return json.dumps(record | {"text": "\n".join(turn.text for turn in prediction.turns)})
