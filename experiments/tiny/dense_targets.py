"""Dense targets per merged visual token: category, depth, box and place of its object.

Only the pretraining of the embedded policy uses them; it removes their heads at its end.
"""

import dataclasses

import numpy as np

from spatial_jax.errors import DataError
from spatial_jax.synthetic import geometry
from spatial_jax.synthetic.scene import Scene, SceneObject, View


@dataclasses.dataclass(frozen=True, eq=False)
class DenseTargets:
  """Truth per merged token of one image, in token order (rows of cells, left to right).

  The object of a cell is the object with the most pixels in it.

  Attributes:
    category_M: int32, category of the object, 0 for the room.
    log_depth_M: float32, log of the mean distance along the viewing axis in metres.
    box_M4: float32, box of the object (x1, y1, x2, y2) relative to the centre of the cell, in image
      sides.
    extent_M2: float32, log of (distance to the camera in m, longest dimension in m) of the object.
    place_M6: float32, box of the object relative to the corner of the image, in image sides, and
      its place on the floor, (right, ahead) in m. This target makes the tower encode the absolute
      position of a cell; its position embedding is relative.
    object_M: bool, whether the object fills enough of the cell; else its targets are 0.
  """

  category_M: np.ndarray
  log_depth_M: np.ndarray
  box_M4: np.ndarray
  extent_M2: np.ndarray
  place_M6: np.ndarray
  object_M: np.ndarray


def dense_targets(
  scene: Scene, view: View, categories: tuple[str, ...], cell_px: int, min_cell_fraction: float
) -> DenseTargets:
  """Targets of one rendered image.

  Args:
    scene, view: a room with at least one object, and one of its views.
    categories: names in order; target 0 stands for none of them.
    cell_px: side of a merged token in pixels.
    min_cell_fraction: least fraction of a cell that its object fills, in (0, 1).

  Raises:
    DataError: if an object has another category.
  """
  unknown = {obj.category for obj in scene.objects} - set(categories)
  if unknown:
    raise DataError(
      f"{scene.scene_id} contains {', '.join(sorted(unknown))}; add it to config.recipe.categories"
    )
  height, width = view.instance.shape
  rows, columns = height // cell_px, width // cell_px

  def cells(image):
    return image.reshape(rows, cell_px, columns, cell_px).swapaxes(1, 2).reshape(rows * columns, -1)

  instance_MX, depth_MX = cells(view.instance), cells(view.depth_m)
  finite_MX = np.isfinite(depth_MX)
  depth_M = np.where(finite_MX, depth_MX, 0).sum(1) / np.maximum(finite_MX.sum(1), 1)
  counts_MO = (instance_MX[:, :, None] == np.arange(len(scene.objects))).sum(1)
  chosen_M = counts_MO.argmax(1)
  object_M = counts_MO.max(1) >= min_cell_fraction * cell_px**2
  category_O = [categories.index(o.category) + 1 for o in scene.objects]
  box_O4 = np.array([_box(view.instance == o) for o in range(len(scene.objects))])
  extent_O2 = np.array([_extent(view, o) for o in scene.objects])
  floor_O2 = np.array([geometry.floor_place_m(o.centre_3, view.camera) for o in scene.objects])
  row_M, column_M = np.divmod(np.arange(rows * columns), columns)
  centre_M2 = (np.stack([column_M, row_M], 1) + 0.5) * cell_px
  side_2 = np.array([width, height])
  box_M4 = (box_O4[chosen_M] - np.tile(centre_M2, 2)) / np.tile(side_2, 2)
  place_O6 = np.concatenate([box_O4 / np.tile(side_2, 2), floor_O2], axis=1)
  return DenseTargets(
    category_M=np.where(object_M, np.array(category_O)[chosen_M], 0).astype(np.int32),
    log_depth_M=np.log(np.maximum(depth_M, 0.1)).astype(np.float32),
    box_M4=np.where(object_M[:, None], box_M4, 0).astype(np.float32),
    extent_M2=np.where(object_M[:, None], extent_O2[chosen_M], 0).astype(np.float32),
    place_M6=np.where(object_M[:, None], place_O6[chosen_M], 0).astype(np.float32),
    object_M=object_M,
  )


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
  """Tight (x1, y1, x2, y2) around a mask, zeros for an empty one."""
  if not mask.any():
    return (0.0, 0.0, 0.0, 0.0)
  ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1))


def _extent(view: View, obj: SceneObject) -> tuple[float, float]:
  distance = np.linalg.norm(obj.centre_3 - view.camera.position_3)
  return float(np.log(max(distance, 0.1))), float(np.log(obj.size_3.max()))
