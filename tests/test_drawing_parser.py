"""The drawing notation: a corpus of 200 turns, error codes, arbitrary text, and writing turns."""

import dataclasses
import json
import math
import pathlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spatial_jax.config import ConfigError
from spatial_jax.drawing.lenient_json import read_items
from spatial_jax.drawing.parser import Coordinates, Limits, parse
from spatial_jax.rollout.demonstration import write_answer, write_turn
from spatial_jax.types import Operation

CORPUS = json.loads((pathlib.Path(__file__).parent / "golden/drawing_corpus.json").read_text())
LIMITS = Limits(blocks=4, block_chars=2000, depth=6, operations=8, label_chars=32, digits=6)
PIXELS = Coordinates("pixels", ((616, 336), (448, 448)))
PER_MILLE = Coordinates("per_mille", ((616, 336), (448, 448), (168, 170)))
CODES = {
  "bad_json", "too_deep", "block_too_long", "too_many_blocks", "too_many_operations",
  "label_too_long", "not_an_object", "unknown_item", "missing_index", "bad_index", "no_such_image",
  "bad_points", "not_a_number", "not_finite", "huge_number", "outside_image", "missing_label",
  "bad_label",
}  # fmt: skip


def _fenced(block: str) -> str:
  return f"<think> x </think> Action: Object Mapper\n```json\n{block}\n```"


def _codes(block: str) -> list[str]:
  return [error.code for error in parse(_fenced(block), PIXELS, LIMITS).errors]


# --- valid turns and obvious mistakes ------------------------------------------------------------


def test_the_corpus_has_200_cases():
  assert len(CORPUS) == 200


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case["name"])
def test_a_turn_of_the_corpus_gives_its_operations(case):
  coordinates = Coordinates(case["unit"], tuple(map(tuple, case["sizes"])))
  parsed = parse(case["text"], coordinates, LIMITS)
  expected = tuple(
    Operation(tool, image, tuple(points), label)
    for tool, image, points, label in case["operations"]
  )
  assert parsed.operations == expected
  assert parsed.errors == ()


def test_turns_in_the_published_notation_are_read():
  """Three turns: two drawings with one label that moves, then the answer."""
  box = '{"index": 3, "bbox_2d": [120, 80, %d, %d], "label": "table"}'
  turns = [
    "<think> The table is visible in frame 3. I mark it. </think> Action: Object Mapper\n"
    f"```json\n[{box % (300, 210)}]\n```",
    "<think> The box in image 17 misses the right edge of the table. </think> "
    f"Action: Object Mapper\n```json\n[{box % (342, 214)}]\n```",
    "<think> Image 18 is right. There is one table. </think> Action: Answer\n<answer> 1 </answer>",
  ]
  coordinates = Coordinates("pixels", ((616, 336),) * 18)
  parsed = [parse(turn, coordinates, LIMITS) for turn in turns]
  assert all(p.well_formed and not p.errors for p in parsed)
  assert [p.answer_text for p in parsed] == [None, None, "1"]
  first, second = parsed[0].operations[0], parsed[1].operations[0]
  assert first == Operation("box", 3, (120, 80, 300, 210), "table")
  assert second.label == first.label
  assert second.points_4 == (120, 80, 342, 214)


# --- errors ------------------------------------------------------------------------------------

ITEM = '{"index": 1, "bbox_2d": [1, 2, 3, 4], "label": "a"}'


def _with(**changes: str) -> str:
  """A box item with some values replaced by raw text; an empty text leaves the key out."""
  values = {"index": "1", "bbox_2d": "[1, 2, 3, 4]", "label": '"a"'} | changes
  return "[{" + ", ".join(f'"{k}": {v}' for k, v in values.items() if v) + "}]"


