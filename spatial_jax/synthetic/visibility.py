"""Visible objects of a view: pixel counts, boxes, and the projection of points into the image."""

import dataclasses

import numpy as np

from spatial_jax.synthetic.render import raycast
from spatial_jax.synthetic.render.renderer import focal_px, pack_camera, pack_objects
from spatial_jax.synthetic.scene import Camera, Scene, View

_CANVAS = 2.0  # width and height of the canvas of `fraction`, in widths and heights of the image


@dataclasses.dataclass(frozen=True)
class VisibleObject:
  """One object in one view.

  Attributes:
    index: into `scene.objects`.
    pixels: number of pixels that show the object.
    fraction: `pixels` over the pixels of the object alone on a canvas twice as wide and high as
      the image: 1 if nothing hides the object and the image border does not cut it.
    box_4: tight (x1, y1, x2, y2) around these pixels, right and bottom edge exclusive.
  """

  index: int
  pixels: int
  fraction: float
  box_4: tuple[float, float, float, float]


def visible_boxes(scene: Scene, view: View, min_pixels: int) -> list[VisibleObject]:
  """The objects with `min_pixels` pixels or more in the view, in the order of the scene."""
  pixels_Z = np.bincount(view.instance[view.instance >= 0], minlength=len(scene.objects))
  solids_Z = pack_objects(scene.objects)
  solids_Z = solids_Z[pixels_Z[solids_Z["owner"]] > 0]  # counting hidden objects costs time too
  alone_Z = raycast.count_covered(solids_Z, pack_camera(view.camera, _CANVAS), len(scene.objects))
  visible = []
  for index in np.flatnonzero(pixels_Z >= max(min_pixels, 1)):
    mask = view.instance == index
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box_4 = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
    pixels = int(pixels_Z[index])
    visible.append(VisibleObject(int(index), pixels, pixels / int(alone_Z[index]), box_4))
  return visible


def project(camera: Camera, points_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Projects world points into the image.

  Args:
    camera: the camera.
    points_N3: float, metres, world.

  Returns:
    pixels_N2 float64: x right, y down; (0, 0) is the outer corner of the first pixel, so pixel i
    covers [i, i + 1). Meaningless if the depth is not positive.
    depth_N float64: metres along the viewing axis.
  """
  local_N3 = (np.asarray(points_N3, np.float64) - camera.position_3) @ camera.rotation_33.T
  depth_N = local_N3[:, 2]
  with np.errstate(divide="ignore", invalid="ignore"):
    plane_N2 = local_N3[:, :2] / depth_N[:, None]
  middle_2 = np.array([camera.width_px, camera.height_px]) / 2
  return plane_N2 * focal_px(camera) + middle_2, depth_N
