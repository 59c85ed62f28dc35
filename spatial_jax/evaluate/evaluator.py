"""An exam from questions to table: who is asked, in which ways, and what is kept of it.

Source ─► EvaluationSet ─► Sheets (sampled, greedy, cooler, on grey; median answer) ─► table
             └──► a few groups of rollouts for the report
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import Progress

from spatial_jax.data.pipeline import types_in_turn
from spatial_jax.data.source import Source
from spatial_jax.errors import DataError
from spatial_jax.evaluate import comparison as table_lib
from spatial_jax.evaluate.behaviour import behaviour
from spatial_jax.evaluate.benchmarks.summary import heading, vsi_score
from spatial_jax.evaluate.comparison import PredictionSet
from spatial_jax.evaluate.console import show
from spatial_jax.evaluate.predictions import (
  EvaluationSet,
  Prediction,
  baseline_answers,
  baseline_predictions,
  best_of,
  calls,
  evaluate_policy,
)
from spatial_jax.evaluate.results import ResultColumn, ResultTable, write_results
from spatial_jax.reward.compose import RewardConfig, score
from spatial_jax.reward.snra import sharpness
from spatial_jax.rollout.config import RolloutConfig, SamplingParams
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.saved_groups import Group, groups_of
from spatial_jax.rollout.scheduler import generate_rollouts
from spatial_jax.types import Params, Task

PREDICTIONS = "predictions.jsonl"


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
  """How much is asked.

  Attributes:
    tasks: held-out questions; fewer where the source has fewer.
    train_tasks: questions that the median answer per type is taken from.
    temperatures: below that of sampling, tried on the start of training to measure sharpening.
    best_of: samples of which the likeliest counts, as one more way of answering; 0: no such way.
    prompts: questions per call of the engine.
    slots: of them, worked on at once.
    gallery: questions whose rollouts are kept for the report.
    required: the differences must come out as promised for the default run; false: only shown,
      as they are where there is no start to compare with.
  """

  tasks: int
  train_tasks: int
  temperatures: tuple[float, ...]
  best_of: int
  prompts: int
  slots: int
  gallery: int
  required: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
  """Held-out tasks, and others that the median answer of each type is taken from."""

  asked: Sequence[Task]
  examples: Sequence[Task]


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluator:
  """Everything an exam needs.

  Attributes:
    engine: a rollout per prompt in each of the modes.
    before, after: decode parameters; before is None when there is nothing to compare with.
    exam: questions and marks.
    examples: tasks the median answers are taken from.
    cfg: how much is asked.
  """

  engine: Engine
  before: Params | None
  after: Params
  evaluation_set: EvaluationSet
  examples: Sequence[Task]
  cfg: EvaluationConfig


def load_questions(source: Source, cfg: EvaluationConfig, seed: int) -> Questions:
  """The questions of an exam; `seed` chooses those that median answers are taken from.

  Raises:
    DataError: on the host, when there is no question.
  """
  asked = source.held_out(cfg.tasks)
  if not asked:
    raise DataError("the source gives no question; loosen source.questions or see source.path")
  return Questions(asked, source.examples(seed, cfg.train_tasks))


def evaluation_rollout_config(
  rollout: RolloutConfig, cfg: EvaluationConfig, compared: bool
) -> RolloutConfig:
  """Shapes of an exam: a rollout for each question in each mode.

  Args:
    rollout: of training: limits, temperature, buckets.
    cfg: how much is asked.
    compared: whether there is a policy to compare with, which is asked in more modes.
  """
  prompts = min(cfg.prompts, cfg.tasks)
  group = max(2 + len(cfg.temperatures) if compared else 2, cfg.best_of)
  slots = min(cfg.slots, prompts)
  rows = min(rollout.rows, slots * group)
  return dataclasses.replace(rollout, prompts=prompts, slots=slots, group=group, rows=rows)


def make_evaluator(
  engine: Callable[[RolloutConfig], Engine],
  rollout: RolloutConfig,
  questions: Questions,
  reward: RewardConfig,
  cfg: EvaluationConfig,
  seed: int,
  before: Params | None,
  after: Params,
) -> Evaluator:
  """Held-out questions, and an engine that answers each in every mode.

  Args:
    engine: makes one for such a configuration.
    rollout: as in `evaluation_rollout_config`.
    questions: from `load_questions`.
    reward: taken at the sharpness of the schedule's end.
    cfg: how much is asked.
    seed: of sampling.
    before, after: as in `Evaluator`.
  """
  evaluation_set = EvaluationSet(
    questions.asked, reward, float(sharpness(1.0, reward.schedule)), seed
  )
  few = dataclasses.replace(cfg, tasks=len(questions.asked))  # there may be less than was asked for
  asking = evaluation_rollout_config(rollout, few, compared=before is not None)
  return Evaluator(engine(asking), before, after, evaluation_set, questions.examples, cfg)


def hold(
  contest: Evaluator,
  workdir: pathlib.Path,
  benchmark: str | None,
  origin: dict[str, Any],
  console: Console,
) -> list[PredictionSet]:
  """Asks in every way, writes results.json and predictions.jsonl, and shows the table.

  Args:
    contest: questions and who answers.
    workdir: of the results.
    benchmark: whose rooms the policy was trained on, None when on nobody's.
    origin: as in `write`.
    console: where progress and table go.
  """
  with Progress(console=console, transient=True) as bar:
    asking = bar.add_task("asking", total=count_calls(contest))
    found = list(prediction_sets(contest, lambda: bar.advance(asking)))
  table, above = make_table(contest, found), heading(contest.evaluation_set.tasks, benchmark)
  write(workdir, found, table, origin | {"benchmark": above})
  show(table, above, console)
  return found


def prediction_sets(contest: Evaluator, advance: Callable[[], None]) -> Iterator[PredictionSet]:
  """All ways of answering, one after another, in the order of the table's columns.

  Args:
    contest: questions and who answers.
    advance: called after each call of the engine.
  """
  engine, evaluation_set = contest.engine, contest.evaluation_set
  sampled = engine.cfg.sampling
  greedy = dataclasses.replace(sampled, greedy=True)

  def prediction_set(key: str, label: str, answers: list[Prediction]) -> PredictionSet:
    return PredictionSet(ResultColumn(key, label), answers)

  if contest.before is not None:
    temperatures = contest.cfg.temperatures
    sampling_params = [sampled, greedy, *(_at(sampled, t) for t in temperatures)]
    usual, best, *cooler = evaluate_policy(
      engine, contest.before, evaluation_set, sampling_params, False, advance
    )
    yield prediction_set(table_lib.START, "start, sampled", usual)
    yield prediction_set(table_lib.START_GREEDY, "start, greedy", best)
    tried = [
      prediction_set(table_lib.START_BEST, f"start, sampled at {t:g}", answers)
      for t, answers in zip(temperatures, cooler, strict=True)
    ]
    if tried:
      yield max(tried, key=lambda s: table_lib.values(s.answers, "score").mean())
  end = "" if contest.before is None else "end, "
  sampling_params = [sampled, greedy]
  usual, best = evaluate_policy(
    engine, contest.after, evaluation_set, sampling_params, False, advance
  )
  yield prediction_set(table_lib.END, f"{end}sampled", usual)
  yield prediction_set(table_lib.END_GREEDY, f"{end}greedy", best)
  if contest.cfg.best_of:
    often = [sampled] * contest.cfg.best_of
    samples = evaluate_policy(engine, contest.after, evaluation_set, often, False, advance)
    yield prediction_set(table_lib.END_BEST, f"{end}likeliest of {len(often)}", best_of(samples))
  typical = baseline_predictions(evaluation_set, baseline_answers(contest.examples))
  yield prediction_set(table_lib.MEDIAN, "median answer", typical)
  usual, best = evaluate_policy(
    engine, contest.after, evaluation_set, sampling_params, True, advance
  )
  yield prediction_set(table_lib.GREY, f"{end}sampled on grey", usual)
  yield prediction_set(table_lib.GREY_GREEDY, f"{end}greedy on grey", best)


def count_calls(contest: Evaluator) -> int:
  """How often `sheets` calls the engine: the start, the end, its best, and the end on grey."""
  ways = (contest.before is not None) + 2 + bool(contest.cfg.best_of)
  return ways * calls(contest.engine, contest.evaluation_set)


def make_table(contest: Evaluator, found: Sequence[PredictionSet]) -> ResultTable:
  """The table of all sheets."""
  untold = {t.question_type for t in contest.evaluation_set.tasks} - {
    t.question_type for t in contest.examples
  }
  notes = (
    [f"No example to take a median answer from: {', '.join(sorted(untold))}."] if untold else []
  )
  if {t.task_id for t in contest.examples} >= {t.task_id for t in contest.evaluation_set.tasks}:
    notes.append("The median answers come from the very questions: no constant does better.")
  required = contest.cfg.required and contest.before is not None
  return table_lib.result_table(found, contest.evaluation_set.sharpness, required, notes)


def gallery(contest: Evaluator, found: Sequence[PredictionSet]) -> list[Group]:
  """Rollouts to look at: greedy and sampled answers to a few questions, with drawings if any."""
  engine, evaluation_set = contest.engine, contest.evaluation_set
  answers = next(s.answers for s in found if s.column.key == table_lib.END_GREEDY)
  tasks = showcase(evaluation_set.tasks, answers, min(contest.cfg.gallery, engine.cfg.prompts))
  if not tasks:
    return []
  sampling_params = [dataclasses.replace(engine.cfg.sampling, greedy=True), engine.cfg.sampling]
  prompts = [engine.conversation.prompt(task) for task in tasks]
  rollouts = generate_rollouts(
    engine, contest.after, prompts, evaluation_set.seed, 0, sampling_params
  )
  scores = score(rollouts, tasks, evaluation_set.reward, evaluation_set.sharpness)
  return groups_of(prompts, rollouts, scores, None, None, greedy=(True, False))


def showcase(tasks: Sequence[Task], answers: Sequence[Prediction], count: int) -> list[Task]:
  """`count` tasks, question types in turn, those first in which something was drawn."""
  drawn = [any(turn.produced for turn in answered.turns) for answered in answers]
  order = sorted(range(len(tasks)), key=lambda i: not drawn[i])
  return types_in_turn([tasks[i] for i in order])[:count]


def behaviours(found: Sequence[PredictionSet]) -> dict[str, dict[str, float]]:
  """Column key -> statistics, of the sheets that a policy filled in."""
  return {s.column.key: behaviour(s.answers) for s in found if s.column.key != table_lib.MEDIAN}


def write(
  workdir: pathlib.Path, found: Sequence[PredictionSet], table: ResultTable, origin: dict[str, Any]
) -> None:
  """Writes results.json and predictions.jsonl.

  Args:
    workdir: made when missing.
    found: all sheets.
    table: made of them.
    origin: command, config, seed, ...: JSON values that say how to get the same table again.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  more = {
    "origin": origin,
    "behaviour": behaviours(found),
    "vsi_bench": {s.column.key: vsi_score(s.answers) for s in found},
  }
  lines = [_prediction(s.column.key, answered) for s in found for answered in s.answers]
  partial = workdir / f"{PREDICTIONS}.partial"
  partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  partial.replace(workdir / PREDICTIONS)
  write_results(table, workdir, more)


def _at(mode: SamplingParams, temperature: float) -> SamplingParams:
  return dataclasses.replace(mode, temperature=temperature)


def _prediction(column: str, answered: Prediction) -> str:
  names = [f.name for f in dataclasses.fields(answered) if f.name != "turns"]
  record = {"column": column} | {name: answered.__dict__[name] for name in names}
  return json.dumps(record | {"text": "\n".join(turn.text for turn in answered.turns)})
