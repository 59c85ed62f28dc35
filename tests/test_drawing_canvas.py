"""Pixels of drawings: place, colour, and the lines that remain after a box is moved."""

import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageColor

from spatial_jax.config import ConfigError
from spatial_jax.drawing.canvas import COLOURS, DrawnImage, Style, draw, merge, paint, targets
from spatial_jax.types import Operation

STYLE = Style(line_px=4, dot_px=4, font_px=10, label_offset_px=(8, 6))
GRAY = np.full((120, 160, 3), 128, np.uint8)
RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0)


def _box(image: int, points_4: tuple, label: str = "") -> Operation:
  return Operation("box", image, points_4, label)


def _line(image: int, points_4: tuple, label: str = "") -> Operation:
  return Operation("line", image, points_4, label)


def _drawn(*operations: Operation) -> np.ndarray:
  return paint(GRAY, operations, STYLE)


def _is(pixels: np.ndarray, colour: tuple) -> np.ndarray:
  return (pixels == np.array(colour, np.uint8)).all(-1)


def test_a_box_outline_is_four_pixels_wide_and_inside():
  expected = np.zeros((120, 160), bool)
  expected[20:81, 30:101] = True
  expected[24:77, 34:97] = False
  np.testing.assert_array_equal(_is(_drawn(_box(1, (30, 20, 100, 80))), RED), expected)


def test_box_coordinates_are_truncated_to_whole_pixels_in_any_order():
  straight = _drawn(_box(1, (30, 20, 100, 80)))
  np.testing.assert_array_equal(straight, _drawn(_box(1, (30.9, 20.2, 100.99, 80.5))))
  np.testing.assert_array_equal(straight, _drawn(_box(1, (100, 80, 30, 20))))


def test_a_label_has_the_colour_of_its_box_and_is_inside_it():
  plain, labelled = _drawn(_box(1, (30, 20, 150, 110))), _drawn(_box(1, (30, 20, 150, 110), "lamp"))
  rows, columns = np.nonzero((plain != labelled).any(-1))
  assert 20 + 6 <= rows.min() <= rows.max() < 20 + 6 + 14
  assert 30 + 8 <= columns.min() <= columns.max() < 30 + 8 + 40
  changed = labelled[rows, columns].astype(int)
  assert (changed[:, 0] >= 128).all()  # only shades between gray and red
  assert (changed[:, 1:] <= 128).all()


def test_a_line_is_black_from_a_red_dot_to_a_blue_dot():
  pixels = _drawn(_line(1, (20, 60, 120, 60)))
  assert _is(pixels[59:63, 26:115], BLACK).all()
  assert _is(pixels[57:64, 19:22], RED).all()
  assert _is(pixels[57:64, 119:122], BLUE).all()
  assert (
    _is(pixels, (128, 128, 128)).sum()
    == pixels[..., 0].size - (_is(pixels, RED) | _is(pixels, BLUE) | _is(pixels, BLACK)).sum()
  )
  rows, columns = np.nonzero(_is(pixels, RED))
  assert (rows.min(), rows.max(), columns.min(), columns.max()) == (56, 64, 16, 24)


def test_a_line_has_no_label():
  line = (20, 60, 120, 60)
  np.testing.assert_array_equal(_drawn(_line(1, line)), _drawn(_line(1, line, "a path")))


def test_colours_follow_the_order_of_boxes_and_repeat():
  assert COLOURS[:3] == ("red", "green", "blue")
  assert COLOURS[22:24] == ("silver", next(iter(ImageColor.colormap)))
  all_colours = [_box(1, (2, 2, 2, 2)) for _ in COLOURS]
  one_more = _drawn(*all_colours, _box(1, (50, 50, 100, 100)))
  assert _is(one_more[50:54, 50:101], RED).all()
  pixels = _drawn(_box(1, (0, 0, 20, 20)), _line(1, (60, 60, 60, 60)), _box(1, (30, 30, 50, 50)))
  assert _is(pixels[30:34, 30:51], GREEN).all()


def test_style_sets_the_size_of_every_line():
  small = Style(line_px=2, dot_px=2, font_px=7, label_offset_px=(4, 3))
  box = paint(GRAY, [_box(1, (30, 20, 100, 80))], small)
  assert _is(box, RED).sum() == 71 * 61 - 67 * 57
  line = paint(GRAY, [_line(1, (20, 60, 120, 60))], small)
  assert _is(line[60:62, 24:116], BLACK).all()
  rows, _ = np.nonzero(_is(line, RED))
  assert (rows.min(), rows.max()) == (58, 62)


def test_a_box_moved_on_the_original_leaves_no_old_pixels():
  original = DrawnImage(GRAY, ())
  (first,) = draw([original], [_box(1, (10, 10, 60, 60), "a")], STYLE)
  (second,) = draw([original, first], [_box(1, (80, 50, 150, 110), "a")], STYLE)
  assert (second.pixels[:49, :79] == 128).all()
  np.testing.assert_array_equal(second.pixels, _drawn(_box(1, (80, 50, 150, 110), "a")))


