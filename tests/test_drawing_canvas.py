"""Pixels: what is drawn where, in which colour, and what stays when a box is moved."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageColor

from spatial_jax.drawing.canvas import COLOURS, Picture, Style, draw, merge, paint, targets
from spatial_jax.types import Operation

STYLE = Style(line_px=4, dot_px=4, font_px=10, label_offset_px=(8, 6))
GREY = np.full((120, 160, 3), 128, np.uint8)
RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0)


def _box(image: int, points_4: tuple, label: str = "") -> Operation:
  return Operation("box", image, points_4, label)


def _line(image: int, points_4: tuple, label: str = "") -> Operation:
  return Operation("line", image, points_4, label)


def _drawn(*operations: Operation) -> np.ndarray:
  return paint(GREY, operations, STYLE)


def _is(pixels: np.ndarray, colour: tuple) -> np.ndarray:
  return (pixels == np.array(colour, np.uint8)).all(-1)


def test_box_outline_is_four_pixels_wide_and_inside():
  expected = np.zeros((120, 160), bool)
  expected[20:81, 30:101] = True
  expected[24:77, 34:97] = False
  np.testing.assert_array_equal(_is(_drawn(_box(1, (30, 20, 100, 80))), RED), expected)


def test_box_coordinates_are_cut_to_whole_pixels_in_any_order():
  straight = _drawn(_box(1, (30, 20, 100, 80)))
  np.testing.assert_array_equal(straight, _drawn(_box(1, (30.9, 20.2, 100.99, 80.5))))
  np.testing.assert_array_equal(straight, _drawn(_box(1, (100, 80, 30, 20))))


def test_label_stands_inside_in_the_colour_of_its_box():
  plain, labelled = _drawn(_box(1, (30, 20, 150, 110))), _drawn(_box(1, (30, 20, 150, 110), "lamp"))
  rows, columns = np.nonzero((plain != labelled).any(-1))
  assert 20 + 6 <= rows.min() <= rows.max() < 20 + 6 + 14
  assert 30 + 8 <= columns.min() <= columns.max() < 30 + 8 + 40
  changed = labelled[rows, columns].astype(int)
  assert (changed[:, 0] >= 128).all()  # grey to red, nothing else
  assert (changed[:, 1:] <= 128).all()


def test_line_is_black_from_a_red_dot_to_a_blue_dot():
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


def test_line_carries_no_label():
  line = (20, 60, 120, 60)
  np.testing.assert_array_equal(_drawn(_line(1, line)), _drawn(_line(1, line, "a path")))


def test_colours_go_by_the_place_in_the_list_and_start_over():
  assert COLOURS[:3] == ("red", "green", "blue")
  assert COLOURS[22:24] == ("silver", next(iter(ImageColor.colormap)))
  all_colours = [_box(1, (2, 2, 2, 2)) for _ in COLOURS]
  one_more = _drawn(*all_colours, _box(1, (50, 50, 100, 100)))
  assert _is(one_more[50:54, 50:101], RED).all()
  pixels = _drawn(_box(1, (0, 0, 20, 20)), _line(1, (60, 60, 60, 60)), _box(1, (30, 30, 50, 50)))
  assert _is(pixels[30:34, 30:51], GREEN).all()


def test_style_scales_every_stroke():
  small = Style(line_px=2, dot_px=2, font_px=7, label_offset_px=(4, 3))
  box = paint(GREY, [_box(1, (30, 20, 100, 80))], small)
  assert _is(box, RED).sum() == 71 * 61 - 67 * 57
  line = paint(GREY, [_line(1, (20, 60, 120, 60))], small)
  assert _is(line[60:62, 24:116], BLACK).all()
  rows, _ = np.nonzero(_is(line, RED))
  assert (rows.min(), rows.max()) == (58, 62)


def test_moving_a_box_on_the_original_leaves_no_old_pixels():
  original = Picture(GREY, ())
  (first,) = draw([original], [_box(1, (10, 10, 60, 60), "a")], STYLE)
  (second,) = draw([original, first], [_box(1, (80, 50, 150, 110), "a")], STYLE)
  assert (second.pixels[:49, :79] == 128).all()
  np.testing.assert_array_equal(second.pixels, _drawn(_box(1, (80, 50, 150, 110), "a")))


def test_moving_a_box_on_a_drawn_image_leaves_the_old_pixels():
  (first,) = draw([Picture(GREY, ())], [_box(1, (10, 10, 60, 60), "a")], STYLE)
  (second,) = draw([Picture(GREY, ()), first], [_box(2, (80, 50, 150, 110), "a")], STYLE)
  assert second.drawn == (_box(2, (80, 50, 150, 110), "a"),)
  np.testing.assert_array_equal(second.pixels[:49, :79], first.pixels[:49, :79])
  assert _is(second.pixels[50:54, 80:151], RED).all()


def test_one_new_picture_for_each_index_boxes_first():
  images = [Picture(np.full((40, 40, 3), shade, np.uint8), ()) for shade in (10, 20, 30)]
  operations = [
    _line(3, (1, 1, 9, 9), "p"),
    _box(2, (5, 5, 20, 20), "a"),
    _line(1, (1, 1, 9, 9), "p"),
    _box(1, (5, 5, 20, 20), "b"),
    _box(2, (8, 8, 30, 30), "c"),
  ]
  assert targets(operations) == (2, 1, 3)
  new = draw(images, operations, STYLE)
  assert [int(picture.pixels[39, 39, 0]) for picture in new] == [20, 10, 30]
  assert new[0].drawn == (operations[1], operations[4])
  assert new[1].drawn == (operations[3], operations[2])
  assert new[2].drawn == (operations[0],)


def test_merge_replaces_in_place_appends_and_inherits_the_other_kind():
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


def test_images_are_left_as_they_are():
  pixels = GREY.copy()
  pixels.flags.writeable = False
  picture = Picture(pixels, ())
  draw([picture], [_box(1, (10, 10, 60, 60), "a")], STYLE)
  np.testing.assert_array_equal(pixels, GREY)
  assert picture.drawn == ()


@pytest.mark.parametrize("pixels", [GREY[..., 0], GREY[..., :2], GREY.astype(np.float32)])
def test_pixels_of_another_form_are_refused(pixels):
  with pytest.raises(ValueError, match="expected pixels uint8"):
    Picture(pixels, ())


def test_unknown_image_is_an_error():
  with pytest.raises(IndexError):
    draw([Picture(GREY, ())], [_box(2, (1, 1, 2, 2))], STYLE)


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
def test_any_operations_within_the_image_are_drawn_alike_every_time(operations):
  images = [Picture(GREY, ()), Picture(GREY + np.uint8(9), ())]
  first, second = draw(images, operations, STYLE), draw(images, operations, STYLE)
  assert len(first) == len(targets(operations))
  for one, other in zip(first, second, strict=True):
    assert one.pixels.shape == GREY.shape
    assert one.pixels.dtype == np.uint8
    assert hashlib.sha256(one.pixels).digest() == hashlib.sha256(other.pixels).digest()
