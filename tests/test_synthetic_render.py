"""Rendering: depth and ids against points on rays, shadows against all casters, visible boxes."""

import concurrent.futures
import dataclasses
import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from spatial_jax.synthetic.camera_path import inside_polygon, make_camera, make_camera_path
from spatial_jax.synthetic.floorplan import ProceduralConfig, procedural_scene
from spatial_jax.synthetic.render import shading
from spatial_jax.synthetic.render.raycast import cover, enclose
from spatial_jax.synthetic.render.renderer import (
  _lamp,
  focal_px,
  pack_camera,
  pack_objects,
  pack_room,
  render,
)
from spatial_jax.synthetic.scene import Camera, Part, Scene, SceneObject, View
from spatial_jax.synthetic.visibility import visible_boxes

CONFIG = ProceduralConfig(objects=(8, 16), side_m=(3.6, 6.0), l_shape_share=0.5, repeat_share=0.3)


def _scenes_and_cameras(count: int, size_px: int = 72) -> list[tuple[Scene, Camera]]:
  scenes = [procedural_scene(seed, CONFIG) for seed in range(count)]
  return [
    (scene, make_camera_path(scene, np.random.default_rng(i), 1, size_px, size_px, 70.0)[0])
    for i, scene in enumerate(scenes)
  ]


def _object(shape: str, centre_3, size_3, turn_deg: float = 0.0) -> SceneObject:
  turn = np.radians(turn_deg)
  axes_33 = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
  half_3 = (size_3[0] / 2, size_3[1] / 2, size_3[2] / 2)
  part = Part(shape, (0.0, 0.0, 0.0), half_3, (200, 80, 60))
  return SceneObject("thing", "red", np.array(centre_3), np.array(size_3), axes_33, (part,))


def _room(*objects: SceneObject) -> Scene:
  """An empty 6 x 6 m room with these objects."""
  polygon_Z2 = np.array([[0.0, 0.0], [6.0, 0.0], [6.0, 6.0], [0.0, 6.0]])
  return Scene("test/0", "procedural", polygon_Z2, 2.6, 36.0, objects, (), None)


def _ahead(size_px: int = 64) -> Camera:
  """A level camera at the middle of the near wall, along y."""
  return make_camera(np.array([3.0, 0.5, 1.5]), 90.0, 0.0, 70.0, size_px, size_px)


