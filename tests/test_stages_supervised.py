"""Steps of SFT and DPO of a small policy: any mesh, any interruption, few compilations."""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import tiny_defaults
from spatial_jax import compiled, metrics
from spatial_jax.compiled import PackedPrograms
from spatial_jax.config import build
from spatial_jax.data.files import FilesConfig, open_files
from spatial_jax.data.pipeline import PipelineConfig
from spatial_jax.data.source import prompt_stream
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.drawing.parser import WIDE_LIMITS
from spatial_jax.errors import CheckpointError, DataError
from spatial_jax.learn.dpo import DpoLossConfig
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.learn.packing import PackConfig, rows_of
from spatial_jax.learn.train_batch import Microbatches
from spatial_jax.metrics import LogConfig
from spatial_jax.policy import param_tree
from spatial_jax.reward.parse import check_truth
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.demonstration import Demonstrator, SequenceLimits
from spatial_jax.stages import loop
from spatial_jax.stages.demonstrations import DemonstrationSizes, limits_of, shapes_of
from spatial_jax.stages.dpo import REFERENCE, DpoStage
from spatial_jax.stages.loop import LoopConfig
from spatial_jax.stages.sft import ImitationConfig, SftStage
from spatial_jax.supervised import read_files
from spatial_jax.train_config import TrainConfig
from spatial_jax.types import DemonstratedTurn, TrainState
from tests import step_fixtures
from tests.reward_fixtures import answering
from tests.rollout_fixtures import STYLE
from tests.row_fixtures import jpeg, save_rows
from tests.test_sharded import COMPILED

ROWS, BATCH, STEPS = 16, 4, 4  # a pass is four steps
FILES = FilesConfig((), "", 0.0, (), "shuffled", 0.0, True)
NOW = PipelineConfig(workers=0, steps_ahead=1)
# Some parameters are trained, which compiles faster than all.
FROZEN = ("^vision/", "^decoder/layers/(attn|mlp_norm)")
OPTIMIZER = dataclasses.replace(step_fixtures.OPTIMIZER, frozen=FROZEN)
TOKENS = 224  # of a row: one long demonstration, or two short ones
SHAPES = PackConfig(
  TOKENS, (4, 8), True, VisionBuckets((32,), (16,), (64,)), 2, step_fixtures.VOCABULARY
)
SFT = ImitationConfig(STEPS, BATCH, TOKENS, 1, True, OPTIMIZER, normalise="token")
SIZES = SequenceLimits(TOKENS, 32, 16, 64)  # of one demonstration
LOSS = DpoLossConfig("sigmoid", 0.5, 0.0)
KINDS = ("sft", "dpo")
LONG = "3 m, behind the table and the lamp"


def rows(folder):
  """A file of pairs of right and wrong answers, each about an image of its own."""
  made = []
  for number in range(ROWS):
    (folder / f"{number}.jpg").write_bytes(jpeg(number, 24, 24))
    made.append(
      {
        "id": f"row-{number}", "question": "How far is the chair?", "answer": number + 1,
        "unit": "m", "images": [f"{number}.jpg"], "scene": f"room-{number}",
        "turns": [answering(f"{number + 1} m")], "rejected": [answering(f"{number + 40} m")],
      }
    )  # fmt: skip
  return made


def source_of(folder):
  return open_files([folder / "rows.jsonl"], FILES, check_truth)


class Lab(NamedTuple):
  """Programs on one mesh, the start, and the stages of a folder of data."""

  programs: PackedPrograms
  state: TrainState  # never donated: see `fresh`
  demonstrator: Demonstrator
  data: Any  # folder

  def fresh(self) -> TrainState:
    return jax.tree.map(jnp.copy, self.state)

  def stream(self, kind, first, seed=0):
    encode = self.demonstrator.pair if kind == "dpo" else self.demonstrator
    return prompt_stream(source_of(self.data), encode, seed, first, BATCH, NOW)

  def sft(self, programs=None) -> SftStage:
    stream = functools.partial(self.stream, "sft")
    return SftStage(programs or self.programs, stream, SFT, SHAPES)

  def dpo(self, workdir, programs=None) -> DpoStage:
    stream = functools.partial(self.stream, "dpo")
    return DpoStage(programs or self.programs, stream, SHAPES, STEPS, workdir)

  def stage(self, kind, workdir, programs=None):
    """A stage of which no reference need be scored any more."""
    if kind == "sft":
      return self.sft(programs)
    stage = self.dpo(workdir, programs)
    if not (workdir / REFERENCE).exists():
      stage.score_reference(self.state.params)
    return stage


