"""Task batches: functions of seed and step, held-out rooms, the prefetch thread."""

import dataclasses
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import tiny_defaults
from spatial_jax.config import build
from spatial_jax.data import source as source_lib
from spatial_jax.data.background import compute_async, prefetch
from spatial_jax.data.source import (
  HELD_OUT_SEED,
  RoomSource,
  SourceConfig,
  is_held_out,
  make_source,
)
from spatial_jax.data.task_order import interleave_types, sample_tasks
from spatial_jax.errors import DataError
from spatial_jax.synthetic import tasks as tasks_lib
from spatial_jax.synthetic.floorplan import ProceduralConfig
from spatial_jax.synthetic.questions import QuestionConfig
from spatial_jax.synthetic.tasks import CameraConfig
from tests import rollout_fixtures as fixtures

TYPES = ("object_counting", "object_abs_distance", "camera_distance")
ROOMS = ProceduralConfig(objects=(3, 5), side_m=(3.0, 4.0), l_shape_share=0.0, repeat_share=0.3)
CAMERA = CameraConfig(56, 56, 75.0, (1,))
QUESTIONS = QuestionConfig(TYPES, 3, 10, 0.5, "views", 2.0, "")


def fake_tasks(number):
  """Six tasks of a room: three of one type, two of another, one of a third."""
  kinds = [TYPES[0]] * 3 + [TYPES[1]] * 2 + [TYPES[2]]
  return [
    dataclasses.replace(
      fixtures.task(f"{number}/{kind}/{i}"), question_type=kind, scene_id=f"room-{number}"
    )
    for i, kind in enumerate(kinds)
  ]


def training_batch(tasks_of, seed, step, count, max_tasks_per_scene, types, rare_type_retries=4):
  source = RoomSource(tasks_of, tasks_of, 0, types, None, max_tasks_per_scene, rare_type_retries)
  return source.batch(seed, step, count)


def held_out_tasks(tasks_of, first_scene, count, max_tasks_per_scene, types):
  source = RoomSource(tasks_of, tasks_of, first_scene, types, None, max_tasks_per_scene, 0)
  return source.held_out(count)


def ids(tasks):
  return [task.task_id for task in tasks]


def numbers(tasks):
  return [int(task.scene_id.removeprefix("room-")) for task in tasks]


# --- batches -------------------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 6))
def test_the_same_seed_and_step_give_the_same_batch(seed, step, count, max_tasks_per_scene):
  tasks = training_batch(fake_tasks, seed, step, count, max_tasks_per_scene, TYPES)
  assert ids(tasks) == ids(
    training_batch(fake_tasks, seed, step, count, max_tasks_per_scene, TYPES)
  )
  assert len(set(ids(tasks))) == count
  rooms = numbers(tasks)
  assert all(0 <= number < HELD_OUT_SEED for number in rooms)
  assert max(rooms.count(number) for number in rooms) <= max_tasks_per_scene


def test_steps_and_seeds_have_different_rooms():
  rooms = [
    frozenset(numbers(training_batch(fake_tasks, seed, step, 4, 2, TYPES)))
    for seed in range(5)
    for step in range(20)
  ]
  assert len(frozenset.union(*rooms)) == sum(map(len, rooms))


def shares(tasks):
  """Number of tasks of each type."""
  return Counter(dict.fromkeys(TYPES, 0) | Counter(task.question_type for task in tasks))


@given(st.integers(0, 99), st.integers(1, 30), st.integers(1, 6), st.booleans())
def test_question_types_have_equal_shares(seed, count, max_tasks_per_scene, training):
  if training:
    tasks = training_batch(fake_tasks, seed, 0, count, max_tasks_per_scene, TYPES)
  else:
    tasks = held_out_tasks(fake_tasks, seed, count, max_tasks_per_scene, TYPES)
  assert len(set(ids(tasks))) == count
  assert max(Counter(numbers(tasks)).values()) <= max_tasks_per_scene
  counts = shares(tasks).values()
  assert max(counts) - min(counts) <= 1


def test_the_extra_task_of_a_step_has_a_random_type():
  extra = shares(training_batch(fake_tasks, 0, step, 1, 1, TYPES)[0] for step in range(300))
  assert min(extra.values()) > 70


def one_in(period):
  """Rooms of which one in `period` has the last type, and the list of visited rooms."""
  visited = []

  def tasks_of(number):
    visited.append(number)
    rare = number % period == 0
    return [t for t in fake_tasks(number) if rare or t.question_type != TYPES[-1]]

  return tasks_of, visited


