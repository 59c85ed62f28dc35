"""Problems of physics: values by an independent table of formulas, units, texts and diagrams."""

import dataclasses
import math
import re

import numpy as np
import pytest

from configs import sources, tiny_defaults
from spatial_jax.config import ConfigError, build
from spatial_jax.reward.principles import KEYWORDS, names_principle
from spatial_jax.reward.units import Measure, dimension, read_measure, value_in
from spatial_jax.synthetic.physics import (
  CATEGORIES,
  TEMPLATES,
  PhysicsConfig,
  draw_diagram,
  number_text,
  physics_tasks,
  problem_task,
  problem_text,
)

PI, C, K = math.pi, 299_792_458, 8.9876e9
# Name of a template -> unit of the result, and the result of the given values, all in SI units;
# temperatures in degrees Celsius.
FORMULAS = {
  "incline": ("m/s^2", lambda x: x["g"] * math.sin(x["angle"])),
  "pulley": ("m/s^2", lambda x: x["g"] * (x["m1"] - x["m2"]) / (x["m1"] + x["m2"])),
  "projectile": ("m", lambda x: x["speed"] * (x["height"] / (x["g"] / 2)) ** 0.5),
  "piston": ("m^3", lambda x: x["V1"] / (x["p2"] / x["p1"])),
  "mixing": ("K", lambda x: np.average([x["T1"], x["T2"]], weights=[x["m1"], x["m2"]])),
  "engine": ("J", lambda x: x["heat"] - x["work"]),
  "decay": ("kg", lambda x: x["mass"] * math.exp(-math.log(2) * x["time"] / x["half-life"])),
  "photoelectric": ("J", lambda x: x["photon energy"] - x["work function"]),
  "dilation": ("s", lambda x: x["proper time"] / math.sin(math.acos(x["speed"] / C))),
  "resistors": ("ohm", lambda x: x["R1"] + 1 / (1 / x["R2"] + 1 / x["R3"])),
  "charges": ("N", lambda x: K * x["q1"] * x["q2"] / x["distance"] ** 2),
  "field": ("V/m", lambda x: K * x["charge"] / x["distance"] ** 2),
  "standing": ("m", lambda x: x["length"] / (x["loops"] / 2)),
  "echo": ("m", lambda x: x["speed of sound"] * x["delay"] / 2),
  "wave": ("m/s", lambda x: x["wavelength"] / (1 / x["frequency"])),
  "lens": ("m", lambda x: x["f"] * x["object distance"] / (x["object distance"] - x["f"])),
  "mirror": ("m", lambda x: x["R"] * x["object distance"] / (2 * x["object distance"] - x["R"])),
  "slits": ("m", lambda x: x["wavelength"] / x["slit distance"] * x["screen"]),
}
SI = ("K", "m", "kg", "s", "C", "Pa", "J", "ohm", "Hz", "m/s", "m/s^2", "m^3", "rad")
CONSTANTS = ("g", "speed of sound")  # known without the diagram
SHOWN_BY_SHAPE = ("loops",)  # of the drawn wave
SEEDS = range(12)
SIDES_PX = (168, 448)

BY_NAME = {
  template(np.random.default_rng(0)).name: template
  for templates in TEMPLATES.values()
  for template in templates
}
EACH = pytest.mark.parametrize("name", BY_NAME)


def problems(name):
  return [BY_NAME[name](np.random.default_rng(seed)) for seed in SEEDS]


def config(cfg=None, **changes):
  cfg = cfg or sources.source().physics
  cfg.update(changes)
  return build(PhysicsConfig, cfg.to_dict())


def tasks(count=80, **changes):
  make = physics_tasks(config(tiny_defaults.source().physics, **changes))
  return [make(number)[0] for number in range(count)]


def numbers(text):
  """The numbers of a text; those of names (V1, T2) are none."""
  return [float(found) for found in re.findall(r"(?<![A-Za-z\d.])\d+(?:\.\d+)?", text)]


def labels(problem):
  return [shape.text for shape in problem.shapes if shape.kind == "text"]


def in_si(text):
  measure = read_measure(text)
  assert measure is not None, text
  return next(value for unit in SI if (value := value_in(measure, unit)) is not None)


# --- values, units and solutions -----------------------------------------------------------------


def test_six_domains_have_three_templates_each_and_all_occur():
  assert len(CATEGORIES) == 6
  assert all(len(templates) >= 3 for templates in TEMPLATES.values())
  assert set(BY_NAME) == set(FORMULAS), "a new template needs its formula here"
  assert {task.extra["template"] for task in tasks(300)} == set(BY_NAME)
  for category, templates in TEMPLATES.items():
    made = [template(np.random.default_rng(1)) for template in templates]
    assert {problem.category for problem in made} == {category}


