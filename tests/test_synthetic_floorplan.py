"""Procedural rooms: reproducible, valid placement of objects; camera paths over free floor."""

import dataclasses
import hashlib
import itertools

import numpy as np
import pytest

from spatial_jax.config import ConfigError
from spatial_jax.errors import DataError
from spatial_jax.synthetic.camera_path import inside_polygon, make_camera_path
from spatial_jax.synthetic.floorplan import ProceduralConfig, procedural_scene
from spatial_jax.synthetic.furniture import KINDS, parts_of
from spatial_jax.synthetic.furniture_parts import COLOURS
from spatial_jax.synthetic.scene import Scene, SceneObject

CONFIG = ProceduralConfig(objects=(10, 18), side_m=(3.6, 6.0), l_shape_share=0.5, repeat_share=0.4)
SEEDS = range(20)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
  return [procedural_scene(seed, CONFIG) for seed in SEEDS]


def _digest(scene: Scene) -> str:
  """A checksum of all values of a scene."""
  digest = hashlib.sha256(repr((scene.scene_id, scene.height_m, scene.room_size_m2)).encode())
  digest.update(scene.polygon_Z2.tobytes())
  for obj in scene.objects:
    digest.update(repr((obj.category, obj.colour)).encode())
    digest.update(obj.centre_3.tobytes() + obj.size_3.tobytes() + obj.axes_33.tobytes())
    digest.update(repr([dataclasses.astuple(part) for part in obj.parts]).encode())
  return digest.hexdigest()


def _inside(obj: SceneObject, points_N3: np.ndarray) -> np.ndarray:
  """Whether points are inside the oriented box, more than a micrometre from its faces."""
  local_N3 = (points_N3 - obj.centre_3) @ obj.axes_33.T
  return (np.abs(local_N3) < obj.size_3 / 2 - 1e-6).all(axis=1)


def _lattice(obj: SceneObject) -> np.ndarray:
  """A grid of points in the box and on its faces."""
  steps = np.linspace(-0.5, 0.5, 13)
  unit_N3 = np.stack(np.meshgrid(steps, steps, steps[::3], indexing="ij"), axis=-1).reshape(-1, 3)
  return obj.centre_3 + (unit_N3 * obj.size_3) @ obj.axes_33


def test_the_same_seed_gives_the_same_scene(scenes):
  assert _digest(procedural_scene(7, CONFIG)) == _digest(scenes[7])
  assert len({_digest(scene) for scene in scenes}) == len(scenes)


def test_scene_bytes_never_change():
  # The embedded policy was trained on these rooms; a change of this digest changes its data.
  assert _digest(procedural_scene(7, CONFIG))[:16] == "7382c0241fee9344"


def test_the_global_random_state_does_not_change():
  np.random.seed(0)  # noqa: NPY002
  before = np.random.get_state()[1].tobytes()  # noqa: NPY002
  first = _digest(procedural_scene(3, CONFIG))
  assert np.random.get_state()[1].tobytes() == before  # noqa: NPY002
  np.random.seed(1)  # noqa: NPY002
  assert _digest(procedural_scene(3, CONFIG)) == first


def test_objects_never_intersect(scenes):
  for scene in scenes:
    for a, b in itertools.permutations(scene.objects, 2):
      assert not _inside(a, _lattice(b)).any(), f"{scene.scene_id}: {a.category} and {b.category}"


def test_objects_are_inside_the_room(scenes):
  assert {len(scene.polygon_Z2) for scene in scenes} == {4, 6}
  for scene in scenes:
    for obj in scene.objects:
      points_N3 = _lattice(obj)
      assert inside_polygon(scene.polygon_Z2, points_N3[:, :2]).all(), scene.scene_id
      assert points_N3[:, 2].min() > -1e-9
      assert points_N3[:, 2].max() < scene.height_m


def test_objects_stand_on_the_floor_or_on_furniture(scenes):
  carried = 0
  for scene in scenes:
    for obj in scene.objects:
      bottom = obj.centre_3[2] - obj.size_3[2] / 2
      if abs(bottom) < 1e-9:
        continue
      below_83 = obj.corners_83() - [0.0, 0.0, 0.01]
      lowest_43 = below_83[np.argsort(below_83[:, 2])[:4]]
      assert any(_inside(other, lowest_43).all() for other in scene.objects), scene.scene_id
      carried += 1
  assert carried > len(scenes)


def test_outline_is_counter_clockwise_and_its_area_is_the_room_size(scenes):
  for scene in scenes:
    steps = (np.arange(400) + 0.5) / 400
    high_2 = scene.polygon_Z2.max(axis=0)
    grid_N2 = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2) * high_2
    share = inside_polygon(scene.polygon_Z2, grid_N2).mean()
    assert scene.room_size_m2 == pytest.approx(share * high_2.prod(), rel=0.01)  # positive: ccw


def test_the_number_of_objects_is_in_the_configured_range():
  single = dataclasses.replace(CONFIG, objects=(1, 1))
  assert all(len(procedural_scene(seed, single).objects) == 1 for seed in range(20))
  counts = {len(procedural_scene(seed, CONFIG).objects) for seed in range(60)}
  assert counts <= set(range(10, 19))
  assert len(counts) > 5


