"""Dynamic sampling: groups whose rewards are equal are replaced by those of further prompts."""

import dataclasses
import itertools
import types
from typing import Any

import jax
import numpy as np
import pytest

from spatial_jax.data.files import open_files
from spatial_jax.data.pipeline import PipelineConfig, PromptBatch
from spatial_jax.data.source import RoomSource, prompt_stream, refill_prompts
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.errors import DataError
from spatial_jax.learn.train_batch import BatchConfig
from spatial_jax.reward.compose import score
from spatial_jax.stages import sampling
from spatial_jax.stages.replaced import ReplacedTasks
from spatial_jax.stages.sampling import Sampler
from tests import dummies, reward_fixtures
from tests.row_fixtures import FILES, rows, save_images, save_rows

GROUP = 2
SMALL = BatchConfig((16,), 32, VisionBuckets((16,), (16,), (16,)), 2, 100)
EQUAL, DIFFERENT = ("9", "9"), ("2.0", "9")


def number_of(task):
  """1, 2, ... for the tasks of the step, 11, 12, ... for those of the first attempt, ..."""
  attempt, place = task.task_id.split("-")
  return 10 * int(attempt) + int(place) + 1


class Refills:
  """A sampler of scripted answers: of the tasks of the step, and of those of each attempt."""

  def __init__(
    self, monkeypatch, first, further=(), max_refills=4, faults=(), reward=reward_fixtures.CFG
  ):
    self.answers = {f"0-{i}": answers for i, answers in enumerate(first)}
    for attempt, answers_of in enumerate(further, 1):
      self.answers |= {f"{attempt}-{i}": answers for i, answers in enumerate(answers_of)}
    self.asked: list[tuple[int, int, int]] = []
    self.faults, self.measured, self.unusable = faults, [], 0
    monkeypatch.setattr(sampling, "generate_rollouts", self.generate)
    engine: Any = types.SimpleNamespace(cfg=types.SimpleNamespace(sampling=None, group=GROUP))
    self.sampler = Sampler(
      engine=engine,
      decode_params=lambda params: params,
      keep_features=False,
      reward=reward,
      shapes=SMALL,
      batches=lambda step: [range(len(first))],
      seed=0,
      max_refills=max_refills,
      refill=self.refill,
      replaced=ReplacedTasks(),
      place=lambda batch: batch,
      attention=self.attention,
    )
    self.first = [self.prompt(f"0-{i}") for i in range(len(first))]

  def prompt(self, name):
    task = dataclasses.replace(reward_fixtures.DISTANCE, task_id=name)
    return dummies.prompt(task)

  def refill(self, step, attempt, count):
    self.asked.append((step, attempt, count))
    prompts = [self.prompt(f"{attempt}-{i}") for i in range(count)]
    return PromptBatch(prompts, ("task x has no images",) * self.unusable)

  def generate(self, engine, weights, job):
    return [[self.write(p.task, g) for g in range(GROUP)] for p in job.prompts]

  def write(self, task, g):
    text = reward_fixtures.answering(self.answers[task.task_id][g])
    reason = "fault" if (task.task_id, g) in self.faults else "answer"
    writer, number = dummies.TrajectoryWriter(), number_of(task)
    writer.image(dummies.patched(np.full((28, 28, 3), number, np.uint8)))
    writer.text([number])
    length = len(writer.ids)
    writer.turn(text, 3, np.random.default_rng(g))
    return writer.finish(task.task_id, g, length, 1, reason)

  def attention(self, params, batch):
    """The number of the task of each row, of 100."""
    self.measured.append(batch.rows.trained_RT.shape)
    return batch.rows.tokens.token_RT[:, 0] / 100

  def run(self):
    """(result, ids of its prompts); prompts, rollouts and scores are of the same tasks."""
    found = self.sampler.sample({}, 5, self.first, 2.0)
    names = [prompt.task.task_id for prompt in found.prompts]
    assert [[t.task_id for t in group] for group in found.rollouts] == [[n] * 2 for n in names]
    tasks = [prompt.task for prompt in found.prompts]
    again = score(found.rollouts, tasks, reward_fixtures.CFG, 2.0)
    jax.tree.map(np.testing.assert_array_equal, found.scores, again)
    return found, names


def test_groups_of_equal_rewards_are_replaced_in_their_places(monkeypatch):
  """The second attempt asks for as many prompts as are still missing."""
  first = [DIFFERENT, EQUAL, EQUAL, DIFFERENT, EQUAL]
  lab = Refills(monkeypatch, first, [[EQUAL, DIFFERENT, EQUAL], [DIFFERENT, DIFFERENT]])
  found, names = lab.run()
  assert names == ["0-0", "1-1", "2-0", "0-3", "2-1"]
  assert lab.asked == [(5, 1, 3), (5, 2, 2)]
  counts = {"sampled_prompts": 10, "replaced_groups": 3, "replaced_tasks": 0}
  assert found.metrics == {"too_many_images": 0, **counts}


