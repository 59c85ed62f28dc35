"""Visible objects of a view: pixel counts and boxes."""

import dataclasses

import numpy as np

from spatial_jax.synthetic.render import raycast
from spatial_jax.synthetic.render.renderer import pack_camera, pack_objects
from spatial_jax.synthetic.scene import Scene, View

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