@EACH
def test_the_value_is_that_of_the_formula(name):
  unit, formula = FORMULAS[name]
  made = problems(name)
  for problem in made:
    given = {key: in_si(text) for key, text in problem.given}
    expected = value_in(Measure(float(formula(given)), unit), problem.unit)
    assert expected is not None, "the unit has the dimension of the formula"
    assert problem.value == pytest.approx(expected, rel=1e-3)
    assert problem.value > 0
  assert len({problem.value for problem in made}) > 2


@EACH
def test_units_are_read_and_answers_keep_three_digits(name):
  for problem in problems(name):
    assert dimension(problem.unit), "known, and not a pure number"
    text = number_text(problem.value)
    measure = read_measure(f"{text} {problem.unit}")
    assert measure.unit == problem.unit
    assert measure.value == pytest.approx(problem.value, rel=5.1e-3)
    assert "e" not in text


@pytest.mark.parametrize("value", [0.0012345, 0.0899, 1.0, 9.996, 12.345, 999.6, 44_950.0, -2.5])
def test_numbers_are_written_without_an_exponent(value):
  assert re.fullmatch(r"-?\d+(\.\d+)?", number_text(value))
  assert float(number_text(value)) == pytest.approx(value, rel=5e-3)
  assert number_text(0) == "0"


@EACH
def test_the_solution_names_the_principle_and_ends_with_the_value(name):
  for problem in problems(name):
    assert problem.subfield in KEYWORDS
    assert names_principle(problem.solution, problem.subfield, problem.principle)
    found = numbers(problem.solution)
    assert found[-1] == pytest.approx(problem.value, rel=6e-3)
    for key, text in problem.given:
      stated = key in CONSTANTS or name == "decay" or numbers(text)[0] in found
      assert stated, f"{key} is a step of the solution"


# --- diagrams ------------------------------------------------------------------------------------


@EACH
def test_the_diagram_shows_every_number_that_is_given(name):
  for problem in problems(name):
    shown = numbers(" ".join(labels(problem)))
    for key, text in problem.given:
      if key not in (*CONSTANTS, *SHOWN_BY_SHAPE):
        assert numbers(text)[0] in shown, key


def test_a_standing_wave_is_drawn_with_its_loops():
  for problem in problems("standing"):
    loops = int(dict(problem.given)["loops"])
    curve = max((s.points for s in problem.shapes if s.kind == "line"), key=len)
    heights = np.array(curve[1::2]) - curve[1]
    inside = heights[np.abs(heights) > 1e-6]
    assert (np.diff(np.sign(inside)) != 0).sum() + 1 == loops


def ink(problem, shape, size_px):
  """bool [height, width], what one label covers."""
  alone = dataclasses.replace(problem, shapes=(shape._replace(color="black"),))
  return draw_diagram(alone, size_px).min(axis=2) < 200


@EACH
@pytest.mark.parametrize("size_px", SIDES_PX)
def test_labels_lie_in_the_image_and_apart_from_one_another(name, size_px):
  for problem in problems(name):
    covered = np.zeros((size_px, size_px), int)
    for shape in problem.shapes:
      if shape.kind == "text":
        mask = ink(problem, shape, size_px)
        covered += mask
        assert mask.sum() > 4, f"{shape.text} is drawn"
        edge = np.concatenate([mask[[0, -1]].ravel(), mask[:, [0, -1]].ravel()])
        assert not edge.any(), f"{shape.text} is cut off"
    assert covered.max() == 1, "a label covers another one"


@EACH
def test_shapes_lie_in_the_image(name):
  for problem in problems(name):
    for shape in problem.shapes:
      assert len(shape.points) % 2 == 0
      assert all(0 <= point <= 1 for point in shape.points)
      if shape.kind in ("box", "disc"):
        x1, y1, x2, y2 = shape.points
        assert x1 < x2
        assert y1 < y2
    assert draw_diagram(problem, 168).shape == (168, 168, 3)


# --- texts ---------------------------------------------------------------------------------------


@EACH
def test_texts_of_a_lower_level_are_parts_of_those_of_a_higher_one(name):
  for problem in problems(name):
    full = problem_text(problem, "full", in_text=True)
    shorter, minimal = (
      problem_text(problem, level, in_text=False) for level in ("de_redundant", "minimal")
    )
    assert minimal == problem.question
    assert shorter == f"{problem.scene} {minimal}"
    assert full.startswith(problem.scene)
    assert full.endswith(minimal)
    for key, text in problem.given:
      assert f"{key} = {text}" in full
      assert text not in shorter