def test_groups_that_stay_equal_are_kept_after_the_last_refill(monkeypatch):
  lab = Refills(monkeypatch, [EQUAL, DIFFERENT], [[EQUAL]] * 3, max_refills=3)
  found, names = lab.run()
  assert names == ["0-0", "0-1"]
  assert lab.asked == [(5, 1, 1), (5, 2, 1), (5, 3, 1)]
  assert found.metrics["replaced_groups"] == 0


def test_tasks_that_a_refill_cannot_use_are_counted_and_named_once(monkeypatch, capsys):
  lab = Refills(monkeypatch, [EQUAL, EQUAL], [[EQUAL, DIFFERENT], [DIFFERENT]])
  lab.unusable = 2
  found, _ = lab.run()
  assert found.metrics["replaced_tasks"] == 4
  assert capsys.readouterr().out.count("replaced by another task: task x has no images") == 1


def test_a_refill_whose_images_do_not_fit_is_not_taken(monkeypatch):
  """The step and the refill fit, but not together."""
  lab = Refills(monkeypatch, [EQUAL, DIFFERENT, EQUAL], [[DIFFERENT, DIFFERENT]], max_refills=1)

  def fits(images, *_):
    numbers = {int(image.pixels[0, 0, 0]) for image in images}
    return not (11 in numbers and numbers & {1, 2, 3})  # the first one of the refill

  monkeypatch.setattr(sampling, "fits", fits)
  found, names = lab.run()
  assert names == ["0-0", "0-1", "1-1"]
  assert found.metrics["replaced_groups"] == 1


def test_groups_that_differ_are_never_refilled(monkeypatch):
  lab = Refills(monkeypatch, [DIFFERENT, DIFFERENT])
  lab.run()
  off = Refills(monkeypatch, [EQUAL, DIFFERENT], max_refills=0)
  found, names = off.run()
  assert names == ["0-0", "0-1"]
  assert "replaced_groups" not in found.metrics
  assert lab.asked == off.asked == []


def test_a_group_with_one_valid_rollout_has_no_signal(monkeypatch):
  lab = Refills(monkeypatch, [DIFFERENT], [[DIFFERENT]], faults=(("0-0", 0),))
  assert lab.run()[1] == ["1-0"]


def test_the_attention_of_a_refill_is_measured_on_as_many_rows_as_that_of_the_step(monkeypatch):
  """They divide over the devices then, and no further program is compiled."""
  weights = dataclasses.replace(reward_fixtures.CFG.weights, attention=0.5)
  reward = dataclasses.replace(reward_fixtures.CFG, weights=weights)
  first = [EQUAL, DIFFERENT, DIFFERENT, EQUAL, DIFFERENT]
  further = [[EQUAL, DIFFERENT], [DIFFERENT]]
  lab = Refills(monkeypatch, first, further, reward=reward)
  found = lab.sampler.sample({}, 5, lab.first, 2.0)
  numbers = [number_of(prompt.task) for prompt in found.prompts]
  assert numbers == [12, 2, 3, 21, 5]
  expected_BG = np.repeat(np.array(numbers, np.float32)[:, None] / 100, GROUP, axis=1)
  np.testing.assert_allclose(found.scores.components["attention"], expected_BG)
  assert len(lab.measured) == 3
  assert len(set(lab.measured)) == 1


def rooms(number):
  return [dataclasses.replace(reward_fixtures.DISTANCE, task_id=f"room-{number}")]


def source_of(kind, folder):
  if kind == "rooms":
    return RoomSource(rooms, rooms, 10, (), None, 1, 0)
  made = rows(save_images(folder, 3), 80)
  path = save_rows(folder / "a.jsonl", made)
  return open_files([path], dataclasses.replace(FILES, held_out_fraction=0.0), lambda _: None)


@pytest.mark.parametrize("kind", ["files", "rooms"])
def test_prompts_of_a_refill_are_a_function_of_seed_step_and_attempt(kind, tmp_path):
  def names(*key):
    """Of a source that was opened anew: nothing before has an influence."""
    source = source_of(kind, tmp_path)
    return tuple(refill_prompts(source, lambda task: task.task_id, *key, 4).prompts)

  keys = [(0, 2, 1), (1, 2, 1), (0, 3, 1), (0, 2, 2)]
  found = [names(*key) for key in keys]
  assert found == [names(*key) for key in keys]
  assert len(set(found)) == len(keys)
  assert all(len(set(one)) == 4 for one in found)


@pytest.mark.parametrize("kind", ["files", "rooms"])
def test_a_task_that_cannot_be_used_is_replaced_by_a_further_one(kind, tmp_path):
  source, calls = source_of(kind, tmp_path), itertools.count()

  def encode(task):
    if next(calls) < 3:
      raise DataError(f"task {task.task_id} is too long")
    return task.task_id

  stream = prompt_stream(source, encode, 0, 0, 4, PipelineConfig(workers=0, steps_ahead=1))
  batch = next(stream)
  assert len(batch.prompts) == 4
  assert len(batch.replaced) == 3


def test_an_error_of_every_task_ends_the_run():
  def encode(task):
    raise DataError(f"task {task.task_id} is too long")

  with pytest.raises(DataError, match=r"task room-\d+ is too long"):
    refill_prompts(source_of("rooms", None), encode, 0, 1, 1, 4)
