"""The number and choice parsers, case by case, and on arbitrary text."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.reward.parse import COUNT, asked_unit, parse_choice, parse_number, read
from spatial_jax.types import Task

NUMBERS = [  # text, expected unit, value
  ("4", None, 4.0),
  ("2.35", None, 2.35),
  (".5", None, 0.5),
  ("3.", None, 3.0),
  ("-3", None, -3.0),
  ("\N{MINUS SIGN}3", None, -3.0),
  ("+3", None, 3.0),
  (" 4\n", None, 4.0),
  ("**4**", None, 4.0),
  ("\N{FULLWIDTH DIGIT FOUR}", None, 4.0),
  ("1,200", None, 1200.0),
  ("12,345,678.5", None, 12345678.5),
  ("1.5e2", None, 150.0),
  ("1.5E-2", None, 0.015),
  ("1.5 x 10^2", None, 150.0),
  ("1.5 \N{MULTIPLICATION SIGN} 10^-2", None, 0.015),
  ("1/2", None, 0.5),
  ("3 1/2", None, 3.5),
  ("-3 1/2", None, -3.5),
  ("3½", None, 3.5),
  ("½", None, 0.5),
  ("zero", None, 0.0),
  ("Twelve", None, 12.0),
  ("sixteen", None, 16.0),
  ("twenty.", None, 20.0),
  ("three feet", "ft", 3.0),
  ("about 2.35 meters", None, 2.35),
  ("about 2.35 meters", "m", 2.35),
  ("approximately 2.35 metres.", "m", 2.35),
  ("approx. 2.35m", "m", 2.35),
  ("~2.35 m", "m", 2.35),
  ("≈ 2.35 m.", "m", 2.35),
  ("The answer is 2.35.", "m", 2.35),
  ("The final answer is: 2.35 meters.", "m", 2.35),
  ("There are 4", COUNT, 4.0),
  ("It's roughly 4", COUNT, 4.0),
  ("= 4", COUNT, 4.0),
  ("235 cm", "m", 2.35),
  ("235cm", "meters", 2.35),
  ("2350 millimeters", "m", 2.35),
  ("0.002 km", "m", 2.0),
  ("2 Meters", "centimeters", 200.0),
  ("10 ft", "m", 3.048),
  ("1 foot", "in", 12.0),
  ("10 in.", "cm", 25.4),
  ('10"', "cm", 25.4),
  ("5'3\"", "in", 63.0),
  ("5 ft 3 in", "in", 63.0),
  ("5 ft 3 in", None, 5.25),
  ("1 m 20 cm", "m", 1.2),
  ("3 1/2 feet", "ft", 3.5),
  ("24.5 square meters", "square meters", 24.5),
  ("24.5 m²", "square meters", 24.5),
  ("24.5 m2", "m2", 24.5),
  ("24.5 m^2", "sq m", 24.5),
  ("24.5 sq. m", "m^2", 24.5),
  ("24.5 sqm", "m2", 24.5),
  ("100 square feet", "square meters", 9.290304),
  ("100 sqft", "m2", 9.290304),
  ("20,000 cm²", "m2", 2.0),
  ("24.5", "square meters", 24.5),
]

NO_NUMBERS = [
  ("", None),
  (" ", None),
  (".", None),
  ("A", None),
  ("chair", None),
  ("about", None),
  ("meters", "m"),
  ("2 or 3", None),
  ("2, 3", None),
  ("2 3", None),
  ("4 (four)", None),
  ("2-3", None),
  ("2 - 3", None),
  ("2\N{EN DASH}3", None),
  ("2 to 3 meters", "m"),
  ("between 2 and 3", None),
  ("at least 2", None),
  ("less than 2", None),
  ("> 2", None),
  ("2+", None),
  ("2 ± 1", None),
  ("not 2", None),
  ("nan", None),
  ("inf", None),
  ("-Infinity", None),
  ("1e400", None),
  ("1e39", None),
  ("1" + "0" * 60, None),
  ("1/0", None),
  ("1/2/3", None),
  ("2.35.1", None),
  ("1,20", None),
  ("1,2000", None),
  ("0,500", None),
  ("1234,567", None),
  ("1_000", None),
  ("0x10", None),
  ("3²", None),
  ("3^2", None),
  ("2*3", None),
  ("twenty-one", None),
  ("two hundred", None),
  ("3 kg", "m"),
  ("3 %", None),
  ("$3", None),
  ("3 m", "square meters"),
  ("3 m²", "m"),
  ("3 m³", None),
  ("3 cubic meters", "m"),
  ("3 m", COUNT),
  ("2 m x 3 m", "m"),
  ("3 in 5 ft", "in"),
  ("5 ft 3", "ft"),
  ("-5 ft 3 in", "ft"),
  ("2 m2 3 cm2", "m2"),
  ("3" + " " * 300 + "4", None),
  ("3 " * 60, None),
  ("<answer>3</answer>", None),
]

FOUR = ("A. table", "B. the red chair", "C. sofa", "D. bed")
CHOICES = [
  ("A", "A"),
  ("b", "B"),
  ("A.", "A"),
  ("A)", "A"),
  ("A:", "A"),
  ("(A)", "A"),
  (" C \n", "C"),
  ("**C**", "C"),
  ("C. sofa", "C"),
  ("(C) Sofa.", "C"),
  ("C: the sofa", "C"),
  ("sofa", "C"),
  ("The sofa.", "C"),
  ("red chair", "B"),
  ("the answer is B", "B"),
  ("The correct answer is: (B).", "B"),
  ("Answer: D", "D"),
  ("Option D", "D"),
  ("The answer is the bed", "D"),
  ("", None),
  ("E", None),
  ("A or B", None),
  ("A, B", None),
  ("A. sofa", None),
  ("AB", None),
  ("a sofa", "C"),
  ("chair", None),
  ("table and sofa", None),
  ("none of them", None),
  ("3", None),
  ("I do not know", None),
]


def task(kind, question, options=None):
  return Task("t", "q", question, options, "", kind, (), "procedural", "s", None, ())


def test_the_table_is_long_enough():
  assert len(NUMBERS) + len(NO_NUMBERS) >= 60


@pytest.mark.parametrize(("text", "unit", "value"), NUMBERS)
def test_numbers(text, unit, value):
  assert parse_number(text, unit) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("text", "unit"), NO_NUMBERS)
def test_what_is_no_number(text, unit):
  assert parse_number(text, unit) is None


@pytest.mark.parametrize("unit", ["kg", "", "light years", "m3", "meters per second"])
def test_an_unknown_expected_unit_is_the_callers_mistake(unit):
  with pytest.raises(ValueError, match="expected_unit"):
    parse_number("3", unit)


@given(st.text(max_size=120) | st.text(alphabet="0123456789.,-+/ eEx^²'\"mcftinsq%", max_size=40))
@settings(deadline=None, max_examples=400)
def test_any_text_gives_a_finite_number_or_none(text):
  for unit in (None, COUNT, "cm", "square meters"):
    value = parse_number(text, unit)
    assert value is None or np.isfinite(np.float32(value))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_every_float32_is_read_back(value):
  assert parse_number(repr(value)) == value


@pytest.mark.parametrize(
  ("question", "unit"),
  [
    ("How many chair(s) are in this room?", COUNT),
    ("What is the direct distance between the bed and the table (in meters)?", "meters"),
    ("What is the length of the bed, measured in centimeters?", "centimeters"),
    ("What is the size of this room (in square meters)? \nIf multiple", "square meters"),
    ("How many meters away is the chair?", "meters"),
    ("How far is the chair in the picture, in feet?", "feet"),
    ("What number is on the door?", None),
  ],
)
def test_asked_unit(question, unit):
  assert asked_unit(question) == unit


@pytest.mark.parametrize(("text", "letter"), CHOICES)
def test_choices(text, letter):
  assert parse_choice(text, FOUR) == letter


def test_options_without_letters_are_counted_from_a():
  assert parse_choice("the right", ("left", "right")) == "B"
  assert parse_choice("B", ("left", "right")) == "B"
  assert parse_choice("C", ("left", "right")) is None


def test_an_ambiguous_text_is_none():
  assert parse_choice("chair", ("A. chair", "B. chair")) is None
  assert parse_choice("B", ("A. b", "B. a")) is None


@given(st.text(max_size=200))
@settings(deadline=None, max_examples=200)
def test_any_text_is_an_option_or_none(text):
  assert parse_choice(text, FOUR) in ("A", "B", "C", "D", None)


@pytest.mark.parametrize("piece", ["the ", "answer ", " ", "1,", "(", "1/1 ", "a.", "it's "])
def test_long_text_is_read_in_no_time(piece):
  start = time.perf_counter()
  for text in (piece * 20_000, "answer" + piece * 20_000 + "!"):
    parse_number(text)
    parse_choice(text, FOUR)
  assert time.perf_counter() - start < 1.0


def test_reading_follows_the_task():
  size = task("number", "How long is it, measured in centimeters?")
  assert read("1.2 m", size) == (120.0, True)
  assert read("B", size) == (0.0, False)
  assert read(None, size) == (0.0, False)
  choice = task("choice", "Which one?", FOUR)
  assert read("sofa", choice) == (2.0, True)
  assert read("2", choice) == (0.0, False)
  assert read("A", dataclasses.replace(choice, options=None)) == (0.0, False)