@EACH
@pytest.mark.parametrize("level", ["full", "de_redundant", "minimal"])
def test_a_spatial_problem_has_no_number_in_its_text(name, level):
  for problem in problems(name):
    assert not re.search(r"\d", problem_text(problem, level, in_text=False))


# --- tasks ---------------------------------------------------------------------------------------


def test_a_number_always_gives_the_same_task():
  for first, again in zip(tasks(20), tasks(20), strict=True):
    np.testing.assert_array_equal(first.media[0].data, again.media[0].data)
    blank = [dataclasses.asdict(dataclasses.replace(one, media=())) for one in (first, again)]
    assert blank[0] == blank[1]


def test_a_choice_has_four_different_values_and_one_is_right():
  made = tasks(choice_fraction=1.0)
  for task in made:
    assert task.answer_kind == "choice"
    assert task.unit is None
    assert [option[:3] for option in task.options] == ["A. ", "B. ", "C. ", "D. "]
    measures = [read_measure(option[3:]) for option in task.options]
    assert len({measure.value for measure in measures}) == 4
    truth = read_measure(task.extra["key"])
    right = [measure == truth for measure in measures]
    assert right.count(True) == 1
    assert task.answer == "ABCD"[right.index(True)]
    for measure in measures:
      assert measure == truth or abs(measure.value / truth.value - 1) > 0.3, "far from the truth"
  shares = [np.mean([task.answer == letter for task in made]) for letter in "ABCD"]
  assert min(shares) > 0.1


def test_a_number_states_its_unit_apart_from_the_answer():
  for task in tasks(choice_fraction=0.0):
    assert (task.answer_kind, task.options) == ("number", None)
    assert task.extra["key"] == f"{task.answer} {task.unit}"
    assert numbers(task.answer) == [float(task.answer)]


def test_the_fractions_of_the_config_are_those_of_the_tasks():
  levels = ("full", "full", "full", "minimal")
  made = tasks(400, choice_fraction=0.3, spatial_fraction=0.6, text_levels=levels)
  assert 0.22 < np.mean([task.answer_kind == "choice" for task in made]) < 0.38
  spatial = [task.extra["reasoning_type"] == ["Spatial Relation"] for task in made]
  assert 0.62 < np.mean(spatial) < 0.78
  for task, is_spatial in zip(made, spatial, strict=True):
    assert bool(re.search(r"\d", task.question)) == (not is_spatial)


def test_a_task_has_the_fields_that_tables_and_rubric_read():
  levels = ("full", "de_redundant")
  for task in tasks(text_levels=levels):
    extra = task.extra
    assert extra["category"] == task.question_type
    assert extra["category"] in CATEGORIES
    assert extra["subfield"] in KEYWORDS
    assert names_principle(extra["solution"], extra["subfield"], extra["principle"])
    assert extra["text_level"] in levels
    assert task.task_id == f"{task.scene_id}/{extra['template']}"


def test_categories_limit_the_tasks():
  for category in CATEGORIES:
    assert {task.question_type for task in tasks(8, categories=(category,))} == {category}


def test_a_given_problem_becomes_its_task():
  problem = problems("echo")[0]
  cfg = config(choice_fraction=0.0, spatial_fraction=1.0, text_levels=("minimal",), size_px=200)
  task = problem_task(problem, 7, np.random.default_rng(0), cfg)
  assert task.question == problem.question
  assert task.scene_id == "problem-7"
  np.testing.assert_array_equal(task.media[0].data, draw_diagram(problem, 200))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"categories": ("Chemistry",)}, r"categories is \('Chemistry',\) and must be of Mechanics,"),
    ({"text_levels": ()}, r"config\.text_levels is \(\) and must be of full, de_redundant"),
    ({"text_levels": ("short",)}, r"config\.text_levels\[0\] must be one of full, de_redundant"),
    ({"choice_fraction": 1.1}, r"config\.choice_fraction is 1\.1 .* at most 1"),
    ({"spatial_fraction": -0.1}, r"config\.spatial_fraction is -0\.1 .* at least 0"),
    ({"size_px": 40}, r"config\.size_px is 40 and must be a whole number, at least 140"),
  ],
)
def test_values_out_of_range_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message) as caught:
    config(**changes)
  assert "\n" not in str(caught.value)