@pytest.mark.parametrize(
  ("block", "code"),
  [
    ("", "bad_json"),
    ("nothing to draw", "bad_json"),
    (f"[{ITEM}] as asked", "bad_json"),
    (f"boxes = [{ITEM}]", "bad_json"),
    ('[{"index": 1, "bbox_2d": [1, 2, 3, 4], "label": "a', "bad_json"),
    ('[{"index": 1, "bbox_2d":', "bad_json"),
    ("[__import__('os').system('true')]", "bad_json"),
    ("[" * 50 + "]" * 50, "too_deep"),
    ("[" * 1900, "too_deep"),
    (f"[{ITEM}," + " " * 2000 + "]", "block_too_long"),
    ("[[[1, 2]]]", "not_an_object"),
    ("[3]", "not_an_object"),
    ('["bbox_2d"]', "not_an_object"),
    ("[null]", "not_an_object"),
    ("[{}]", "unknown_item"),
    ('[{"index": 1, "point_2d": [1, 2], "label": "a"}]', "unknown_item"),
    ('[{"index": 1, "start_point_2d": [1, 2], "label": "a"}]', "unknown_item"),
    (_with(index=""), "missing_index"),
    (_with(index='"1"'), "bad_index"),
    (_with(index="true"), "bad_index"),
    (_with(index="1.5"), "bad_index"),
    (_with(index="NaN"), "bad_index"),
    (_with(index="Infinity"), "bad_index"),
    (_with(index="[1]"), "bad_index"),
    (_with(index="0"), "no_such_image"),
    (_with(index="-1"), "no_such_image"),
    (_with(index="3"), "no_such_image"),
    (_with(index="1e300"), "no_such_image"),
    (_with(bbox_2d="[1, 2, 3]"), "bad_points"),
    (_with(bbox_2d="[1, 2, 3, 4, 5]"), "bad_points"),
    (_with(bbox_2d="[[1, 2], [3, 4]]"), "bad_points"),
    (_with(bbox_2d='{"x": 1}'), "bad_points"),
    (_with(bbox_2d="7"), "bad_points"),
    (_with(bbox_2d="[1, 2, 3, [4]]"), "not_a_number"),
    (_with(bbox_2d='[1, 2, 3, "4"]'), "not_a_number"),
    (_with(bbox_2d="[1, 2, 3, true]"), "not_a_number"),
    (_with(bbox_2d="[1, 2, 3, null]"), "not_a_number"),
    (_with(bbox_2d="[1, 2, 3, NaN]"), "not_finite"),
    (_with(bbox_2d="[1, 2, -Infinity, 4]"), "not_finite"),
    (_with(bbox_2d="[1, 2, 3, 1e400]"), "not_finite"),
    (_with(bbox_2d="[1, 2, 3, " + "9" * 1500 + "]"), "not_finite"),
    (_with(bbox_2d="[0, 0, 1000000000, 1000000000]"), "huge_number"),
    (_with(bbox_2d="[0, 0, 1e6, 1]"), "huge_number"),
    (_with(bbox_2d="[617, 2, 700, 4]"), "outside_image"),
    (_with(bbox_2d="[-9, -9, -1, 4]"), "outside_image"),
    (
      '[{"index": 1, "start_point_2d": [1, 2], "end_point_2d": [1, 337], "label": "a"}]',
      "outside_image",
    ),
    (
      '[{"index": 1, "start_point_2d": [-1, 2], "end_point_2d": [1, 3], "label": "a"}]',
      "outside_image",
    ),
    (_with(label=""), "missing_label"),
    (_with(label="5"), "bad_label"),
    (_with(label='["a"]'), "bad_label"),
    (_with(label="null"), "bad_label"),
    (_with(label='"a\\nb"'), "bad_label"),
    (_with(label='"a\\u0000b"'), "bad_label"),
    (_with(label='"' + "a" * 33 + '"'), "label_too_long"),
  ],
)
def test_a_wrong_block_or_item_gives_its_error_code(block, code):
  parsed = parse(_fenced(block), PIXELS, LIMITS)
  assert [error.code for error in parsed.errors] == [code]
  assert parsed.operations == ()
  assert code in CODES


def test_valid_items_of_a_block_are_read_beside_wrong_ones():
  parsed = parse(_fenced(f"[7, {ITEM}, {{}}, {ITEM}]"), PIXELS, LIMITS)
  assert len(parsed.operations) == 2
  assert [error.code for error in parsed.errors] == ["not_an_object", "unknown_item"]


def test_text_over_a_limit_is_cut_with_an_error():
  assert _codes("[" + ",".join([ITEM] * 9) + "]") == ["too_many_operations"]
  assert len(parse(_fenced("[" + ",".join([ITEM] * 9) + "]"), PIXELS, LIMITS).operations) == 8
  many = parse("\n".join([_fenced(f"[{ITEM}]")] * 5), PIXELS, LIMITS)
  assert len(many.operations) == 4
  assert [error.code for error in many.errors] == ["too_many_blocks"]


def test_a_label_has_no_lone_surrogate():
  parsed = parse(_fenced(_with(label='"a\\ud800b"')), PIXELS, LIMITS)
  assert parsed.operations[0].label == "a\ufffdb"
  parsed.operations[0].label.encode()


