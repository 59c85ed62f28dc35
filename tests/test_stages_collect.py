"""Rejection sampling: its report, an empty result, and what is not repeated."""

import contextlib
import dataclasses
import functools
import itertools
import json
import types
from typing import Any

import jax
import numpy as np
import pytest

from configs import tiny_defaults
from spatial_jax import compiled, sharding, train_config
from spatial_jax import supervised as supervised_lib
from spatial_jax.config import build
from spatial_jax.data.files import FilesConfig
from spatial_jax.data.pipeline import PromptBatch
from spatial_jax.data.prompt_form import read_form
from spatial_jax.errors import UserError
from spatial_jax.learn.packing import PackConfig
from spatial_jax.learn.train_batch import Microbatches
from spatial_jax.stages import collect
from spatial_jax.stages.collect import ROWS, YIELD, Collector
from spatial_jax.stages.context import open_context, plan, settings_of
from spatial_jax.stages.load import read_policy, read_source
from spatial_jax.stages.reject import TESTS, KeepConfig, keep
from spatial_jax.supervised import ChunkPrompts, Supervised
from spatial_jax.train_config import TrainConfig
from tests import dummies, reward_fixtures
from tests import rollout_fixtures as fixtures
from tests.reward_fixtures import DISTANCE, NEAREST, answering
from tests.row_fixtures import jpeg, save_rows

GROUP, PER_CHUNK = 2, 3
KEEP = KeepConfig(min_score=0.5, executable=True, reflective=False, min_turns=1, per_task=1)
RIGHT = {DISTANCE.question_type: "2.0", NEAREST.question_type: "B"}


class Sampling:
  """Chunks of three tasks of two types, with scripted answers instead of a policy."""

  def __init__(self, monkeypatch, answer_of):
    self.answer_of, self.sampled, self.loaded = answer_of, [], 0
    monkeypatch.setattr(collect, "generate_rollouts", self.generate)

  def generate(self, engine, weights, job):
    self.sampled.append(job.step)
    return [[self.write(p.task, g) for g in range(GROUP)] for p in job.prompts]

  def write(self, task, g):
    return reward_fixtures.rollout(answering(self.answer_of(task, g)), task=task, sample=g)

  def weights(self):
    self.loaded += 1
    return {}

  def run(self, folder, chunks, cfg=KEEP, batches=None):
    collector = Collector(
      engine=engine(fixtures.ROLLOUT),
      batch_of=batches or batch_of,
      reward=reward_fixtures.CFG,
      keep=functools.partial(keep, cfg),
      chunks=chunks,
      seed=0,
      folder=folder,
    )
    return collector.run(self.weights)


def engine(rollout) -> Any:
  cfg = dataclasses.replace(rollout, group=GROUP, prompts=PER_CHUNK)
  return types.SimpleNamespace(cfg=cfg)


def batch_of(chunk):
  tasks = [
    dataclasses.replace((DISTANCE, NEAREST)[i % 2], task_id=f"{chunk}-{i}")
    for i in range(PER_CHUNK)
  ]
  return PromptBatch([dummies.prompt(task) for task in tasks], ("the file is broken",) * chunk)


def second_is_right(task, g):
  return RIGHT[task.question_type] if g == 1 else ("9" if task.answer_kind == "number" else "A")


def read(path):
  return json.loads(path.read_text())


