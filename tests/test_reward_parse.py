"""The number and choice parsers, case by case, and on arbitrary text."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spatial_jax.errors import DataError
from spatial_jax.reward.parse import check_truth, expected_of, normal_words, parse_choice, read
from spatial_jax.reward.plain_text import plain
from spatial_jax.reward.quantity import COUNT, asked_unit, counted_noun, parse_number
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
  ("24.5 meters squared", "m^2", 24.5),
  ("24.5 metres-squared", "m\N{SUPERSCRIPT TWO}", 24.5),
  ("24.5 \N{SQUARE M SQUARED}", "square meters", 24.5),
  ("1 m 2 cm", "m", 1.02),
  ("4 (four)", None, 4.0),
  ("4 (four)", COUNT, 4.0),
  ("2 m (200 cm)", "m", 2.0),
  ("The correct answer is exactly 4", None, 4.0),
  ("my answer: 4", None, 4.0),
]

# Spellings of one number; each is also tried as a choice.
SPELLINGS_OF_2_5 = [
  "2.5", "\\boxed{2.5}", "\\boxed{\\text{2.5}}", "$2.5$", "$\\boxed{2.5}$", "\\(2.5\\)",
  "\\[ 2.5 \\]", "\\mathbf{2.5}", "**2.5**", "`2.5`", "__2.5__", "*2.5*", '"2.5"', "'2.5'",
  "\u201c2.5\u201d", "(2.5)", "[2.5]", "{2.5}", "\uff3b2.5\uff3d", "\u30102.5\u3011",
  "\uff12.\uff15", "\U0001d7d0.5", "\u00a02.5\u202f", "2.5\u200b", "\ufeff2.5", "2.5\u3002",
  "(2.5).", "The answer is \\boxed{2.5}.", "**Answer:** (2.5)",
]  # fmt: skip
SPELLINGS = [
  ("\\boxed{2.5 m}", "m", 2.5),
  ("2.5\\,\\text{m}", "m", 2.5),
  ("2.5\\ \\mathrm{m}", "m", 2.5),
  ("$2.5$ m", "m", 2.5),
  ("$2.5\\,m$", "m", 2.5),
  ("2.5\u00a0m", "m", 2.5),
  ("250\u202fcm", "m", 2.5),
  ("\\boxed{12\\,\\text{m}^2}", "m2", 12.0),
  ("$12\\,\\mathrm{m}^{2}$", "m2", 12.0),
  ("12 m$^2$", "m2", 12.0),
  ("\\frac{1}{2}", None, 0.5),
  ("3\\frac{1}{2}", None, 3.5),
  ("-\N{VULGAR FRACTION ONE HALF}", None, -0.5),
  ("1.5 \\times 10^{2}", None, 150.0),
  ("1.5 \N{MULTIPLICATION SIGN} 10\u00b9\u2070", None, 1.5e10),
  ("1.5 x 10\u207b\u00b2", None, 0.015),
  ("\\approx 2.5", None, 2.5),
  ("1{,}200", None, 1200.0),
  ("1\\,200", None, 1200.0),
  ("1\u202f200", None, 1200.0),
  ("12\u00a0345\u00a0678.5", None, 12345678.5),
  ("3\u00a0123/200", None, 3.615),
  *((sign + "3", None, -3.0) for sign in "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"),
  ("$-3$", None, -3.0),
]

COUNTS = [  # text, noun, value
  ("4 chairs", "chair(s)", 4.0),
  ("There are 4 chairs", "chair(s)", 4.0),
  ("There is 1 chair.", "chair(s)", 1.0),
  ("four chair(s)", "chair(s)", 4.0),
  ("\\boxed{4 \\text{ chairs}}", "chairs", 4.0),
  ("4\u00a0chairs", "chair(s)", 4.0),
  ("4 bookshelves", "bookshelf(s)", 4.0),
  ("2 boxes", "box", 2.0),
  ("3 batteries", "battery(s)", 3.0),
  ("4 trash cans", "trash can(s)", 4.0),
  ("4 cans", "trash can(s)", 4.0),
  ("4 red chairs", "red chairs", 4.0),
  ("4 chairs (four)", "chair(s)", 4.0),
  ("4 chairs", None, 4.0),
  ("4 potted plants", None, 4.0),
  ("4 tables", "chair(s)", None),
  ("4 red chairs", "chair(s)", None),
  ("4 chairs and tables", "chair(s)", None),
  ("4 chairs or 5 chairs", "chair(s)", None),
  ("4-5 chairs", "chair(s)", None),
  ("4 m", "chair(s)", None),
  ("chairs", "chair(s)", None),
  ("at least 4 chairs", "chair(s)", None),
  ("4 or five", None, None),
  ("4 or more", None, None),
  ("4 dozen", None, None),
  ("4 hundred chairs", None, None),
  ("4 percent", None, None),
  ("4 chairs 2 tables", None, None),
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
  ("4 (five)", None),
  ("2 m (3 m)", "m"),
  ("4 (approximately)", None),
  ("2,5", None),
  ("2,50 m", "m"),
  ("2\N{SUPERSCRIPT TWO}", None),
  ("2\N{SUBSCRIPT TWO}", None),
  ("2\N{CIRCLED DIGIT THREE}", None),
  ("\N{VULGAR FRACTION ONE HALF}3", None),
  ("2**3", None),
  ("2\\text{3}", None),
  ("$2$3", None),
  ("\\$3", None),
  ("\\boxed{2} or 3", None),
  ("\\boxed{2} \\boxed{3}", None),
  ("3 \\pm 1", None),
  ("1'200", None),
  ("1 000 000", None),
  ("3 meters cubed", "m"),
  ("3 meters per second", "m"),
  ("3 m/s", "m"),
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
  ("[C]", "C"),
  ("\N{FULLWIDTH LATIN CAPITAL LETTER C}", "C"),
  ("\uff08C\uff09", "C"),
  ("\N{CIRCLED LATIN CAPITAL LETTER C}", "C"),
  ("C\u3002", "C"),
  ("C\uff1asofa", "C"),
  ("C sofa", "C"),
  ("C - sofa", "C"),
  ("C \u2013 sofa", "C"),
  ("C \u2014 sofa", "C"),
  ("C, sofa", "C"),
  ("C = sofa", "C"),
  ("C (sofa)", "C"),
  ("(C) (sofa)", "C"),
  ("sofa (C)", "C"),
  ("sofa [C].", "C"),
  ("C\nsofa", "C"),
  ('"C"', "C"),
  ("\u201cC\u201d", "C"),
  ('The answer is "C".', "C"),
  ("**Answer:** C", "C"),
  ("\\boxed{C}", "C"),
  ("\\boxed{\\text{C. sofa}}", "C"),
  ("$\\textbf{(C)}$", "C"),
  ("the\u00a0sofa", "C"),
  ("C table", None),
  ("C bed or sofa", None),
  ("C or D", None),
  ("C, D", None),
  ("(C) or (D)", None),
  ('"C" or "D"', None),
  ("table (C)", None),
  ("C, a ,", None),
  ("Csofa", None),
  ("C" + " " * 2000, None),
]


def task(kind, question, options=None):
  return Task("t", "q", question, options, "", kind, None, (), "procedural", "s", None, ())


@pytest.mark.parametrize(("text", "unit", "value"), NUMBERS)
def test_a_number_phrase_has_one_value(text, unit, value):
  assert parse_number(text, unit) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("text", "unit"), NO_NUMBERS)
def test_an_ambiguous_or_foreign_phrase_is_not_a_number(text, unit):
  assert parse_number(text, unit) is None


@pytest.mark.parametrize(("text", "unit", "value"), SPELLINGS)
def test_a_spelling_does_not_change_the_number(text, unit, value):
  assert parse_number(text, unit) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", SPELLINGS_OF_2_5)
def test_number_and_choice_share_their_spellings(text):
  assert parse_number(text) == 2.5
  assert parse_choice(text, ("A. 25", "B. 2.5", "C. -2.5")) == "B"
  if "2.5" in text:
    assert parse_choice(text.replace("2.5", "B"), FOUR) == "B"


@pytest.mark.parametrize(("text", "noun", "value"), COUNTS)
def test_a_count_may_be_followed_by_the_counted_noun(text, noun, value):
  assert parse_number(text, COUNT, noun) == value


@pytest.mark.parametrize(
  ("question", "noun"),
  [
    ("How many chair(s) are in this room?", "chair(s)"),
    ("How many trash can(s) are in these images?", "trash can(s)"),
    ("In the video, how many red chairs can you see?", "red chairs"),
    ("How many chairs?", "chairs"),
    ("Count the chairs. How many?", None),
    ("How far is the chair?", None),
  ],
)
def test_the_counted_noun_is_found_in_the_question(question, noun):
  assert counted_noun(question) == noun


@pytest.mark.parametrize("unit", ["kg", "", "light years", "m3", "meters per second"])
@pytest.mark.parametrize("text", ["3", ""])
def test_an_unknown_expected_unit_is_an_error_of_the_caller(text, unit):
  with pytest.raises(ValueError, match="expected_unit"):
    parse_number(text, unit)


PIECES = st.sampled_from(
  ["1", "2.5", ",", ".", "-", "\u2212", "\u00bd", "\u00b2", "\u2082", "\u2462", " ", "\u00a0",
   "\u202f", "200", "/", "e9", "x 10^", "m", "cm", "ft", "'", '"', "square ", "\\boxed{",
   "\\text{", "}", "{", "$", "\\(", "\\)", "\\frac{1}{0}", "\\frac{1}{2}", "**", "(", ")", "[",
   "]", "the answer is ", "about ", "four", "chair", "chairs", "A", "B", "or", "%",
   "\u200b", "\ufb01", "\ufdfa", "\n"]
)  # fmt: skip
ANY_TEXT = st.text(max_size=120) | st.lists(PIECES, max_size=12).map("".join)


@given(ANY_TEXT)
@settings(deadline=None, max_examples=600)
@example("9" * 99)
@example("1/" + "9" * 98)
@example("1e" + "9" * 98)
def test_any_text_gives_a_finite_number_or_none(text):
  for unit, noun in ((None, None), (COUNT, "chair(s)"), (COUNT, None), ("cm", None), ("m2", None)):
    value = parse_number(text, unit, noun)
    assert value is None or np.isfinite(np.float32(value))


@given(ANY_TEXT)
@settings(deadline=None, max_examples=300)
def test_the_plain_form_of_a_plain_form_is_itself(text):
  once = plain(text)
  assert parse_number(once) == parse_number(text)
  assert parse_choice(once, FOUR) == parse_choice(text, FOUR)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_every_float32_is_read_back(value):
  assert parse_number(repr(value)) == value
  assert parse_number(repr(value).replace("-", "\N{MINUS SIGN}")) == value


@given(ANY_TEXT.map(lambda text: f"How long is it in {text}?") | ANY_TEXT)
@settings(deadline=None, max_examples=300)
def test_the_unit_of_any_question_can_be_expected(question):
  value = parse_number("2", asked_unit(question), counted_noun(question))
  assert value == 2.0


@pytest.mark.parametrize(
  ("question", "unit"),
  [
    ("How many chair(s) are in this room?", COUNT),
    ("What is the direct distance between the bed and the table (in meters)?", "meters"),
    ("What is the length of the bed, measured in centimeters?", "centimeters"),
    ("What is the size of this room (in square meters)? \nIf multiple", "square meters"),
    ("How many meters away is the chair?", "meters"),
    ("How far is the chair in the image, in feet?", "feet"),
    ("What number is on the door?", None),
    ("What is the size of this room (in m\N{SUPERSCRIPT TWO})?", "m^2"),
    ("Give the area in meters squared.", "meters squared"),
    ("Area in ft\N{SUPERSCRIPT TWO}?", "ft^2"),
    ("What is the area, in $m^{2}$?", "m^2"),
    ("How tall is the lamp (cm)?", "cm"),
    ("How tall is the lamp\u00a0(in\u00a0cm)?", "cm"),
    ("How large is the box in m\N{SUPERSCRIPT THREE}?", None),
    ("How large is the box in meters cubed?", None),
    ("How fast is it in meters per second?", None),
  ],
)
def test_asked_unit(question, unit):
  assert asked_unit(question) == unit


@pytest.mark.parametrize(
  "question",
  [
    "What is the size of this room (in m\N{SUPERSCRIPT TWO})?",
    "Give the area in meters squared.",
    "Area in ft\N{SUPERSCRIPT TWO}?",
    "What is the size of this room (in square meters)?",
  ],
)
def test_an_area_is_read_and_a_length_is_not(question):
  unit = asked_unit(question)
  assert parse_number("12 square meters", unit) is not None
  assert parse_number("12 m\N{SUPERSCRIPT TWO}", unit) is not None
  assert parse_number("1200 cm", unit) is None


@pytest.mark.parametrize(("text", "letter"), CHOICES)
def test_a_choice_is_a_letter_or_its_text(text, letter):
  assert parse_choice(text, FOUR) == letter


@pytest.mark.parametrize("sign", "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d")
def test_every_minus_sign_is_a_sign_in_a_choice(sign):
  options = ("A. -5", "B. 5", "C. 0")
  assert parse_choice(f"{sign}5", options) == "A"
  assert parse_choice(f"A. {sign}5", options) == "A"
  assert parse_choice(f"B. {sign}5", options) is None
  assert parse_choice("-5", (f"A. {sign}5", "B. 5", "C. 0")) == "A"


def test_the_point_of_a_number_counts_in_a_choice():
  options = ("A. 1.5", "B. 15", "C. 1,500", "D. 12 m\N{SUPERSCRIPT TWO}")
  for text, letter in (("1.5", "A"), ("15", "B"), ("1,500", "C"), ("12 m^2", "D"), ("1 5", None)):
    assert parse_choice(text, options) == letter


def test_hyphens_and_case_do_not_count_in_a_choice():
  options = ("A. front-left", "B. front-right", "C. Back Left")
  for text, letter in (("Front left", "A"), ("front\u2011right", "B"), ("back-left", "C")):
    assert parse_choice(text, options) == letter


def test_options_without_letters_are_a_b_c_in_order():
  assert parse_choice("the right", ("left", "right")) == "B"
  assert parse_choice("B", ("left", "right")) == "B"
  assert parse_choice("C", ("left", "right")) is None
  assert parse_choice("A", ("a chair", "a table")) == "A"
  assert parse_choice("a table", ("a chair", "a table")) == "B"


def test_an_ambiguous_choice_is_none():
  assert parse_choice("chair", ("A. chair", "B. chair")) is None
  assert parse_choice("B", ("A. b", "B. a")) is None


@given(st.text(max_size=200))
@settings(deadline=None, max_examples=200)
def test_any_text_is_an_option_or_none(text):
  assert parse_choice(text, FOUR) in ("A", "B", "C", "D", None)


@pytest.mark.parametrize(
  "piece", ["the ", "answer ", " ", "1,", "(", "1/1 ", "a.", "it's ", "\\boxed{", "$", "\\(", "*"]
)
def test_long_text_is_not_read(piece):
  """A reader of quadratic time would run for minutes here."""
  for text in (piece * 20_000, "answer" + piece * 20_000 + "!"):
    assert parse_number(text) is None
    assert parse_choice(text, FOUR) is None
    assert asked_unit(text) is None
    assert len(counted_noun("how many " + text) or "") <= 80


def test_a_reading_follows_the_task():
  size = task("number", "How long is it, measured in centimeters?")
  assert read("1.2 m", size) == (120.0, True)
  assert read("B", size) == (0.0, False)
  assert read(None, size) == (0.0, False)
  choice = task("choice", "Which one?", FOUR)
  assert read("sofa", choice) == (2.0, True)
  assert read("2", choice) == (0.0, False)
  assert read("A", dataclasses.replace(choice, options=None)) == (0.0, False)
  count = task("number", "How many chair(s) are in this room?")
  assert read("There are 4 chairs", count) == (4.0, True)
  assert read("4 tables", count) == (0.0, False)
  area = task("number", "What is the size of this room (in m\N{SUPERSCRIPT TWO})?")
  assert read("\\boxed{12\\,\\text{m}^2}", area) == (12.0, True)


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"answer": ""}, "cannot be read as a number in meters"),
    ({"answer": "nan"}, "cannot be read"),
    ({"answer": "1e999"}, "cannot be read"),
    ({"answer": "2,5"}, "cannot be read"),
    ({"answer": "3 m\N{SUPERSCRIPT TWO}"}, "cannot be read"),
    ({"answer": "E", "answer_kind": "choice", "options": FOUR}, "one of the options"),
    ({"answer": "A", "answer_kind": "choice", "options": None}, "needs options"),
    ({"answer": "A", "answer_kind": "choice", "options": ()}, "needs options"),
    ({"answer": "?", "answer_kind": "words"}, "no letter and no digit"),
    ({"answer": "a sofa", "answer_kind": "text"}, "no reward reads"),
    ({"answer": "about 3 m"}, "not a number alone"),
    ({"answer": "~3"}, "not a number alone"),
    ({"answer": "0"}, "the rewards of numbers divide by it"),
    ({"answer": "0.0 cm"}, "answer kind words"),
    ({"answer": "1e-50"}, "the rewards of numbers divide by it"),
    ({"answer": "-1e-40 cm"}, "the rewards of numbers divide by it"),
    ({"answer": "3 m", "unit": "degrees"}, "cannot be read as a number in degrees"),
  ],
)
def test_a_task_without_a_readable_truth_is_refused_in_one_line(changes, reason):
  broken = dataclasses.replace(
    task("number", "How far is it,\nin meters?"), task_id="room-7/lamp", **changes
  )
  with pytest.raises(DataError, match=r"task room-7/lamp: ") as raised:
    check_truth(broken)
  assert reason in str(raised.value)
  assert "\n" not in str(raised.value)


def test_a_readable_truth_is_returned_as_a_number():
  assert check_truth(dataclasses.replace(task("number", "In cm?"), answer="1 m")).value == 100.0
  choice = dataclasses.replace(task("choice", "Which?", FOUR), answer="C")
  assert check_truth(choice) == (2.0, True)
  assert math.isfinite(check_truth(choice).value)


# --- words and other units -----------------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "truth", "right"),
  [
    ("left", "left", True),
    ("The Left.", "left", True),
    ("**left**", "Left", True),
    ("\\boxed{left}", "left", True),
    ("to the left", "to left", True),
    ("front-left", "Front left", True),
    ("three", "3", True),
    ("3", "Three", True),
    ("3.5", "3.5", True),
    ("a", "A", True),
    ("the", "a", False),
    ("3.5", "35", False),
    ("lefty", "left", False),
    ("left right", "left", False),
    ("the answer is left", "left", False),
  ],
)
def test_words_are_right_or_wrong(text, truth, right):
  words = dataclasses.replace(task("words", "Where is it?"), answer=truth)
  assert read(text, words) == (float(right), True)
  assert read(truth, words) == check_truth(words) == (1.0, True)
  assert not expected_of(words).is_number


@given(st.text(max_size=60))
@settings(deadline=None, max_examples=200)
def test_words_equal_themselves_and_are_normal_after_one_pass(text):
  normal = normal_words(text)
  words = dataclasses.replace(task("words", "?"), answer=text)
  assert read(text, words) == (float(normal != ""), normal != "")
  assert normal_words(normal) == normal


def test_long_or_empty_words_are_not_read():
  words = dataclasses.replace(task("words", "?"), answer="left")
  for text in (None, "", "?!", "left " * 1000):
    assert read(text, words) == (0.0, False)


@pytest.mark.parametrize(
  ("unit", "text", "value"),
  [
    ("degrees", "90", 90.0),
    ("degrees", "-45.5 degrees", -45.5),
    ("degrees", "90\N{DEGREE SIGN}", 90.0),
    ("degrees", "about 90 Deg.", 90.0),
    ("degrees", "$90^{\\circ}$", 90.0),
    ("deg", "six degrees", 6.0),
    ("\N{DEGREE SIGN}", "90 degree", 90.0),
    ("kg", "2.5kg", 2.5),
    ("KG", "1,200 kilograms", 1200.0),
    ("s", "3 sec", 3.0),
    ("m/s", "3 m/s", 3.0),
    ("degrees", "90 m", None),
    ("degrees", "90 degrees celsius", None),
    ("degrees", "80 or 90 degrees", None),
    ("degrees", "degrees", None),
    ("s", "3 ms", 0.003),
    ("s", "3 minutes", 180.0),
    ("m/s", "3 m", None),
    ("kg", "x" * 200 + "kg", None),
    ("cm", "1 m", 100.0),
    ("m", "120 cm", 1.2),
    ("count", "4 chairs", 4.0),
  ],
)
def test_the_unit_of_a_task_replaces_that_of_its_question(unit, text, value):
  asked = dataclasses.replace(task("number", "How large is it, in feet?"), unit=unit)
  assert read(text, asked) == (pytest.approx(value or 0.0), value is not None)


@given(st.text(max_size=40), st.text(max_size=10))
@settings(deadline=None, max_examples=200)
def test_any_text_and_any_unit_can_be_read(text, unit):
  value, parsed = read(text, dataclasses.replace(task("number", "?"), unit=unit))
  assert math.isfinite(value)
  assert parsed or value == 0.0