# --- arbitrary text ----------------------------------------------------------------------------

PIECES = st.sampled_from(
  ["```json\n", "```", "\n", "[", "]", "{", "}", "(", ")", ",", ":", '"', "'", "\\", "\\u",
   "\\ud83d", "index", "bbox_2d", "start_point_2d", "end_point_2d", "label", '"index": 1',
   '"bbox_2d": [',
   "1, 2, 3, 4]", '"label": "a"', ITEM, "0", "-1", "1e999", "NaN", "-Infinity", "true", "None",
   "9" * 400, "//", "/*", "*/", "#", " ", "<think>", "</think>", "Action:", "<answer>", "</answer>",
   "\u201c", "\u201d", "\x00", "\ud800", "\U0001f600"]
)  # fmt: skip
SCRAPS = st.lists(PIECES, max_size=40).map("".join)
BYTES = st.binary(max_size=300).map(lambda b: b.decode("latin-1"))
TEXTS = st.one_of(
  st.text(max_size=300), SCRAPS, BYTES, st.one_of(SCRAPS, st.text(), BYTES).map(_fenced)
)


@settings(max_examples=600, deadline=None)
@given(TEXTS)
@example(_fenced("[}"))
@example(_fenced('[["a": 1]]'))
@example(_fenced("{]" * 100))
def test_any_text_is_read_within_the_limits(text):
  parsed = parse(text, PIXELS, LIMITS)
  assert parsed == parse(text, PIXELS, LIMITS)
  assert len(parsed.operations) <= LIMITS.operations
  assert len(parsed.errors) <= LIMITS.operations + LIMITS.blocks + 2
  assert {error.code for error in parsed.errors} <= CODES
  assert all(len(error.detail) < 200 for error in parsed.errors)
  for operation in parsed.operations:
    (x1, y1, x2, y2), (width, height) = operation.points_4, PIXELS.sizes[operation.image - 1]
    assert 0 <= min(x1, x2) <= max(x1, x2) <= width
    assert 0 <= min(y1, y2) <= max(y1, y2) <= height
    assert len(operation.label) <= LIMITS.label_chars
    operation.label.encode()


VALUES = st.recursive(
  st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
  lambda inner: (
    st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
  ),
  max_leaves=12,
)
FIELDS = st.fixed_dictionaries(
  {},
  optional={
    "index": st.just(1) | VALUES,
    "bbox_2d": st.lists(st.integers(-50, 700) | VALUES, min_size=3, max_size=5) | VALUES,
    "start_point_2d": st.lists(st.integers(0, 300), min_size=2, max_size=2) | VALUES,
    "end_point_2d": st.lists(st.integers(0, 300), min_size=2, max_size=2) | VALUES,
    "label": st.text(max_size=40) | VALUES,
  },
)


@settings(max_examples=300, deadline=None)
@given(st.lists(FIELDS | VALUES, max_size=10))
def test_each_item_gives_one_operation_or_one_error(items):
  block = json.dumps(items)
  parsed = parse(_fenced(block), PIXELS, LIMITS)
  read = min(len(items), LIMITS.operations)
  codes = [error.code for error in parsed.errors]
  if not {"too_deep", "block_too_long", "bad_json"} & set(codes):
    over = len(items) > LIMITS.operations
    assert len(parsed.operations) + len(codes) == read + over


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, max_size=4))
def test_valid_json_is_read_as_json(values):
  text = json.dumps(values)
  expected = json.loads(text, parse_int=float)
  assert repr(read_items(text, 100)) == repr(expected)  # repr: NaN differs from itself


@pytest.mark.parametrize(
  "text",
  [
    "<answer>" * 20_000,
    "<think>" + "</think>" * 20_000,
    "```json\n" * 20_000,
    "```json\n" + "/*" * 20_000,
    "```json\n" + "[" * 60_000,
    " " * 100_000 + "```json",
    "<think></think>" + " \n" * 50_000,
  ],
)
def test_long_text_has_no_operations(text):
  """A reader of quadratic time would run for minutes here."""
  assert parse(text, PIXELS, Limits(4, 200_000, 6, 8, 32, 6)).operations == ()


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("blocks", 0), ("block_chars", -1), ("depth", 0), ("depth", 101), ("operations", 2.0),
    ("label_chars", None), ("digits", 0), ("digits", 16), ("digits", True),
  ],
)  # fmt: skip
def test_limits_out_of_range_are_refused(field, value):
  with pytest.raises(ConfigError, match=f"^{field} is .* and must be "):
    dataclasses.replace(LIMITS, **{field: value})