def test_the_report_counts_every_test_for_each_task_type(monkeypatch, tmp_path):
  """Over all chunks, and also the tests that nothing passed."""
  strict = dataclasses.replace(KEEP, reflective=True)
  sampling = Sampling(monkeypatch, second_is_right)
  path = sampling.run(tmp_path / "plain", 2)
  tasks = {DISTANCE.question_type: 4, NEAREST.question_type: 2}
  report = read(tmp_path / "plain" / YIELD)
  assert report["replaced_tasks"] == 0 + 1, "of both chunks"
  assert report["by_type"] == {
    name: {
      "sampled": 2 * count, "correct": count, "executable": 2 * count,
      "reflective": 2 * count, "long_enough": 2 * count, "kept": count,
    }
    for name, count in tasks.items()
  }  # fmt: skip
  kept = [json.loads(line) for line in path.read_text().splitlines()]
  assert [row["id"] for row in kept] == [f"{c}-{i}#1" for c in range(2) for i in range(3)]
  with pytest.raises(UserError):
    sampling.run(tmp_path / "strict", 2, strict)
  for counts in read(tmp_path / "strict" / YIELD)["by_type"].values():
    assert set(counts) == set(TESTS)
    assert counts["reflective"] == counts["kept"] == 0


def test_a_sampling_that_keeps_nothing_says_why_and_what_to_do(monkeypatch, tmp_path):
  sampling = Sampling(monkeypatch, lambda task, g: "9")
  with pytest.raises(UserError) as error:
    sampling.run(tmp_path, 2)
  message = str(error.value)
  assert message.startswith("nothing was kept of 12 rollouts")
  assert f'"{DISTANCE.question_type}": {{"sampled": 8, "correct": 0,' in message
  assert "lower min_score or min_turns, switch off reflective" in message
  assert "\n" not in message
  assert (tmp_path / YIELD).exists()
  assert not (tmp_path / ROWS).exists()


def test_an_interrupted_sampling_goes_on_with_the_next_chunk(monkeypatch, tmp_path):
  """The file is the same as without the interruption; a finished one is not sampled again."""
  whole = Sampling(monkeypatch, second_is_right)
  expected = whole.run(tmp_path / "whole", 3).read_bytes()

  def stops(task, g):
    if task.task_id.startswith("2"):
      raise KeyboardInterrupt
    return second_is_right(task, g)

  stopped = Sampling(monkeypatch, stops)
  with pytest.raises(KeyboardInterrupt):
    stopped.run(tmp_path / "parts", 3)
  again = Sampling(monkeypatch, second_is_right)
  assert again.run(tmp_path / "parts", 3).read_bytes() == expected
  assert (whole.sampled, stopped.sampled, again.sampled) == ([0, 1, 2], [0, 1, 2], [2])
  finished = Sampling(monkeypatch, second_is_right)
  assert finished.run(tmp_path / "parts", 3).read_bytes() == expected
  assert (finished.sampled, finished.loaded, again.loaded) == ([], 0, 1)


def test_what_a_second_pass_over_the_data_keeps_has_ids_of_its_own(monkeypatch, tmp_path):
  """Ids are unique in a data file, or it could not be read."""
  sampling = Sampling(monkeypatch, second_is_right)
  path = sampling.run(tmp_path, 3, batches=lambda chunk: batch_of(chunk % 2))
  kept = [json.loads(line)["id"] for line in path.read_text().splitlines()]
  first = [f"{c}-{i}#1" for c in range(2) for i in range(3)]
  assert kept == [*first, *(f"0-{i}#1@2" for i in range(3))]


def test_chunks_in_their_order_read_one_stream():
  """A chunk that is not the next one, as after a deleted part, begins another."""
  begun = []

  def stream_of(first):
    begun.append(first)
    return (PromptBatch([number], ()) for number in itertools.count(first))

  prompts = ChunkPrompts(stream_of)
  assert [prompts(chunk).prompts for chunk in (2, 3, 4, 9, 10)] == [[2], [3], [4], [9], [10]]
  assert begun == [2, 9]


# --- the stage on what was kept ------------------------------------------------------------------


def save_tasks(folder, names):
  """Files of distances about one image."""
  (folder / "0.jpg").write_bytes(jpeg(0, 168, 168))
  for name in names:
    made = [
      {
        "id": f"{name}-{i}", "question": "How far is the chair?", "answer": 2, "unit": "m",
        "images": ["0.jpg"], "scene": f"{name}-{i}", "type": DISTANCE.question_type,
      }
      for i in range(3)
    ]  # fmt: skip
    save_rows(folder / f"{name}.jsonl", made)
  return ",".join(str(folder / f"{name}.jsonl") for name in names)