def lab_on(data, fsdp, tensor, folder):
  setup = step_fixtures.step_setup(data, fsdp, tensor)
  policy = dataclasses.replace(setup.policy, frozen=FROZEN)
  optimizer = make_optimizer(OPTIMIZER)
  conversation: Conversation = setup.engine.conversation
  demonstrator = Demonstrator(conversation, STYLE, WIDE_LIMITS, None, SIZES)
  programs = compiled.PackedPrograms(policy, optimizer, Microbatches(1, (TOKENS,)), LOSS)
  state = compiled.init_state(policy, optimizer, setup.state.params, setup.mesh)
  return Lab(programs, state, demonstrator, folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  save_rows(folder / "rows.jsonl", rows(folder))
  return folder


@pytest.fixture(scope="module")
def lab(data):
  yield lab_on(1, 1, 1, data)
  jax.clear_caches()  # no other test uses these shapes


@pytest.fixture(scope="module")
def eight(data):
  return lab_on(2, 2, 2, data)


def steps_of(stage, state, first, count):
  """(state, metrics of each step)."""
  step, found = stage.step_function(first), []
  for number in range(first, first + count):
    state, values = step(state, number)
    found.append({name: float(value) for name, value in values.items()})
  return state, found


def demonstrations(lab, text, count, first=0):
  """Of some tasks, with a text of their own."""
  tasks = source_of(lab.data).batch(0, first, count)
  turns = (DemonstratedTurn(answering(text), None, None),)
  return [lab.demonstrator(dataclasses.replace(task, turns=turns)) for task in tasks]


# --- data ----------------------------------------------------------------------------------------


class Placed:
  """Programs that keep the batches they are given."""

  def __init__(self):
    self.batches = []

  def place(self, batch):
    self.batches.append(batch)
    return batch

  def sft(self, state, batch):
    return state, {}


class Stub:
  """Programs of DPO that compute nothing."""

  def place(self, batch):
    return batch

  def dpo(self, state, batch, ref_logp_N):
    return state, {}


def answers(batch):
  """The sampled tokens of each sequence of a batch, sorted."""
  rows = batch.rows
  parts = [rows.sequence_RT == n for n in range(BATCH)]
  return sorted(tuple(rows.tokens.token_RT[part & rows.trained_RT]) for part in parts)


def test_every_demonstration_is_read_once_per_pass_in_an_order_of_the_seed(lab):
  programs = Placed()
  steps_of(lab.sft(programs), None, 0, 8)
  first, second = ([answers(batch) for batch in programs.batches[i : i + 4]] for i in (0, 4))
  for one in (first, second):
    assert len({text for batch in one for text in batch}) == ROWS
  assert first != second, "each pass has another order"
  names = [
    [t.task_id for batch, _ in zip(lab.stream("sft", 0, seed), range(4), strict=False)
     for t in batch.prompts]
    for seed in (0, 0, 1)
  ]  # fmt: skip
  assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("step", [1, 3, 6])
def test_the_batch_of_a_step_is_the_same_wherever_the_run_begins(lab, step):
  straight, resumed = Placed(), Placed()
  steps_of(lab.sft(straight), None, 0, step + 1)
  steps_of(lab.sft(resumed), None, step, 1)
  jax.tree.map(np.testing.assert_array_equal, straight.batches[-1], resumed.batches[0])


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_tokens_or_demonstrations_have_equal_weights(lab, normalise):
  found = [*demonstrations(lab, "1 m", 2), *demonstrations(lab, LONG, 1, 2)]
  programs = Placed()
  stage = dataclasses.replace(lab.sft(programs), cfg=dataclasses.replace(SFT, normalise=normalise))
  stage.step(None, found)
  rows = programs.batches[0].rows
  weights = [rows.weight_RT[rows.trained_RT & (rows.sequence_RT == n)] for n in range(3)]
  compared = np.concatenate(weights) if normalise == "token" else [x.sum() for x in weights]
  np.testing.assert_allclose(compared, 1 / len(compared), rtol=1e-5)


def test_a_stage_whose_rows_are_all_held_out_is_refused(tmp_path):
  (tmp_path / "0.jpg").write_bytes(jpeg(0))
  row = {"question": "How far, in meters?", "answer": 2.4, "images": ["0.jpg"], "split": "held_out"}
  path = save_rows(tmp_path / "held.jsonl", [row])
  cfg = build(TrainConfig, dict(tiny_defaults.get_config()))
  with pytest.raises(DataError, match=r"held\.jsonl has no training task; see the split"):
    read_files(cfg, str(path))


def test_a_larger_image_than_was_measured_is_skipped_counted_and_named_once(lab, tmp_path, capsys):
  """Whether the run begins or resumes; the other rows train."""
  made = rows(tmp_path)
  (tmp_path / "5.jpg").write_bytes(jpeg(5, 60, 60))
  save_rows(tmp_path / "rows.jsonl", made)
  for first in (0, 2):
    programs = Placed()
    _, found = steps_of(lab._replace(data=tmp_path).sft(programs), None, first, 8)
    assert sum(values["replaced_tasks"] for values in found) == 2, "in each of two passes"
    assert all(len(answers(batch)) == BATCH for batch in programs.batches)
    printed = capsys.readouterr().out
    assert printed.count("replaced by another task: task row-5: its demonstration has") == 1


@settings(deadline=None, max_examples=50)
@given(
  st.lists(st.tuples(*(st.integers(1, n) for n in (400, 20, 9))), min_size=1, max_size=9),
  st.integers(1, 9),
  st.booleans(),
)
def test_sequences_that_are_accepted_fit_together(sizes, sequences, pack):
  tokens, windows, frames = zip(*sizes, strict=True)
  cfg = dataclasses.replace(SFT, tokens=None, pack=pack)
  measured = DemonstrationSizes(tokens, windows, frames, 36)
  shapes = shapes_of(cfg, measured, sequences, 2, step_fixtures.step_config())
  most = limits_of(shapes, sequences)
  assert most.tokens >= max(tokens)
  assert most.windows >= max(windows)
  assert most.frames >= max(frames)
  placed = rows_of([most.tokens] * sequences, shapes.tokens if pack else 0)
  assert len(placed) <= shapes.rows[-1]
  assert sequences * most.windows <= shapes.vision.windows[-1]
  assert sequences * most.frames <= shapes.vision.frames[-1]


# --- steps ---------------------------------------------------------------------------------------


@pytest.mark.slow(always=True)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_eight_devices_take_the_steps_of_one(lab, eight, kind, tmp_path):
  states, values, references = [], [], []
  for name, one in (("one", lab), ("eight", eight)):
    (tmp_path / name).mkdir()
    state, found = steps_of(one.stage(kind, tmp_path / name), one.fresh(), 0, 2)
    states.append(jax.tree.map(np.array, state.params))
    values.append(found)
    path = tmp_path / name / REFERENCE
    references.append(
      [json.loads(x) for x in path.read_text().splitlines()] if kind == "dpo" else 0
    )
  np.testing.assert_allclose(*references, rtol=1e-6)
  for one, other in zip(*values, strict=True):
    assert one == pytest.approx(other, rel=1e-4, abs=1e-4)  # sums of 50 log-probabilities
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5), *states)
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), states[0], lab.state.params)
  for path, size in param_tree.flatten(moved).items():
    assert (size > 1e-4) != param_tree.matches(path, FROZEN), path