def test_all_categories_occur_and_repeat(scenes):
  assert len({kind.category for kind in KINDS}) >= 16
  assert {t.category for s in scenes for t in s.objects} == {kind.category for kind in KINDS}
  most = [max(np.unique([t.category for t in s.objects], return_counts=True)[1]) for s in scenes]
  assert np.median(most) >= 3


def test_an_error_about_too_many_objects_names_the_keys():
  crowded = dataclasses.replace(CONFIG, objects=(60, 60), side_m=(2.0, 2.2))
  message = r"60 objects do not fit .* lower rooms\.objects or raise rooms\.side_m"
  with pytest.raises(ConfigError, match=message):
    procedural_scene(0, crowded)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.category}-{kind.places[0]}")
def test_parts_fill_the_box_exactly(kind):
  for end in (0, 1):
    w = kind.width_m[end]
    size_3 = (w, (kind.depth_m or kind.width_m)[end], (kind.height_m or kind.width_m)[end])
    for colour in kind.colours:
      parts = parts_of(kind, size_3, colour)
      centre_N3 = np.array([part.centre_3 for part in parts])
      half_N3 = np.array([part.half_3 for part in parts])
      assert half_N3.min() > 0
      np.testing.assert_allclose(
        (centre_N3 - half_N3).min(axis=0), -np.array(size_3) / 2, atol=1e-8
      )
      np.testing.assert_allclose((centre_N3 + half_N3).max(axis=0), np.array(size_3) / 2, atol=1e-8)
      assert COLOURS[colour] in [part.colour_3 for part in parts]


@pytest.mark.parametrize("frames", [1, 6])
def test_a_camera_path_is_over_free_floor_and_shows_most_objects(scenes, frames):
  shares = []
  for seed, scene in enumerate(scenes):
    cameras = make_camera_path(scene, np.random.default_rng(seed), frames, 64, 48, 70.0)
    assert len(cameras) == frames
    for camera in cameras:
      assert 1.3 <= camera.position_3[2] <= 1.7
      assert (camera.width_px, camera.height_px) == (64, 48)
      assert inside_polygon(scene.polygon_Z2, camera.position_3[None, :2]).all()
      assert not any(_inside(obj, camera.position_3[None]).any() for obj in scene.objects)
      np.testing.assert_allclose(camera.rotation_33 @ camera.rotation_33.T, np.eye(3), atol=1e-9)
      np.testing.assert_allclose(
        np.cross(camera.rotation_33[0], camera.rotation_33[1]), camera.rotation_33[2], atol=1e-9
      )
      assert abs(camera.rotation_33[0, 2]) < 1e-9  # upright
      assert camera.rotation_33[2, 2] < 0  # a little down
    shown = set()
    for camera in cameras:
      for index, obj in enumerate(scene.objects):
        right, _, ahead = camera.rotation_33 @ (obj.centre_3 - camera.position_3)
        if ahead > 0.5 and abs(right) < 0.7 * ahead:
          shown.add(index)
    shares.append(len(shown) / len(scene.objects))
  assert np.mean(shares) > (0.5 if frames == 1 else 0.75)


def test_a_camera_path_moves_and_is_reproducible(scenes):
  first = make_camera_path(scenes[0], np.random.default_rng(5), 8, 64, 64, 70.0)
  again = make_camera_path(scenes[0], np.random.default_rng(5), 8, 64, 64, 70.0)
  for a, b in zip(first, again, strict=True):
    np.testing.assert_array_equal(a.position_3, b.position_3)
    np.testing.assert_array_equal(a.rotation_33, b.rotation_33)
  places = np.array([camera.position_3 for camera in first])
  assert np.ptp(places[:, :2], axis=0).max() > 0.5
  turns = [float(a.rotation_33[0] @ b.rotation_33[0]) for a, b in itertools.pairwise(first)]
  assert min(turns) > np.cos(np.radians(75.1))


def test_a_camera_path_in_a_full_room_stays_at_the_clearest_position(scenes):
  """A run of 5,000 steps stopped at such a room: an L with a bed across its foot."""
  full = SceneObject(
    "bed", "", np.array([3.0, 3.0, 0.4]), np.array([20.0, 20.0, 0.8]), np.eye(3), ()
  )
  lamp = SceneObject(
    "lamp", "", np.array([0.5, 0.5, 1.2]), np.array([0.4, 0.4, 0.8]), np.eye(3), ()
  )
  tight = dataclasses.replace(scenes[0], objects=(full, lamp))
  (camera,) = make_camera_path(tight, np.random.default_rng(0), 1, 64, 64, 70.0)
  assert inside_polygon(tight.polygon_Z2, camera.position_3[None, :2]).all()
  assert camera.position_3[2] > 0.8, "over the bed"
  assert np.abs(camera.position_3 - lamp.centre_3)[:2].max() > 0.2, "beside the lamp"


def test_a_room_without_a_place_for_the_camera_is_an_error(scenes):
  full = SceneObject(
    "bed", "", np.array([3.0, 3.0, 1.0]), np.array([20.0, 20.0, 2.0]), np.eye(3), ()
  )
  with pytest.raises(DataError, match="procedural/0: no free place"):
    make_camera_path(
      dataclasses.replace(scenes[0], objects=(full,)), np.random.default_rng(0), 1, 64, 64, 70.0
    )