@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 3))
def test_a_rare_type_gets_its_share(seed, count, max_tasks_per_scene):
  tasks_of, visited = one_in(4 // max_tasks_per_scene)
  counts = shares(training_batch(tasks_of, seed, 0, count, max_tasks_per_scene, TYPES)).values()
  assert len(visited) <= 4 * math.ceil(count / max_tasks_per_scene)
  assert max(counts) - min(counts) <= 1


@given(st.integers(0, 99), st.integers(1, 20), st.integers(1, 3), st.integers(1, 3))
def test_rare_type_retries_limit_the_visited_rooms(
  seed, count, max_tasks_per_scene, rare_type_retries
):
  tasks_of, visited = one_in(HELD_OUT_SEED * 2)
  tasks = training_batch(tasks_of, seed, 0, count, max_tasks_per_scene, TYPES, rare_type_retries)
  assert len(tasks) == count
  assert len(visited) <= (rare_type_retries + 1) * math.ceil(count / max_tasks_per_scene)


@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 6))
def test_a_missing_type_is_replaced_by_others(seed, count, max_tasks_per_scene):
  tasks_of, visited = one_in(HELD_OUT_SEED * 2)
  tasks = held_out_tasks(tasks_of, seed + 1, count, max_tasks_per_scene, TYPES)
  assert len(set(ids(tasks))) == count
  assert max(Counter(numbers(tasks)).values()) <= max_tasks_per_scene
  assert len(visited) <= 5 * math.ceil(count / max_tasks_per_scene)
  assert min(shares(tasks)[kind] for kind in TYPES[:-1]) >= count // len(TYPES)


def test_without_types_rooms_are_taken_in_order():
  tasks_of, visited = one_in(100)
  assert len(training_batch(tasks_of, 0, 0, 30, 3, ())) == 30
  assert len(visited) == 10


def test_types_take_turns():
  tasks = interleave_types(fake_tasks(0))
  assert [task.question_type for task in tasks] == [*TYPES, *TYPES[:2], TYPES[0]]
  assert ids(tasks)[::3] == ids(fake_tasks(0))[:2]


@given(st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_pick(count, seed):
  chosen = ids(sample_tasks(fake_tasks(0), count, np.random.default_rng(seed)))
  assert len(chosen) == len(set(chosen)) == min(count, 6)
  assert set(chosen) <= set(ids(fake_tasks(0)))


def test_held_out_tasks_are_always_the_same():
  tasks = held_out_tasks(fake_tasks, 7, 40, 2, TYPES)
  assert ids(tasks) == ids(held_out_tasks(fake_tasks, 7, 40, 2, TYPES))
  assert sorted(set(numbers(tasks)))[:20] == list(range(7, 27))


def test_rooms_without_questions_are_skipped_or_an_error():
  def every_third(number):
    return fake_tasks(number) if number % 3 == 0 else []

  assert all(number % 3 == 0 for number in numbers(training_batch(every_third, 0, 0, 10, 2, TYPES)))
  with pytest.raises(DataError, match="32 rooms in a row gave no question; lower"):
    training_batch(lambda number: [], 0, 0, 1, 1, TYPES)


# --- real scenes ---------------------------------------------------------------------------------


def test_the_same_number_gives_the_same_tasks_and_images():
  tasks_of = tasks_lib.procedural_tasks(ROOMS, CAMERA, QUESTIONS)
  one, again, other = tasks_of(5), tasks_of(5), tasks_of(6)
  assert ids(one) == ids(again)
  assert one
  for task, same in zip(one, again, strict=True):
    np.testing.assert_array_equal(task.media[0].data, same.media[0].data)
    assert (task.question, task.answer, task.boxes) == (same.question, same.answer, same.boxes)
  assert not set(ids(one)) & set(ids(other))
  assert one[0].media[0].data.shape == (56, 56, 3)


def test_training_never_uses_held_out_rooms():
  defaults = build(SourceConfig, tiny_defaults.source())
  source = make_source(
    dataclasses.replace(defaults, rooms=ROOMS, camera=CAMERA, questions=QUESTIONS)
  )
  asked = {task.scene_id for task in source.held_out(12)}
  learned = {task.scene_id for step in range(4) for task in source.batch(0, step, 6)}
  learned |= {task.scene_id for task in source.examples(0, 24)}
  assert len(asked) >= 6
  assert not asked & learned
  assert {name.split("/")[1] for name in asked} >= {str(HELD_OUT_SEED)}


def test_the_last_training_batch_is_below_the_held_out_numbers(monkeypatch):

  class Highest:
    def integers(self, high):
      return HELD_OUT_SEED // 2 - 1

    def permutation(self, count):
      return np.arange(count)

  monkeypatch.setattr(source_lib, "_generator", lambda *numbers: Highest())
  monkeypatch.setattr(source_lib, "sample_tasks", lambda tasks, count, rng: tasks[:count])
  assert max(numbers(training_batch(fake_tasks, 0, 0, 512, 1, TYPES))) < HELD_OUT_SEED


def test_all_random_streams_are_different():
  """NumPy ignores zeros at the end of a seed: (5,) and (5, 0) are the same."""
  names = [(n, use) for n in range(4) for use in range(3)]
  names += [(seed, step, 3) for seed in range(4) for step in range(4)]
  first = {source_lib._generator(*name).random() for name in names}
  assert len(first) == len(names)
  assert (
    len(
      {
        tasks_lib._CAMERA_STREAM,
        tasks_lib._QUESTION_STREAM,
        source_lib._HELD_OUT_STREAM,
        source_lib._BATCH_STREAM,
      }
    )
    == 4
  )


@given(st.lists(st.text(max_size=8), unique=True))
def test_the_id_alone_decides_whether_a_real_room_is_held_out(names):
  assert [is_held_out(name) for name in names] == [
    is_held_out(name) for name in [*names[::-1], "more"][-2::-1]
  ]


def test_a_fifth_of_real_rooms_is_held_out():
  share = np.mean([is_held_out(f"scannet/scene{i:04d}_00") for i in range(2000)])
  assert 0.17 < share < 0.23


# --- prefetch ------------------------------------------------------------------------------------


def threads():
  return [t for t in threading.enumerate() if t.name == "prefetch"]


def wait_for(condition, seconds=10.0):
  deadline = time.monotonic() + seconds
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.005)
  assert condition()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 9), st.integers(1, 4), st.integers(0, 9))