def test_the_deepest_allowed_block_is_read():
  deepest = dataclasses.replace(LIMITS, depth=100)
  for depth, code in ((100, "not_an_object"), (101, "too_deep")):
    errors = parse(_fenced("[" * depth + "]" * depth), PIXELS, deepest).errors
    assert [error.code for error in errors] == [code]


def test_limits_are_optional():
  assert (
    parse(_fenced(f"[{ITEM}]"), PIXELS).operations
    == parse(_fenced(f"[{ITEM}]"), PIXELS, LIMITS).operations
  )


# --- writing turns -------------------------------------------------------------------------------

LABEL = st.text(max_size=32).filter(lambda s: s.isprintable() and "```" not in s)
WORDS = st.text(max_size=50).filter(
  lambda s: not any(tag in s for tag in ("<", "```", "\ud800")) and s.isprintable()
)


@st.composite
def _written_operations(draw, coordinates: Coordinates):
  """Operations of one tool whose written coordinates are whole numbers."""
  tool = draw(st.sampled_from(["box", "line"]))
  operations = []
  for _ in range(draw(st.integers(1, 4))):
    image = draw(st.integers(1, len(coordinates.sizes)))
    width, height = coordinates.sizes[image - 1] if coordinates.unit == "pixels" else (1000, 1000)
    xs = [draw(st.integers(0, width)) for _ in range(2)]
    ys = [draw(st.integers(0, height)) for _ in range(2)]
    if tool == "box":
      xs, ys = sorted(xs), sorted(ys)
    points_4 = coordinates.to_pixels((xs[0], ys[0], xs[1], ys[1]), image)
    operations.append(Operation(tool, image, points_4, draw(LABEL)))
  return tuple(operations)


@pytest.mark.parametrize("coordinates", [PIXELS, PER_MILLE], ids=lambda c: c.unit)
@settings(max_examples=150, deadline=None)
@given(data=st.data(), think=WORDS)
def test_a_written_drawing_turn_is_read_back(coordinates, data, think):
  operations = data.draw(_written_operations(coordinates))
  parsed = parse(write_turn(think, operations, coordinates), coordinates, LIMITS)
  assert parsed.errors == ()
  assert parsed.well_formed
  assert not parsed.has_answer
  assert parsed.operations == operations


@settings(max_examples=100, deadline=None)
@given(think=WORDS, answer=WORDS)
def test_a_written_answer_is_read_back(think, answer):
  parsed = parse(write_answer(think, answer), PIXELS, LIMITS)
  assert parsed.well_formed
  assert parsed.operations == parsed.errors == ()
  assert parsed.answer_text == answer.strip()


def test_turns_are_written_in_the_published_notation():
  operation = Operation("box", 2, (120.2, 80, 299.6, 210), "table")
  assert write_turn("I mark it.", [operation], PIXELS) == (
    "<think> I mark it. </think> Action: Object Mapper\n"
    '```json\n[{"index": 2, "bbox_2d": [120, 80, 300, 210], "label": "table"}]\n```'
  )
  assert write_answer("Two.", "2") == ("<think> Two. </think> Action: Answer\n<answer> 2 </answer>")


def test_a_turn_that_cannot_be_read_back_is_not_written():
  box, line = Operation("box", 1, (1, 2, 3, 4), "a"), Operation("line", 1, (1, 2, 3, 4), "a")
  with pytest.raises(ValueError, match="exactly one tool"):
    write_turn("", [box, line], PIXELS)
  with pytest.raises(ValueError, match="exactly one tool"):
    write_turn("", [], PIXELS)
  with pytest.raises(ValueError, match="fence"):
    write_turn("", [Operation("box", 1, (1, 2, 3, 4), "```")], PIXELS)
  with pytest.raises(ValueError, match="</think>"):
    write_turn("a </think> b", [box], PIXELS)
  with pytest.raises(ValueError, match="</answer>"):
    write_answer("", "4 </answer>")


def test_per_mille_coordinates_scale_with_the_size_of_each_image():
  points_4 = PER_MILLE.to_pixels((500, 500, 1000, 0), 1)
  assert all(map(math.isclose, points_4, (308, 168, 616, 0)))
  assert PER_MILLE.from_pixels(points_4, 1) == (500, 500, 1000, 0)