@contextlib.contextmanager
def supervised(folder, workdir):
  """The builder of stages of a run of the embedded policy on two files; no array is allocated."""
  config = tiny_defaults.get_config()
  changes = {"reject.tasks": 6, "reject.train.batch": 2, "reject.train.micro_rows": 1}
  changes |= {"source.kind": "files", "source.path": save_tasks(folder, "ab")}
  config.update_from_flattened_dict(changes)
  cfg = build(TrainConfig, settings_of(TrainConfig, dict(config)))
  files = FilesConfig((1.0, 3.0), "", 0.0, (), "shuffled", 0.0, True)
  cfg = dataclasses.replace(
    cfg,
    source=dataclasses.replace(cfg.source, files=files),
    reject=dataclasses.replace(cfg.reject, keep=KEEP),
  )
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
  policy = read_policy(cfg.init)
  cfg = train_config.stage_config(cfg, "reject")
  parts = train_config.training_parts(cfg, policy.cfg, mesh)
  with open_context(parts.policy, policy, read_form(cfg.text), cfg, None) as context:
    rollouts = plan(parts.policy, compiled.rollout_buckets(cfg.rollout, mesh), 0, 1 << 40)
    yield Supervised(cfg, context, parts, read_source(cfg.source), rollouts, workdir, None)


def test_the_stage_trains_on_the_kept_rows_and_uses_their_file_again(monkeypatch, tmp_path):
  """Weights of the files of the run are not those of the kept rows."""
  workdir = tmp_path / "run"
  workdir.mkdir()
  sampling = Sampling(monkeypatch, second_is_right)
  with supervised(tmp_path, workdir) as build_stage:
    sampler = engine(build_stage.cfg.rollout)
    stage = build_stage.rejection(sampler, sampling.weights)
    path = workdir / "kept" / ROWS
    kept = sorted(json.loads(line)["id"] for line in path.read_text().splitlines())
    batches = [batch for batch, _ in zip(stage.stream(0), range(3), strict=False)]
    names = [t.task_id for batch in batches for t in batch.prompts]
    assert sorted(names[: len(kept)]) == kept, "a pass"
    assert len(set(kept)) == len(kept) >= 4
    again = build_stage.rejection(sampler, sampling.weights)
    assert (sampling.sampled, sampling.loaded) == ([0, 1], 1)
    reject = dataclasses.replace(build_stage.cfg.reject, path=str(path))
    given = dataclasses.replace(
      build_stage, cfg=dataclasses.replace(build_stage.cfg, reject=reject), workdir=tmp_path
    )
    other = given.rejection(None, sampling.weights)
    assert sampling.loaded == 1
    for one in (again, other):
      found = next(one.stream(0)).prompts
      for t, expected in zip(found, batches[0].prompts, strict=True):
        np.testing.assert_array_equal(t.token_ids_T, expected.token_ids_T)


def test_the_answers_of_corrupted_pairs_are_read_once(monkeypatch, tmp_path):
  """They are 2,000 tasks, which a source of rooms renders."""
  read, images = [], fixtures.shapes()
  shapes = PackConfig(128, (2,), True, images.vision, images.window_blocks, images.vocabulary)
  measured = shapes, Microbatches(1, (128,))
  monkeypatch.setattr(supervised_lib, "answers_by_type", lambda tasks: read.append(tasks) or {})
  monkeypatch.setattr(Supervised, "_shapes", lambda *_: measured)
  with supervised(tmp_path, tmp_path) as build_stage:
    build_stage.dpo(build_stage.cfg.dpo, build_stage.cfg.dpo.loss)
  assert len(read) == 1