def test_prefetch_keeps_the_order(first, depth, count):
  items = prefetch(lambda number: number**2, first, depth)
  assert list(itertools.islice(items, count)) == [n**2 for n in range(first, first + count)]
  items.close()


def test_prefetch_computes_depth_items_ahead():
  made = []
  items = prefetch(lambda number: made.append(number) or number, 0, 2)
  assert not made, "the thread starts with the first request"
  assert next(items) == 0
  wait_for(lambda: len(made) == 4)  # two are ready, one waits for room
  time.sleep(0.05)
  assert made == [0, 1, 2, 3]
  items.close()


def test_prefetch_raises_an_error_in_place_of_its_item():
  def make(number):
    if number == 3:
      raise DataError("image 3 is broken")
    return number

  items = prefetch(make, 0, 2)
  assert [next(items) for _ in range(3)] == [0, 1, 2]
  with pytest.raises(DataError, match="image 3 is broken"):
    next(items)
  wait_for(lambda: not threads())


@pytest.mark.parametrize("count", [1, 3])
def test_closing_ends_the_thread(count):
  items = prefetch(lambda number: number, 0, 2)
  for _ in range(count):
    next(items)
  items.close()
  wait_for(lambda: not threads())


def test_closing_does_not_wait_for_the_thread():
  going = threading.Event()
  items = prefetch(lambda number: number and going.wait(30), 0, 1)
  next(items)
  begin = time.monotonic()
  del items
  assert time.monotonic() - begin < 5
  assert threads()
  going.set()
  wait_for(lambda: not threads())


def test_compute_async_starts_at_once_and_returns_the_result():
  begun = threading.Event()
  result = compute_async(lambda: begun.set() or "questions")
  assert begun.wait(30), "before the result is requested"
  assert result() == result() == "questions"

  def broken():
    raise DataError("no question")

  result = compute_async(broken)
  for _ in range(2):
    with pytest.raises(DataError, match="no question"):
      result()


def test_an_interrupt_ends_the_program_at_once():
  program = (
    "import signal, time\n"
    # A shell that starts tests in the background has them ignore the signal.
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from spatial_jax.data.background import prefetch\n"
    "items = prefetch(lambda n: n and time.sleep(600), 0, 2)\n"
    "next(items)\n"
    "print('ready', flush=True)\n"
    "next(items)\n"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", program],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert process.stdout.readline() == b"ready\n"
  process.send_signal(signal.SIGINT)
  _, errors = process.communicate(timeout=30)
  assert b"KeyboardInterrupt" in errors
  assert process.returncode != 0