def run(lab, kind, workdir, steps, programs=None):
  """A run of the loop, from its last checkpoint on."""
  cfg = LoopConfig(steps, 2, 0, 2, LogConfig(False, False))
  step_of = lab.stage(kind, workdir, programs).step_function
  return loop.run(workdir, cfg, kind, lab.fresh(), step_of, None, None, {})


def losses(workdir):
  return [record["loss"] for record in metrics.read(workdir)]


class NoReference:
  """The programs of a resumed run: the start is not there any more."""

  def __init__(self, programs):
    self.place, self.sft, self.dpo = programs.place, programs.sft, programs.dpo

  def sequence_logprobs(self, *_):
    raise AssertionError("the reference is scored once")


@pytest.mark.parametrize("kind", ["dpo", pytest.param("sft", marks=pytest.mark.slow(always=True))])
def test_a_resumed_run_is_the_straight_run_bit_for_bit(lab, kind, tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  for workdir in (whole, parts):
    workdir.mkdir()
  expected = run(lab, kind, whole, STEPS)
  run(lab, kind, parts, 2)
  found = run(lab, kind, parts, STEPS, NoReference(lab.programs))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert losses(parts) == losses(whole)
  assert len(set(losses(whole))) == STEPS


def test_one_program_is_compiled_for_each_number_of_rows(lab):
  """However long and however many the demonstrations are that fill these rows."""
  stage, state, shown = lab.sft(), lab.fresh(), Placed()

  def step(state, text, count, first):
    found = demonstrations(lab, text, count, first)
    lab.sft(shown).step(None, found)
    return stage.step(state, found)[0]

  state = step(state, "1 m", 8, 0)
  state = step(state, LONG, 8, 0)
  assert [batch.rows.trained_RT.shape[0] for batch in shown.batches] == [4, 8]
  COMPILED.clear()
  for text, count in (("12 m", 7), (LONG, 3), ("3.25 m", 3), (LONG + "so far", 7), (LONG, 5)):
    state = step(state, text, count, 1)
  assert {batch.rows.trained_RT.shape[0] for batch in shown.batches} == {4, 8}
  assert COMPILED["jit(_sft)"] == 0


# --- the reference of DPO ------------------------------------------------------------------------


def test_the_first_step_of_dpo_has_the_loss_of_a_coin(lab, tmp_path):
  """The reference is the policy itself; both were computed by different programs."""
  _, found = steps_of(lab.stage("dpo", tmp_path), lab.fresh(), 0, 2)
  assert found[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
  assert found[0]["margin"] == pytest.approx(0, abs=1e-4)
  assert abs(found[1]["loss"] - np.log(2)) > 1e-3, "of other pairs, after one update"


def test_the_reference_has_a_line_per_step_and_is_scored_once(lab, tmp_path):
  """A run that was stopped before its first checkpoint reads the file again."""
  lab.stage("dpo", tmp_path)
  text = (tmp_path / REFERENCE).read_text()
  lines = [json.loads(line) for line in text.splitlines()]
  assert [len(line) for line in lines] == [1 + 2 * BATCH] * STEPS
  lab.dpo(tmp_path, NoReference(lab.programs)).score_reference(lab.state.params)
  assert (tmp_path / REFERENCE).read_text() == text


def changed(folder, data, row):
  """A copy of the data with another row 3."""
  made = rows(folder)
  made[3] |= row
  save_rows(folder / "rows.jsonl", made)
  return folder


OTHER_ROWS = (
  {"rejected": [answering("77 m")]},
  {"turns": [answering("5 m")]},
  {"images": ["4.jpg"]},
)


@pytest.mark.parametrize("row", OTHER_ROWS, ids=lambda row: next(iter(row)))
def test_data_that_changed_after_the_reference_was_scored_is_refused(lab, tmp_path, row):
  workdir = tmp_path / "run"
  workdir.mkdir()
  lab.stage("dpo", workdir)
  other = lab._replace(data=changed(tmp_path, lab.data, row))
  stage = dataclasses.replace(other.dpo(workdir), programs=Stub())
  with pytest.raises(CheckpointError, match=r"other pairs in step \d, .*; use a new --workdir"):
    steps_of(stage, None, 0, STEPS)
  same = dataclasses.replace(lab.dpo(workdir), programs=Stub())
  assert len(steps_of(same, None, 0, STEPS)[1]) == STEPS


def test_a_step_beyond_the_reference_is_refused(lab, tmp_path):
  lab.stage("dpo", tmp_path)
  longer = dataclasses.replace(lab.dpo(tmp_path), programs=Stub())
  with pytest.raises(CheckpointError, match=f"other pairs in step {STEPS}, or none"):
    steps_of(longer, None, STEPS, 1)
