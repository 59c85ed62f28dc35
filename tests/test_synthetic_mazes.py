"""Mazes and tangled lines: the pixels alone give the answer, and the path keeps to them."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from configs import sources, tiny_defaults
from spatial_jax.config import ConfigError, build
from spatial_jax.synthetic.mazes import MazeConfig, maze_tasks

STEPS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}


def config(cfg=None, **changes):
  """The mazes of the default config with keys changed."""
  cfg = cfg or sources.source().mazes
  cfg.update(changes)
  return build(MazeConfig, cfg.to_dict())


LARGE = config()
SMALL = config(tiny_defaults.source().mazes)
CONFIGS = pytest.mark.parametrize("cfg", [SMALL, LARGE], ids=["small", "large"])


@functools.cache
def tasks(cfg, name, count=16):
  """The tasks of one type."""
  make = maze_tasks(dataclasses.replace(cfg, types=(name,)))
  return [make(number)[0] for number in range(count)]


def pixels(task):
  (image,) = task.media
  return image.data.astype(int)


@functools.cache
def black(task):
  return pixels(task).max(axis=2) < 128


def coloured(task, channel):
  """bool [height, width], where the colour of a letter is: 0 red, 2 blue."""
  rgb = pixels(task)
  return (rgb[..., channel] - rgb.min(axis=2)) > 60


def path(task):
  return np.array(task.extra["path"])


def samples(points, spacing=0.5):
  """Points along a path, at most half a pixel apart."""
  parts = []
  for a, b in itertools.pairwise(points):
    count = max(2, int(np.linalg.norm(b - a) / spacing) + 2)
    parts.append(a + np.linspace(0, 1, count)[:, None] * (b - a))
  return np.concatenate(parts)


def glyphs(mask):
  """Centre (x, y) and mask of each connected part."""
  labels, count = ndimage.label(mask, np.ones((3, 3)))
  found = []
  for number, box in enumerate(ndimage.find_objects(labels), 1):
    rows, columns = box
    centre = np.array([columns.start + columns.stop - 1, rows.start + rows.stop - 1]) / 2
    found.append((centre, labels[box] == number))
  assert len(found) == count
  return found


def nearest_glyph(mask, point):
  return min(glyphs(mask), key=lambda one: np.linalg.norm(one[0] - point))


def read_glyph(mask, alphabet):
  """The character that a mask is most similar to, by the share of common pixels."""

  def similarity(character):
    image = Image.new("L", (200, 200))
    pen = ImageDraw.Draw(image)
    pen.text((100, 100), character, fill=255, font=ImageFont.load_default(80), anchor="mm")
    drawn = image.crop(image.getbbox()).resize(mask.shape[::-1])
    drawn = np.asarray(drawn) > 100
    return (drawn & mask).sum() / (drawn | mask).sum()

  return max(alphabet, key=similarity)


def maze_box(task):
  """left, top, right, bottom of the walls."""
  rows, columns = np.nonzero(black(task))
  return columns.min(), rows.min(), columns.max(), rows.max()


def cell_px(task, cfg):
  left, _, right, _ = maze_box(task)
  return (right - left) / cfg.cells


def openings(task, cfg):
  """Centres of the gaps in the outer wall, and whether the start reaches each, by the pixels."""
  walls = black(task)
  left, top, right, bottom = min(
    ((x1 + i, y1 + i, x2 - i, y2 - i) for x1, y1, x2, y2 in [maze_box(task)] for i in range(4)),
    key=lambda box: (~outline(walls, box)).sum(),  # walls are some pixels wide and end unevenly
  )
  free = ~walls[top : bottom + 1, left : right + 1]
  regions, _ = ndimage.label(free)
  x, y = np.rint(path(task)[0]).astype(int) - (left, top)
  edge = np.ones_like(free)
  edge[1:-1, 1:-1] = False
  gaps, count = ndimage.label(free & edge)
  found = []
  for number in range(1, count + 1):
    rows, columns = np.nonzero(gaps == number)
    centre = np.array([np.median(columns) + left, np.median(rows) + top])
    if len(rows) > cell_px(task, cfg) / 2:  # the corners of walls have notches
      found.append((centre, bool((regions[rows, columns] == regions[y, x]).any())))
  return found


def outline(mask, box):
  """The values along the four sides of a box."""
  left, top, right, bottom = box
  rows, columns = mask[top : bottom + 1, [left, right]], mask[[top, bottom], left : right + 1]
  return np.concatenate([rows.ravel(), columns.ravel()])


# --- all pictures --------------------------------------------------------------------------------


@CONFIGS
def test_a_number_always_gives_the_same_tasks(cfg):
  for number in range(4):
    first, again = (maze_tasks(cfg)(number) for _ in range(2))
    assert [task.question_type for task in first] == list(cfg.types)
    for a, b in zip(first, again, strict=True):
      np.testing.assert_array_equal(pixels(a), pixels(b))
      blank = [dataclasses.asdict(dataclasses.replace(task, media=())) for task in (a, b)]
      assert blank[0] == blank[1]


def test_numbers_give_different_pictures_of_the_given_size():
  made = [task for number in range(6) for task in maze_tasks(LARGE)(number)]
  assert {pixels(task).shape for task in made} == {(LARGE.size_px, LARGE.size_px, 3)}
  assert len({task.task_id for task in made}) == len(made)
  assert len({pixels(task).tobytes() for task in made}) == len(made)


@CONFIGS
def test_choices_and_words_occur_and_the_answer_is_an_option(cfg):
  made = [task for number in range(8) for task in maze_tasks(cfg)(number)]
  assert {task.answer_kind for task in made} == {"choice", "words"}
  for task in made:
    if task.answer_kind == "words":
      assert task.options is None
      assert set(task.answer.split()) <= set(STEPS)
    else:
      assert len(set(task.options)) == len(task.options)
      assert task.answer in [option.split(". ")[0] for option in task.options]


@CONFIGS
@pytest.mark.parametrize("name", ["maze_exit", "tangled_lines"])
def test_no_option_is_right_much_more_often_than_another(cfg, name):
  made = tasks(dataclasses.replace(cfg, size_px=112), name, 200)
  share = 1 / len(made[0].options)
  for option in made[0].options:
    found = np.mean([task.answer == option[0] for task in made])
    assert 0.6 * share < found < 1.5 * share, option


@CONFIGS
def test_images_of_lines_do_not_repeat(cfg):
  images = {task.media[0].data.tobytes() for task in tasks(cfg, "tangled_lines", 40)}
  assert len(images) == 40


@CONFIGS
def test_paths_lie_in_the_image(cfg):
  for name in cfg.types:
    for task in tasks(cfg, name):
      assert len(path(task)) > 1
      assert ((path(task) >= 0) & (path(task) < cfg.size_px)).all()


# --- mazes ---------------------------------------------------------------------------------------

MAZES = pytest.mark.parametrize("name", ["maze_exit", "maze_moves"])


@CONFIGS
@MAZES
def test_the_path_crosses_no_wall(cfg, name):
  for task in tasks(cfg, name):
    x, y = np.rint(samples(path(task))).astype(int).T
    assert not black(task)[y, x].any(), task.task_id


@CONFIGS
@MAZES
def test_the_path_has_no_point_within_a_straight_part(cfg, name):
  for task in tasks(cfg, name):
    for before, here, after in zip(*[path(task)[i:] for i in range(3)], strict=False):
      assert abs(np.dot(here - before, after - here)) < 1e-6, "mazes turn at right angles"


@CONFIGS
@MAZES
def test_the_path_starts_at_the_red_s(cfg, name):
  for task in tasks(cfg, name):
    ((centre, mask),) = glyphs(coloured(task, 0))
    assert read_glyph(mask, "SABC") == "S"
    np.testing.assert_allclose(centre, path(task)[0], atol=2)


@CONFIGS
@MAZES
def test_the_start_reaches_one_exit_which_is_where_the_path_ends(cfg, name):
  for task in tasks(cfg, name):
    found, size = openings(task, cfg), cell_px(task, cfg)
    assert len(found) == (3 if name == "maze_exit" else 1)
    ((centre, _),) = [one for one in found if one[1]]
    assert np.linalg.norm(centre - path(task)[-1]) == pytest.approx(size / 2, abs=size / 8)


@CONFIGS
def test_the_letter_beside_the_reached_exit_is_the_answer(cfg):
  for task in tasks(cfg, "maze_exit"):
    ((centre, _),) = [one for one in openings(task, cfg) if one[1]]
    place, mask = nearest_glyph(coloured(task, 2), centre)
    outward = centre - path(task)[-1]
    assert np.dot(place - centre, outward) > 0, "outside"
    assert read_glyph(mask, "ABC") == task.answer


@CONFIGS
def test_the_moves_lead_from_the_start_to_the_exit_without_a_wall(cfg):
  for task in tasks(cfg, "maze_moves"):
    size = cell_px(task, cfg)
    steps = np.array([STEPS[word] for word in task.answer.split()])
    points = path(task)[0] + size * np.concatenate([[[0, 0]], np.cumsum(steps, axis=0)])
    np.testing.assert_allclose(points[-1], path(task)[-1], atol=size / 8)
    x, y = np.rint(samples(points)).astype(int).T
    assert not black(task)[y, x].any()


@CONFIGS
def test_the_number_of_moves_is_within_its_limits(cfg):
  counts = {len(task.answer.split()) for task in tasks(cfg, "maze_moves", 60)}
  assert cfg.path_cells[0] <= min(counts) < max(counts) <= cfg.path_cells[1]


# --- tangled lines -------------------------------------------------------------------------------


def runs(task, x):
  """Centres of the black parts of a column, from the top."""
  labels, _ = ndimage.label(black(task)[:, round(x)])
  return np.array([np.mean([s.start, s.stop - 1]) for (s,) in ndimage.find_objects(labels)])


def rank(task, x, y):
  """Which line of a column passes y, from 0 at the top."""
  distance = np.abs(runs(task, x) - y)
  assert distance.min() < 2, "the path is on a line"
  return int(np.argmin(distance))


@CONFIGS
def test_the_path_of_tangled_lines_runs_from_the_number_to_the_letter(cfg):
  for task in tasks(cfg, "tangled_lines"):
    asked = int(task.question.split("line ")[1].split()[0])
    start, *_, end = path(task)
    assert rank(task, start[0] + 2, start[1]) == asked - 1
    assert rank(task, end[0] - 2, end[1]) == "ABCD".index(task.answer)
    number, mask = nearest_glyph(coloured(task, 0), start)
    assert read_glyph(mask, "1234") == str(asked)
    assert number[0] < start[0]
    letter, mask = nearest_glyph(coloured(task, 2), end)
    assert read_glyph(mask, "ABCD") == task.answer
    assert letter[0] > end[0]


@CONFIGS
def test_a_line_changes_its_place_only_where_two_lines_cross(cfg):
  """Where two lines cross, their column has one black part less, between the two places."""
  for task in tasks(cfg, "tangled_lines"):
    points = path(task)
    for (x1, y1), (x2, y2) in itertools.pairwise(points):
      inset = 2 if x1 == points[0, 0] else 0
      before, middle = runs(task, x1 + inset), runs(task, (x1 + x2) / 2)
      assert len(before) == cfg.lines
      if len(middle) == cfg.lines:  # no lines cross here
        assert y1 == y2
        continue
      assert len(middle) == cfg.lines - 1
      crossing = int(np.argmax([np.abs(before - y).min() for y in middle]))
      place = rank(task, x1 + inset, y1)
      place = {crossing: crossing + 1, crossing + 1: crossing}.get(place, place)
      assert rank(task, x2 - (2 if x2 == points[-1, 0] else 0), y2) == place


# --- values out of range -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"types": ()}, r"config\.types is \(\) and must name at least one type"),
    ({"types": ("labyrinth",)}, r"config\.types\[0\] must be one of maze_exit, maze_moves"),
    ({"size_px": 55}, r"config\.size_px is 55 and must be a whole number, at least 112"),
    ({"size_px": 5000}, r"config\.size_px is 5000 .* at most 4096"),
    ({"cells": 1}, r"config\.cells is 1 and must be a whole number, at least 2"),
    ({"cells": 9}, r"config\.cells is 9 .* at most 8"),
    ({"lines": 1}, r"config\.lines is 1 and must be a whole number, at least 2 and at most 4"),
    ({"lines": 5}, r"config\.lines is 5"),
    ({"crossings": 0}, r"config\.crossings is 0 and must be a whole number, at least 1"),
    ({"path_cells": (4, 3)}, r"config\.path_cells is \(4, 3\) and must be two whole numbers"),
    ({"path_cells": (0, 3)}, r"config\.path_cells is \(0, 3\)"),
    ({"path_cells": (3,)}, r"config\.path_cells must have 2 items, got 1"),
  ],
)
def test_values_out_of_range_are_refused(changes, message):
  with pytest.raises(ConfigError, match=message) as caught:
    config(**changes)
  assert "\n" not in str(caught.value)