def test_a_box_moved_on_a_drawn_image_leaves_old_pixels():
  (first,) = draw([DrawnImage(GRAY, ())], [_box(1, (10, 10, 60, 60), "a")], STYLE)
  (second,) = draw([DrawnImage(GRAY, ()), first], [_box(2, (80, 50, 150, 110), "a")], STYLE)
  assert second.operations == (_box(2, (80, 50, 150, 110), "a"),)
  np.testing.assert_array_equal(second.pixels[:49, :79], first.pixels[:49, :79])
  assert _is(second.pixels[50:54, 80:151], RED).all()


def test_each_index_gives_one_new_image_boxes_first():
  images = [DrawnImage(np.full((40, 40, 3), shade, np.uint8), ()) for shade in (10, 20, 30)]
  operations = [
    _line(3, (1, 1, 9, 9), "p"),
    _box(2, (5, 5, 20, 20), "a"),
    _line(1, (1, 1, 9, 9), "p"),
    _box(1, (5, 5, 20, 20), "b"),
    _box(2, (8, 8, 30, 30), "c"),
  ]
  assert targets(operations) == (2, 1, 3)
  new = draw(images, operations, STYLE)
  assert [int(image.pixels[39, 39, 0]) for image in new] == [20, 10, 30]
  assert new[0].operations == (operations[1], operations[4])
  assert new[1].operations == (operations[3], operations[2])
  assert new[2].operations == (operations[0],)


def test_merge_replaces_equal_labels_and_keeps_the_other_tool():
  table, chair, path = (
    _box(1, (1, 1, 2, 2), "table"),
    _box(1, (3, 3, 4, 4), "chair"),
    _line(1, (1, 2, 3, 4), "table"),
  )
  old = (table, chair, path)
  moved, lamp = _box(2, (5, 5, 6, 6), "table"), _box(2, (7, 7, 8, 8), "lamp")
  assert merge(old, [lamp, moved]) == (moved, chair, lamp, path)
  other = _line(2, (0, 0, 9, 9), "way")
  assert merge(old, [other]) == (table, chair, path, other)
  assert merge((), [lamp, moved, table]) == (lamp, table)  # of equal labels the last


def test_drawing_does_not_change_its_input():
  pixels = GRAY.copy()
  pixels.flags.writeable = False
  image = DrawnImage(pixels, ())
  draw([image], [_box(1, (10, 10, 60, 60), "a")], STYLE)
  np.testing.assert_array_equal(pixels, GRAY)
  assert image.operations == ()


@pytest.mark.parametrize("pixels", [GRAY[..., 0], GRAY[..., :2], GRAY.astype(np.float32)])
def test_pixels_of_another_shape_or_dtype_are_refused(pixels):
  with pytest.raises(ValueError, match="expected pixels uint8"):
    DrawnImage(pixels, ())


def test_an_unknown_image_is_an_error():
  with pytest.raises(IndexError):
    draw([DrawnImage(GRAY, ())], [_box(2, (1, 1, 2, 2))], STYLE)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("line_px", 0), ("line_px", -1), ("line_px", 10**9), ("line_px", 2.5), ("dot_px", -1),
    ("font_px", 0), ("font_px", True), ("font_px", None), ("label_offset_px", (1,)),
    ("label_offset_px", (1, 2.5)), ("label_offset_px", 3), ("label_offset_px", (0, 10**9)),
  ],
)  # fmt: skip
def test_a_style_that_cannot_be_drawn_is_refused(field, value):
  with pytest.raises(ConfigError, match=f"^{field} is .* and must be "):
    dataclasses.replace(STYLE, **{field: value})


def test_the_published_style_is_the_default():
  operations = [_box(1, (30, 20, 100, 80), "a")]
  (default,), (published,) = (
    draw([DrawnImage(GRAY, ())], operations),
    draw([DrawnImage(GRAY, ())], operations, STYLE),
  )
  np.testing.assert_array_equal(default.pixels, published.pixels)


INSIDE = st.tuples(st.floats(0, 160), st.floats(0, 120), st.floats(0, 160), st.floats(0, 120))
OPERATIONS = st.lists(
  st.builds(
    Operation,
    st.sampled_from(["box", "line"]),
    st.integers(1, 2),
    INSIDE,
    st.text(max_size=20).filter(str.isprintable),
  ),
  max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(OPERATIONS)
def test_the_same_operations_give_the_same_pixels(operations):
  images = [DrawnImage(GRAY, ()), DrawnImage(GRAY + np.uint8(9), ())]
  first, second = draw(images, operations, STYLE), draw(images, operations, STYLE)
  assert len(first) == len(targets(operations))
  for one, other in zip(first, second, strict=True):
    assert one.pixels.shape == GRAY.shape
    assert one.pixels.dtype == np.uint8
    assert hashlib.sha256(one.pixels).digest() == hashlib.sha256(other.pixels).digest()
