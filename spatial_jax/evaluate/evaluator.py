"""One evaluation: held-out questions, policies and baselines that answer them, the result table.

Source ─► EvaluationSet ─► PredictionSets (start, end, baselines, controls) ─► ResultTable
                    └──► a few groups of rollouts for the report
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from spatial_jax.config import check_field, check_whole
from spatial_jax.data.pipeline import PipelineConfig
from spatial_jax.data.source import Source
from spatial_jax.data.task_order import interleave_types
from spatial_jax.errors import DataError
from spatial_jax.evaluate import baselines, comparison, results
from spatial_jax.evaluate.behaviour import behaviour
from spatial_jax.evaluate.benchmarks.summary import heading, vsi_score, vsi_sentence
from spatial_jax.evaluate.comparison import PredictionSet, result_table
from spatial_jax.evaluate.console import progress, show
from spatial_jax.evaluate.pass_at_k import passes
from spatial_jax.evaluate.predictions import (
  EvaluationSet,
  Prediction,
  batches,
  most_likely_prediction,
  predict,
)
from spatial_jax.evaluate.results import PREDICTIONS, ResultColumn, ResultTable, write_results
from spatial_jax.reward.compose import score
from spatial_jax.reward.config import RewardConfig
from spatial_jax.reward.parse import check_truth
from spatial_jax.rollout.config import (
  TEMPERATURES,
  RolloutConfig,
  SamplingParams,
  is_temperature,
)
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.saved_groups import SavedGroup, make_saved_groups, save_groups
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.types import Params, Task, TrainState
from spatial_jax.workdir import write_text


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """The size of an evaluation."""

  tasks: int  # held-out questions; fewer if the source has fewer; 0: no evaluation after training
  progress_tasks: int  # of them, answered during training too; see `loop.evaluate_every`
  train_tasks: int  # questions of the training split, for the median answers
  # At which the start alone is sampled too: what a lower temperature gives without training.
  temperatures: tuple[float, ...]
  best_of: int  # samples of the end policy, of which the most likely one counts; 0: none
  pass_at: int  # samples of the end policy for pass@1 to pass@`pass_at`; 0: none
  other_images: bool  # both policies also answer with the images of another scene
  prompts: int  # questions per call of the rollout engine
  slots: int  # of them, worked on at once
  gallery: int  # questions whose rollouts are saved for the report

  def __post_init__(self):
    check_whole(self, "progress_tasks", "train_tasks", "prompts", "slots", at_least=1)
    check_whole(self, "tasks", "best_of", "pass_at", "gallery", at_least=0)
    rule = f"be at most tasks, {self.tasks}"
    fits = self.progress_tasks <= self.tasks or not self.tasks
    check_field(self, "progress_tasks", fits, rule)
    valid = all(map(is_temperature, self.temperatures))
    check_field(self, "temperatures", valid, f"have values that each {TEMPERATURES}")


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
  """Everything that an evaluation needs."""

  engine: Engine  # of shapes from `evaluation_rollout_config`
  start: Params | None  # decode parameters of the policy to compare with; None without one
  end: Params
  evaluation_set: EvaluationSet
  cfg: EvaluationConfig
  pipeline: PipelineConfig  # makes prompts in the background


def load_questions(
  source: Source, cfg: EvaluationConfig, reward: RewardConfig, seed: int
) -> EvaluationSet:
  """The questions of an evaluation; `seed` also chooses the examples for the median answers.

  Raises:
    DataError: if the source has no held-out question, or a truth cannot be read.
  """
  tasks = source.held_out(cfg.tasks)
  for task in tasks:
    check_truth(task)
  if not tasks:
    raise DataError("the source has no held-out question; see config.source")
  # Baselines read answers alone; the media of thousands of examples would fill the memory.
  examples = [
    dataclasses.replace(task, media=(), boxes=()) for task in source.examples(seed, cfg.train_tasks)
  ]
  return EvaluationSet(tasks, examples, reward, seed)


def progress_evaluation(
  engine: Engine,
  decode_params: Callable[[Params], Params],
  tasks: Sequence[Task],
  reward: RewardConfig,
  seed: int,
  pipeline: PipelineConfig,
) -> Callable[[TrainState], dict[str, float]]:
  """A function: train state -> mean score of greedy answers to held-out tasks, and share parsed.

  `decode_params`: train parameters -> parameters on the rollout mesh.
  """
  evaluation_set = EvaluationSet(tasks, (), reward, seed)
  greedy = dataclasses.replace(engine.cfg.sampling, greedy=True)

  def evaluate(state: TrainState) -> dict[str, float]:
    (answers,) = predict(engine, decode_params(state.params), evaluation_set, [greedy], pipeline)
    valid = [answer for answer in answers if answer.valid] or answers
    return {
      "held_out_score": sum(answer.score for answer in valid) / len(valid),
      "held_out_parsed": sum(answer.parsed for answer in valid) / len(valid),
    }

  return evaluate


def evaluation_rollout_config(
  rollout: RolloutConfig, cfg: EvaluationConfig, questions: int, has_start: bool
) -> RolloutConfig:
  """The rollout shapes of an evaluation: one rollout per question and sampling setting.

  Args:
    rollout: of training: limits, temperature, buckets.
    cfg: the size.
    questions: number of questions.
    has_start: whether there is a start policy, which is sampled at several temperatures.
  """
  prompts = min(cfg.prompts, questions)
  group = max(2 + len(cfg.temperatures) if has_start else 2, cfg.best_of, cfg.pass_at)
  slots = min(cfg.slots, prompts)
  rows = min(rollout.rows, slots * group)
  return dataclasses.replace(rollout, prompts=prompts, slots=slots, group=group, rows=rows)


def run_evaluation(
  evaluator: Evaluator,
  workdir: pathlib.Path,
  trained_on: str | None,
  fingerprint: dict[str, Any],
  console: Console,
) -> list[PredictionSet]:
  """Answers all questions, writes rollouts, predictions and results.json, and prints the table.

  Args:
    evaluator: questions and policies.
    workdir: created if missing.
    trained_on: benchmark whose rooms the policy was trained on, None without one.
    fingerprint: command, config, seed, ...: JSON values that reproduce the table.
    console: for progress and table.
  """
  with progress(console, count_batches(evaluator)) as on_batch:
    found = list(prediction_sets(evaluator, on_batch))
    passed = end_passes(evaluator, on_batch)
    save_groups(gallery(evaluator, found), workdir)
  table, above = make_table(evaluator, found), heading(evaluator.evaluation_set.tasks, trained_on)
  write(workdir, found, table, fingerprint | {"benchmark": above}, passed)
  show(table, above, console)
  if passed:
    shown = ", ".join(f"{name} {value:.3f}" for name, value in passed.items())
    console.print(f"end, sampled: {shown}", markup=False)
  return found


def prediction_sets(evaluator: Evaluator, on_batch: Callable[[], None]) -> Iterator[PredictionSet]:
  """All columns of the table in the order of `results.LABELS`; `on_batch`: as in `predict`."""
  questions, engine, cfg = evaluator.evaluation_set, evaluator.engine, evaluator.cfg
  sampled, (start, end) = engine.cfg.sampling, (evaluator.start, evaluator.end)
  greedy = dataclasses.replace(sampled, greedy=True)
  others = _with_other_images(evaluator)

  def answer(
    params: Params, settings: Sequence[SamplingParams], asked: EvaluationSet = questions
  ) -> list[list[Prediction]]:
    return predict(engine, params, asked, settings, evaluator.pipeline, on_batch)

  def column(key: str, predictions: Sequence[Prediction], detail: str = "") -> PredictionSet:
    label = results.LABELS[key].format(detail)
    label = label.removeprefix("end, ") if start is None else label
    return PredictionSet(ResultColumn(key, label), predictions)

  start_greedy: list[Prediction] = []
  if start is not None:
    cooler = [dataclasses.replace(sampled, temperature=t) for t in cfg.temperatures]
    start_greedy, usual, *tried = answer(start, [greedy, sampled, *cooler])
    yield column(results.START_GREEDY, start_greedy)
    yield column(results.START_SAMPLED, usual)
    if tried:
      means = [comparison.values(predictions, "score").mean() for predictions in tried]
      best = means.index(max(means))
      detail = f"{cfg.temperatures[best]:g}"
      yield column(results.START_BEST_TEMPERATURE, tried[best], detail)
  end_greedy, end_sampled = answer(end, [greedy, sampled])
  yield column(results.END_GREEDY, end_greedy)
  yield column(results.END_SAMPLED, end_sampled)
  if cfg.best_of:
    samples = answer(end, [sampled] * cfg.best_of)
    yield column(results.END_BEST_OF_N, most_likely_prediction(samples), str(cfg.best_of))
  constants = baselines.constant_answers(questions.examples)
  yield column(results.MEDIAN, baselines.predict_constant(questions, constants))
  if start is not None:
    fitted = baselines.predict_fitted_factor(questions, start_greedy)
    yield column(results.START_FITTED, fitted)
  if others is not None:
    if start is not None:
      yield column(results.START_OTHER_IMAGE, answer(start, [greedy], others)[0])
    yield column(results.END_OTHER_IMAGE, answer(end, [greedy], others)[0])


def count_batches(evaluator: Evaluator) -> int:
  """The number of batches of questions of `prediction_sets`."""
  policies = 1 + (evaluator.start is not None)
  passes = policies * (1 + (_with_other_images(evaluator) is not None))
  passes += (evaluator.cfg.best_of > 0) + (evaluator.cfg.pass_at > 0)
  return passes * batches(evaluator.engine, evaluator.evaluation_set)


def end_passes(evaluator: Evaluator, on_batch: Callable[[], None]) -> dict[str, float]:
  """pass@k of the end policy; {} if not asked for."""
  engine, cfg = evaluator.engine, evaluator.cfg
  if not cfg.pass_at:
    return {}
  settings = [engine.cfg.sampling] * cfg.pass_at
  questions = evaluator.evaluation_set
  return passes(predict(engine, evaluator.end, questions, settings, evaluator.pipeline, on_batch))


def make_table(evaluator: Evaluator, found: Sequence[PredictionSet]) -> ResultTable:
  """The table of all columns, with notes about the baselines."""
  questions = evaluator.evaluation_set
  tasks, examples = questions.tasks, questions.examples
  without = {t.question_type for t in tasks} - {t.question_type for t in examples}
  notes = []
  if without:
    notes.append(f"No training question gives a median answer for: {', '.join(sorted(without))}.")
  if {t.task_id for t in examples} >= {t.task_id for t in tasks}:
    notes.append("The median answers are those of these very questions: the best constants.")
  if official := vsi_sentence({s.column.label: s.predictions for s in found}):
    notes.append(official)
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
  if "attention" in questions.reward.active:
    notes.append("The reward leaves out attention, which only training measures.")
  return result_table(found, questions.sharpness, notes, questions.scoring.score_name)


def gallery(evaluator: Evaluator, found: Sequence[PredictionSet]) -> list[SavedGroup]:
  """Rollouts for the report: answers of both policies to a few questions, drawings first."""
  engine, questions = evaluator.engine, evaluator.evaluation_set
  keys = (results.START_GREEDY, results.END_GREEDY, results.END_SAMPLED)
  answers = [s.predictions for s in found if s.column.key in keys]
  count = min(evaluator.cfg.gallery, engine.cfg.prompts)
  tasks = gallery_tasks(questions.tasks, answers, count)
  if not tasks:
    return []
  sampled = engine.cfg.sampling
  greedy = dataclasses.replace(sampled, greedy=True)
  prompts = [engine.conversation.prompt(task) for task in tasks]
  job = RolloutJob(prompts, questions.seed, 0, [greedy, sampled])
  names = [results.LABELS[results.END_GREEDY], results.LABELS[results.END_SAMPLED]]
  rollouts = generate_rollouts(engine, evaluator.end, job)
  if evaluator.start is None:
    names = [name.removeprefix("end, ") for name in names]
  else:
    start_job = dataclasses.replace(job, sampling_params=[greedy])
    before = generate_rollouts(engine, evaluator.start, start_job)
    names = [results.LABELS[results.START_GREEDY], *names]
    rollouts = [[*first, *then] for first, then in zip(before, rollouts, strict=True)]
  scores = score(rollouts, tasks, questions.scoring, questions.sharpness)
  return make_saved_groups(prompts, rollouts, scores, names=names)


def gallery_tasks(
  tasks: Sequence[Task], answers: Sequence[Sequence[Prediction]], count: int
) -> list[Task]:
  """`count` tasks without a fault, types in turn, those with a drawing in an answer first."""
  rows = list(zip(*answers, strict=True))
  drawn = [any(turn.produced for prediction in row for turn in prediction.turns) for row in rows]
  valid = [i for i, row in enumerate(rows) if all(prediction.valid for prediction in row)]
  order = sorted(valid, key=lambda i: not drawn[i])
  return interleave_types([tasks[i] for i in order])[:count]


def behaviours(found: Sequence[PredictionSet]) -> dict[str, dict[str, float]]:
  """Column key -> statistics, of the columns that a policy answered."""
  constant = (results.MEDIAN, results.START_FITTED)
  return {s.column.key: behaviour(s.predictions) for s in found if s.column.key not in constant}


def write(
  workdir: pathlib.Path,
  found: Sequence[PredictionSet],
  table: ResultTable,
  fingerprint: dict[str, Any],
  passed: dict[str, float],
) -> None:
  """Writes predictions.jsonl and results.json.

  Args:
    workdir: created if missing.
    found: the answers of every column.
    table: their statistics.
    fingerprint: as in `run_evaluation`.
    passed: name ("pass@8") -> estimate of the policy at the end; empty if not asked for.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  lines = [_json(s.column.key, prediction) for s in found for prediction in s.predictions]
  write_text(workdir / PREDICTIONS, "".join(f"{line}\n" for line in lines))
  more = {
    "origin": fingerprint,
    "behaviour": behaviours(found),
    "pass_at": passed,
    "vsi_bench": {s.column.key: vsi_score(s.predictions) for s in found},
  }
  write_results(table, workdir, more)


def _with_other_images(evaluator: Evaluator) -> EvaluationSet | None:
  """The questions with images of other scenes; None if not asked for, or if a task has none."""
  questions = evaluator.evaluation_set
  tasks = baselines.other_image_tasks(questions.tasks) if evaluator.cfg.other_images else None
  return None if tasks is None else dataclasses.replace(questions, tasks=tasks)


def _json(column: str, prediction: Prediction) -> str:
  names = [f.name for f in dataclasses.fields(prediction) if f.name != "turns"]
  record = {"column": column} | {name: vars(prediction)[name] for name in names}
  return json.dumps(record | {"text": "\n".join(turn.text for turn in prediction.turns)})