def _project(camera: Camera, points_N3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _inside_part(obj: SceneObject, part: Part, points_N3: np.ndarray) -> np.ndarray:
  """Whether points are inside the shape, by its implicit function."""
  unit_N3 = ((points_N3 - obj.centre_3) @ obj.axes_33.T - part.centre_3) / part.half_3
  if part.shape == "box":
    return (np.abs(unit_N3) < 1).all(axis=1)
  if part.shape == "sphere":
    return (unit_N3**2).sum(axis=1) < 1
  return ((unit_N3[:, :2] ** 2).sum(axis=1) < 1) & (np.abs(unit_N3[:, 2]) < 1)


def _world(view: View, depth: np.ndarray) -> np.ndarray:
  """World point at a depth on the ray of each pixel centre, [height, width, 3]."""
  camera = view.camera
  focal = camera.width_px / 2 / np.tan(np.radians(camera.field_of_view_deg) / 2)
  x = (np.arange(camera.width_px) + 0.5 - camera.width_px / 2) / focal
  y = (np.arange(camera.height_px) + 0.5 - camera.height_px / 2) / focal
  ray = np.stack([*np.meshgrid(x, y), np.ones(view.depth_m.shape)], axis=-1) @ camera.rotation_33
  return camera.position_3 + ray * depth[..., None]


def _surface_distance(scene: Scene, points_N3: np.ndarray) -> np.ndarray:
  """Distance to the nearest of floor, ceiling and walls."""
  distance = np.minimum(np.abs(points_N3[:, 2]), np.abs(points_N3[:, 2] - scene.height_m))
  for start, stop in zip(scene.polygon_Z2, np.roll(scene.polygon_Z2, -1, axis=0), strict=True):
    along = stop - start
    share = np.clip((points_N3[:, :2] - start) @ along / (along @ along), 0.0, 1.0)
    off_N2 = points_N3[:, :2] - start - share[:, None] * along
    distance = np.minimum(distance, np.sqrt((off_N2**2).sum(axis=1)))
  return distance


def test_depth_and_ids_equal_those_of_points_along_the_rays():
  for scene, camera in _scenes_and_cameras(3, 32):
    view = render(scene, camera)
    assert view.instance.dtype == np.int32
    assert view.depth_m.dtype == np.float32
    assert view.instance.min() >= -1
    depth = view.depth_m.astype(np.float64)
    after_N3 = _world(view, depth * 1.0005 + 1e-4).reshape(-1, 3)
    before = [
      _world(view, depth * share - 1e-4).reshape(-1, 3) for share in np.linspace(0.02, 1, 40)
    ]
    owner_N = view.instance.reshape(-1)
    hit_N = np.zeros(len(owner_N), bool)
    for index, obj in enumerate(scene.objects):
      for part in obj.parts:
        hit_N |= _inside_part(obj, part, after_N3) & (owner_N == index)
        for points_N3 in before:
          assert not _inside_part(obj, part, points_N3).any(), f"{obj.category} is before"
    # Grazing rays leave the shape within half a millimetre; all others are inside it here.
    assert hit_N[owner_N >= 0].mean() > 0.985
    room_N3 = _world(view, depth).reshape(-1, 3)[owner_N == -1]
    assert _surface_distance(scene, room_N3).max() < 1e-4
    inward_N3 = camera.position_3 + (room_N3 - camera.position_3) * 0.999
    assert inside_polygon(scene.polygon_Z2, inward_N3[:, :2]).all()


@pytest.mark.parametrize(
  ("shape", "size_3", "share"),
  [
    ("box", (0.8, 0.01, 0.8), 1.0),
    ("cylinder", (0.2, 0.2, 0.8), 1.0),
    ("sphere", (0.4, 0.4, 0.8), np.pi / 4),
  ],
)
def test_silhouettes_have_the_right_size(shape, size_3, share):
  view = render(_room(_object(shape, (3.0, 4.0, 1.5), size_3)), _ahead(400))
  side_px = 200 / np.tan(np.radians(35)) / 3.5  # of one metre
  expected = share * size_3[0] * size_3[2] * side_px**2
  assert (view.instance == 0).sum() == pytest.approx(expected, rel=0.05)
  assert view.depth_m[200, 200] == pytest.approx(3.5 - size_3[1] / 2, abs=1e-3)


def test_tilted_boxes_have_the_right_silhouette():
  tilt = np.radians(30)
  axes_33 = np.array([[np.cos(tilt), 0, np.sin(tilt)], [0, 1, 0], [-np.sin(tilt), 0, np.cos(tilt)]])
  obj = SceneObject("sofa", "", np.array([3.0, 3.0, 1.4]), np.array([1.2, 0.5, 0.4]), axes_33, ())
  view = render(_room(obj), _ahead(96))
  expected = np.zeros(view.instance.shape, bool)
  box = Part("box", (0.0, 0.0, 0.0), (0.6, 0.25, 0.2), (0, 0, 0))
  for depth in np.linspace(2.0, 3.0, 200):
    points_N3 = _world(view, np.full(view.instance.shape, depth)).reshape(-1, 3)
    expected |= _inside_part(obj, box, points_N3).reshape(expected.shape)
  assert (expected != (view.instance == 0)).mean() < 0.004


def test_caster_lists_contain_every_caster():
  for scene, camera in _scenes_and_cameras(3):
    solids_Z, room, pinhole = pack_objects(scene.objects), pack_room(scene), pack_camera(camera)
    depth, surface, _ = cover(solids_Z, pinhole)
    enclose(room, pinhole, depth, surface)
    lamp = _lamp(scene)
    from_lists = shading._cast_shadow_rays(solids_Z, room, pinhole, lamp, depth, surface)
    everything = np.arange(len(solids_Z), dtype=np.int32)
    rays = 0
    for y, x in np.argwhere((surface <= -1) & (from_lists >= 0))[::5]:
      point_3 = shading._point(pinhole, depth[y, x], int(x), int(y))
      lifted_3 = np.array(point_3) + 1e-3 * np.array(
        shading.normal(solids_Z, room, surface[y, x], *point_3)
      )
      corner = np.array([x % 4, y % 4]) / 2 - 0.75
      aim_3 = np.array([*(corner * lamp.half_m), 0.0]) + lamp.position
      free = shading._is_free(solids_Z, everything, 0, len(everything), *lifted_3, *aim_3)
      assert free == (from_lists[y, x] == 1.0)
      rays += 1
    assert rays > 100
    assert (from_lists == 0).any()


def test_shadows_darken_the_floor_below_a_table_only():
  table = _object("box", (3.0, 3.0, 0.7), (1.2, 1.2, 0.06))
  scene, camera = _room(table), _ahead(96)
  dark, plain = render(scene, camera).image, render(scene, camera, shadows=False).image
  assert (dark.astype(int) <= plain).all()
  under = _project(camera, np.array([[3.0, 3.0, 0.0]]))[0][0].astype(int)
  open_floor = _project(camera, np.array([[1.2, 3.0, 0.0]]))[0][0].astype(int)
  assert dark[under[1], under[0]].mean() < 0.8 * plain[under[1], under[0]].mean()
  np.testing.assert_array_equal(
    dark[open_floor[1], open_floor[0]], plain[open_floor[1], open_floor[0]]
  )
  partial = (dark.astype(int) - plain).mean(axis=-1)[_floor_of(scene, camera)]
  assert len(np.unique(np.round(partial))) > 8, "a penumbra"


def _floor_of(scene: Scene, camera: Camera) -> np.ndarray:
  view = render(scene, camera, shadows=False)
  return (view.instance == -1) & (np.abs(_world(view, view.depth_m)[..., 2]) < 1e-3)


def test_threads_render_the_same_bytes():
  pairs = _scenes_and_cameras(6)
  first = [render(scene, camera) for scene, camera in pairs]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    again = list(pool.map(lambda pair: render(*pair), pairs))
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a.image, b.image)
    np.testing.assert_array_equal(a.depth_m, b.depth_m)
    np.testing.assert_array_equal(a.instance, b.instance)


