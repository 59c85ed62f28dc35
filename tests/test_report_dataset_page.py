"""Statistics of a data set against brute force, and the choice of its examples."""

import collections

import numpy as np

from spatial_jax.report.dataset_page import choose_examples
from spatial_jax.report.dataset_statistics import (
  TaskSummary,
  best_constant,
  mean_relative_accuracy,
  type_statistics,
)
from spatial_jax.reward import accuracy


def task(answer, question="How far?", split="train", kind="number", name="a", images=1, number=0):
  return TaskSummary(split, number, name, "m", question, str(answer), kind, "room", images, 10)


def test_scores_are_those_of_the_reward():
  rng = np.random.default_rng(0)
  answers, truths = rng.uniform(0.2, 9, 500), rng.uniform(0.2, 9, 500)
  answers[:100] = np.round(truths[:100] * rng.choice([0.5, 0.8, 1.0, 1.25, 1.5], 100), 1)
  expected = accuracy.mean_relative_accuracy(answers.astype(np.float32), truths.astype(np.float32))
  np.testing.assert_allclose(mean_relative_accuracy(answers, truths), expected, atol=1e-6)


def test_the_best_constant_beats_every_number_of_a_fine_grid():
  rng = np.random.default_rng(1)
  for truths in (
    rng.integers(2, 9, 300).astype(float),
    np.round(rng.lognormal(0, 1, 300), 1) + 0.1,
  ):
    best = best_constant(truths)
    grid = np.geomspace(truths.min(), truths.max(), 4000)
    scores = mean_relative_accuracy(grid[:, None], truths).mean(axis=1)
    assert best.score >= scores.max() - 0.01
    again = mean_relative_accuracy(np.array([best.value]), truths).mean()
    np.testing.assert_allclose(best.score, again, atol=1e-9)


def test_equal_answers_are_known_without_an_image():
  (one,) = type_statistics([task(4.0), task(4.0, split="held_out"), task("A", kind="choice")])
  assert one.median == one.best == (4.0, 1.0)
  assert one.counts == {"train": 1, "held_out": 1}


def test_the_median_of_a_question_leaves_out_its_own_task():
  told = [task(1.0, "bed"), task(1.0, "bed"), task(100.0, "sofa"), task(100.0, "sofa")]
  (known,) = type_statistics(told)
  assert known.per_text == 1.0
  (alone,) = type_statistics([task(1.0, "bed"), task(100.0, "sofa"), task(30.0, "lamp")])
  assert alone.per_text == alone.median.score  # no other task has the question


def test_medians_of_others_are_those_of_numpy():
  values = np.random.default_rng(2).integers(1, 8, 41).astype(float)
  (one,) = type_statistics([task(value) for value in values])
  others = np.array([np.median(np.delete(values, i)) for i in range(len(values))])
  np.testing.assert_allclose(one.per_text, mean_relative_accuracy(others, values).mean())


def test_examples_have_all_types_and_few_and_many_images():
  tasks = [
    task(1.0, name=name, images=1 + i % 8, number=i) for name in ("a", "b", "c") for i in range(80)
  ]
  chosen = choose_examples(tasks, 24)
  assert collections.Counter(one.question_type for one in chosen) == {"a": 8, "b": 8, "c": 8}
  assert {one.images for one in chosen if one.question_type == "b"} == set(range(1, 9))
  assert choose_examples(tasks[:2], 24) == tasks[:2]
