"""VSI-Bench scores as the benchmark computes them, quirks included."""

import numpy as np
import pytest

from spatial_jax.evaluate.benchmarks.vsi_bench import (
  CHOICE_TYPES,
  NUMBER_TYPES,
  average,
  score,
  task_scores,
)


@pytest.mark.parametrize(
  ("prediction", "truth", "expected"),
  [
    ("A", "A", 1.0),
    ("a", "A", 1.0),
    ("A.", "A", 1.0),
    ("A. chair", "A", 1.0),
    ("A...", "A", 1.0),
    ("A\n", "A", 1.0),
    ("B", "A", 0.0),
    ("A:", "A", 0.0),
    ("A,B", "A", 0.0),
    ("(A)", "A", 0.0),
    (" A", "A", 0.0),
    ("The answer is A", "A", 0.0),
    ("", "A", 0.0),
  ],
)
@pytest.mark.parametrize("question_type", ["object_rel_distance", "obj_appearance_order"])
def test_a_choice_scores_by_its_first_word(prediction, truth, expected, question_type):
  assert score(prediction, truth, question_type) == expected


@pytest.mark.parametrize(
  ("prediction", "truth", "expected"),
  [
    ("4", "4", 1.0),
    ("4.", "4", 1.0),
    ("4 meters", "4", 1.0),
    ("4 chairs", "4", 1.0),
    ("There are 4", "4", 0.0),
    ("4\n", "4", 1.0),
    ("4\nmeters", "4", 0.0),
    ("4m", "4", 0.0),
    ("four", "4", 0.0),
    ("", "4", 0.0),
    ("nan", "4", 0.0),
    ("inf", "4", 0.0),
    ("3", "4", 0.6),  # 25 % is within 50, 45, 40, 35, 30 and, as <=, 25 %
    ("2", "4", 0.1),
    ("1.9", "4", 0.0),
    ("8", "10", 0.6),  # 1 - 0.8 is a little under 0.2 in float64: 20 % is not within 20 %
    ("9.5", "10", 1.0),  # 1 - 0.95 is a little over 0.05
    ("100", "-4", 1.0),  # divided by the truth, not by its magnitude
    ("4", "none", 0.0),
  ],
)
@pytest.mark.parametrize("question_type", NUMBER_TYPES)
def test_a_number_scores_the_mra_of_its_first_word(prediction, truth, expected, question_type):
  assert score(prediction, truth, question_type) == pytest.approx(expected)


def test_the_benchmark_has_ten_confidences():
  assert int((0.95 - 0.5) / 0.05 + 2) == 10


def test_an_error_names_the_unknown_question_type():
  with pytest.raises(ValueError, match="camera_distance"):
    score("1", "1", "camera_distance")
  with pytest.raises(ValueError, match="camera_distance"):
    average({"camera_distance": 1.0})
  with pytest.raises(ValueError, match="no scores"):
    average({"object_counting": []})
  with pytest.raises(ValueError, match="no VSI-Bench scores"):
    average({})


def test_a_truth_of_zero_is_named():
  with pytest.raises(ZeroDivisionError, match="object_counting is 0"):
    score("0", "0", "object_counting")


def test_tasks_have_equal_weight_and_directions_are_one_task():
  scores = {name: [0.5, 0.5] for name in (*NUMBER_TYPES, *CHOICE_TYPES)}
  scores["object_counting"] = [1.0] * 100
  scores["object_rel_direction_easy"] = [1.0] * 50
  scores["object_rel_direction_medium"] = [0.0]
  scores["object_rel_direction_hard"] = [0.5, 0.0]
  direction = (1.0 + 0.0 + 0.25) / 3
  assert average(scores) == pytest.approx(100 * (1.0 + 6 * 0.5 + direction) / 8)
  means = {name: float(np.mean(values)) for name, values in scores.items()}
  assert average(means) == pytest.approx(average(scores))


def test_the_average_of_a_published_row_is_its_published_score():
  """ViLaSR-7B on VSI-Bench: 45.4 overall with appearance order at 49.3."""
  row = [0.635, 0.344, 0.606, 0.309, 0.489, 0.304, 0.493]
  names = (*NUMBER_TYPES, "object_rel_distance", "route_planning", "obj_appearance_order")
  scores = dict(zip(names, row, strict=True)) | {
    name: 0.452 for name in CHOICE_TYPES if "direction" in name
  }
  assert average(scores) == pytest.approx(45.4, abs=0.05)


def test_tasks_have_the_order_of_the_benchmark():
  tasks = task_scores(
    {"route_planning": 0.2, "object_rel_direction_hard": 0.4, "object_counting": 1}
  )
  assert list(tasks.items()) == [
    ("object_counting", 1.0),
    ("object_rel_direction", 0.4),
    ("route_planning", 0.2),
  ]
