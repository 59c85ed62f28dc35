"""Dense targets against a plain loop over cells."""

import numpy as np
import pytest

from experiments.tiny.dense_targets import dense_targets
from spatial_jax.errors import DataError
from spatial_jax.synthetic import geometry
from spatial_jax.synthetic.scene import Camera, Scene, SceneObject, View

CATEGORIES = ("ball", "bed", "chair")
CELL = 4


def make_object(category, centre, size):
  return SceneObject(category, "", np.array(centre, float), np.array(size, float), np.eye(3), ())


def scene_of(objects):
  square = np.array([[0, 0], [4, 0], [4, 4], [0, 4]], float)
  return Scene("room/1", "procedural", square, 2.5, 16.0, tuple(objects), (), None)


def view_of(instance, depth_m):
  level_33 = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # right, down, ahead
  camera = Camera(np.array([1.0, 0, 0]), level_33, 60.0, instance.shape[1], instance.shape[0])
  image = np.zeros((*instance.shape, 3), np.uint8)
  return View(camera, image, depth_m.astype(np.float32), instance.astype(np.int32))


OBJECTS = [
  make_object("chair", (1, 3, 0), (0.5, 0.6, 0.9)),
  make_object("bed", (1, 0, 4), (2, 1.5, 0.5)),
]


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_dense_targets_equal_a_loop_over_cells(share):
  generator = np.random.default_rng(3)
  instance = generator.integers(-2, 2, (12, 20)).repeat(2, 0).repeat(2, 1)[:12, :20]
  depth_m = generator.uniform(0.5, 5, instance.shape)
  depth_m[instance == -2] = np.inf
  view = view_of(instance, depth_m)
  found = dense_targets(scene_of(OBJECTS), view, CATEGORIES, CELL, share)
  assert found.category_M.shape == (15,)
  cells = [(row, column) for row in range(3) for column in range(5)]
  for m, (row, column) in enumerate(cells):
    ys, xs = slice(CELL * row, CELL * (row + 1)), slice(CELL * column, CELL * (column + 1))
    counts = [(instance[ys, xs] == o).sum() for o in range(2)]
    depths = depth_m[ys, xs][np.isfinite(depth_m[ys, xs])]
    expected = depths.mean() if len(depths) else 0.1
    assert found.log_depth_M[m] == pytest.approx(np.log(max(expected, 0.1)), abs=1e-5)
    chosen = int(np.argmax(counts))
    filled = counts[chosen] >= share * CELL**2
    assert found.object_M[m] == filled
    if not filled:
      assert found.category_M[m] == 0
      assert not found.box_M4[m].any()
      assert not found.extent_M2[m].any()
      assert not found.place_M6[m].any()
      continue
    assert found.category_M[m] == (3 if chosen == 0 else 2)
    rows, columns = np.nonzero(instance == chosen)
    middle = np.array([CELL * column + 2, CELL * row + 2])
    corner = np.array([columns.min(), rows.min()]) - middle
    far = np.array([columns.max() + 1, rows.max() + 1]) - middle
    np.testing.assert_allclose(found.box_M4[m, :2], corner / (20, 12), atol=1e-6)
    np.testing.assert_allclose(found.box_M4[m, 2:], far / (20, 12), atol=1e-6)
    ends = (columns.min() / 20, rows.min() / 12, (columns.max() + 1) / 20, (rows.max() + 1) / 12)
    np.testing.assert_allclose(found.place_M6[m, :4], ends, atol=1e-6)
    place = geometry.floor_place_m(OBJECTS[chosen].centre_3, view.camera)
    np.testing.assert_allclose(found.place_M6[m, 4:], place, atol=1e-6)
    distance, longest = ((3.0, 0.9), (4.0, 2.0))[chosen]
    np.testing.assert_allclose(found.extent_M2[m], np.log([distance, longest]), atol=1e-6)


def test_an_object_without_pixels_fills_no_cell():
  instance = np.zeros((8, 8), int)
  found = dense_targets(
    scene_of(OBJECTS), view_of(instance, np.ones((8, 8))), CATEGORIES, CELL, 0.5
  )
  assert (found.category_M == 3).all()
  assert found.object_M.all()


def test_an_unknown_category_is_an_error():
  scene = scene_of([make_object("piano", (0, 0, 1), (1, 1, 1))])
  with pytest.raises(DataError, match=r"contains piano; add it to config\.recipe\.categories"):
    dense_targets(scene, view_of(np.zeros((4, 4)), np.ones((4, 4))), CATEGORIES, CELL, 0.5)