_DIGEST = """
import hashlib, numpy as np
from spatial_jax.synthetic.camera_path import make_camera_path
from spatial_jax.synthetic.floorplan import ProceduralConfig, procedural_scene
from spatial_jax.synthetic.render.renderer import render
digest = hashlib.sha256()
for seed in range(3):
  scene = procedural_scene(seed, ProceduralConfig((8, 16), (3.6, 6.0), 0.5, 0.3))
  view = render(scene, make_camera_path(scene, np.random.default_rng(seed), 1, 72, 72, 70.0)[0])
  digest.update(view.image.tobytes() + view.depth_m.tobytes() + view.instance.tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_a_generic_processor_renders_the_same_bytes(tmp_path):
  """Code for any x86-64, without wide vectors or fused multiply-add, gives the same images."""
  digest = hashlib.sha256()
  for scene, camera in _scenes_and_cameras(3):
    view = render(scene, camera)
    digest.update(view.image.tobytes() + view.depth_m.tobytes() + view.instance.tobytes())
  plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
  run = subprocess.run(
    [sys.executable, "-c", _DIGEST],
    env=os.environ | plain,
    capture_output=True,
    text=True,
    check=True,
  )
  assert run.stdout.strip() == digest.hexdigest()


def test_objects_without_parts_are_boxes_coloured_by_category():
  def plain(category: str, x: float) -> SceneObject:
    size_3 = np.array([1.0, 0.5, 1.0])
    return SceneObject(category, "", np.array([x, 4.0, 1.2]), size_3, np.eye(3), ())

  view = render(_room(plain("chair", 1.8), plain("table", 3.0), plain("chair", 4.2)), _ahead(96))
  colours = [
    np.median(view.image[view.instance == index].astype(float), axis=0) for index in range(3)
  ]
  assert np.abs(colours[0] - colours[2]).max() < 12
  assert np.abs(colours[0] - colours[1]).max() > 25


def test_images_are_neither_dark_nor_overexposed():
  for scene, camera in _scenes_and_cameras(6):
    image = render(scene, camera).image
    assert 90 < image.mean() < 215
    assert (image == 255).all(axis=-1).mean() < 0.1
    assert image.std() > 20


def test_invalid_parts_are_named():
  good = _object("box", (3.0, 3.0, 0.5), (1.0, 1.0, 1.0))
  for part in (
    dataclasses.replace(good.parts[0], shape="cone"),
    dataclasses.replace(good.parts[0], half_3=(0.0, 1.0, 1.0)),
  ):
    with pytest.raises(ValueError, match=r"part of object 1 \(thing\)"):
      render(_room(good, dataclasses.replace(good, parts=(part,))), _ahead())


def test_an_empty_room_shows_only_the_room():
  view = render(_room(), _ahead())
  assert (view.instance == -1).all()
  assert np.isfinite(view.depth_m).all()
  assert visible_boxes(_room(), view, 1) == []


def test_project_inverts_depth():
  for scene, camera in _scenes_and_cameras(3):
    camera = dataclasses.replace(camera, height_px=50)  # not square
    view = render(scene, camera)
    points_N3 = _world(view, view.depth_m.astype(np.float64)).reshape(-1, 3)
    pixels_N2, depth_N = _project(camera, points_N3)
    rows, columns = np.indices(view.depth_m.shape)
    np.testing.assert_allclose(pixels_N2[:, 0], columns.reshape(-1) + 0.5, atol=1e-6)
    np.testing.assert_allclose(pixels_N2[:, 1], rows.reshape(-1) + 0.5, atol=1e-6)
    np.testing.assert_allclose(depth_N, view.depth_m.reshape(-1), rtol=1e-6)


def test_visible_boxes_measure_each_visible_object():
  whole = _object("box", (1.5, 4.5, 0.5), (0.6, 0.6, 1.0), 30.0)
  hidden = _object("box", (4.2, 4.5, 0.5), (0.8, 0.2, 1.0))
  screen = _object("box", (4.05, 4.0, 0.7), (0.5, 0.1, 1.4))
  cut = _object("sphere", (3.0, 3.9, 2.9), (1.0, 1.0, 1.0))
  gone = _object("box", (3.0, 5.5, 0.5), (0.2, 0.2, 0.2))
  wall = _object("box", (3.0, 5.0, 0.6), (0.6, 0.1, 1.2))
  scene = _room(whole, hidden, screen, cut, gone, wall)
  view = render(scene, _ahead(128))
  found = {item.index: item for item in visible_boxes(scene, view, 4)}
  assert set(found) == {0, 1, 2, 5} | ({3} if (view.instance == 3).sum() >= 4 else set())
  assert found[0].fraction == 1.0
  assert found[2].fraction == 1.0
  assert 0.2 < found[1].fraction < 0.7
  for item in found.values():
    mask = view.instance == item.index
    rows, columns = np.nonzero(mask)
    assert item.pixels == mask.sum()
    assert item.box_4 == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
  corners_N2, _ = _project(view.camera, whole.corners_83())
  np.testing.assert_allclose(found[0].box_4[:2], corners_N2.min(axis=0), atol=1.0)
  np.testing.assert_allclose(found[0].box_4[2:], corners_N2.max(axis=0), atol=1.0)
  fewer = {item.index for item in visible_boxes(scene, view, int(found[0].pixels) + 1)}
  assert 0 not in fewer


def test_an_object_cut_by_the_border_has_a_smaller_fraction():
  obj = _object("box", (5.2, 3.5, 1.5), (1.0, 0.2, 1.0))
  item = visible_boxes(_room(obj), render(_room(obj), _ahead(128)), 1)[0]
  assert item.box_4[2] == 128.0
  assert 0.2 < item.fraction < 0.8
