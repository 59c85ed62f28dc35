"""Trajectories are restored from files bit for bit, and every broken invariant is named."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spatial_jax.errors import DataError
from spatial_jax.grammar import VILASR, Grammar
from spatial_jax.rollout import trajectory as trajectory_lib
from spatial_jax.types import Operation, OperationError, Trajectory, Turn
from tests import dummies

GRAMMARS = (VILASR, Grammar("observe", False, "answer", False), Grammar("", False, "", False))


def valid(seed=1, answer="2.4"):
  generator = np.random.default_rng(seed)
  task = dummies.number_task(generator)
  return dummies.trajectory(generator, task, sample=5, answer=answer)


def with_two_drawings():
  """A trajectory with two drawing turns."""
  found = (valid(seed) for seed in range(50))
  return next(trajectory for trajectory in found if len(trajectory.turns) == 3)


def assert_same(a, b):
  """Equal in every field, type, dtype and bit."""
  for field in dataclasses.fields(Trajectory):
    x, y = getattr(a, field.name), getattr(b, field.name)
    assert type(x) is type(y), field.name
    if isinstance(x, np.ndarray):
      assert x.dtype == y.dtype, field.name
      assert x.shape == y.shape, field.name
      assert x.tobytes() == y.tobytes(), field.name
    elif field.name == "images":
      assert len(x) == len(y)
      for i, j in zip(x, y, strict=True):
        assert (i.content_hash, i.grid_3) == (j.content_hash, j.grid_3)
        assert i.patches_PX.dtype == j.patches_PX.dtype == np.float32
        assert i.patches_PX.tobytes() == j.patches_PX.tobytes()
        assert i.pixels.dtype == j.pixels.dtype == np.uint8
        assert i.pixels.shape == j.pixels.shape
        assert i.pixels.tobytes() == j.pixels.tobytes()
    else:
      assert x == y, field.name


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_files_restore_every_bit(tmp_path, seed):
  rollout = valid(seed, answer="2.4" if seed else None)
  trajectory_lib.save(rollout, tmp_path / "step" / "0.json")
  assert_same(trajectory_lib.load(tmp_path / "step" / "0.json"), rollout)


int32 = st.integers(-(2**31), 2**31 - 1)
text = st.text(st.characters(), max_size=30)  # lone surrogates included
float32 = st.floats(width=32, allow_nan=False)


@st.composite
def any_trajectory(draw):
  """A trajectory of any content with fields of the right types."""
  count = draw(st.integers(0, 6))
  grids = draw(st.lists(st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 3)), max_size=2))
  generator = np.random.default_rng(draw(st.integers(0, 99)))
  images = tuple(
    dummies.patched(generator.integers(0, 256, (h * 3, w * 5, 3), np.uint8), (t, h, w))
    for t, h, w in grids
  )
  points = st.tuples(*[st.floats(allow_nan=False)] * 4)
  operations = st.builds(Operation, st.sampled_from(["box", "line"]), int32, points, text)
  errors = st.builds(OperationError, text, text)
  turn = st.builds(
    Turn, int32, int32, text, st.lists(operations, max_size=2).map(tuple),
    st.lists(errors, max_size=2).map(tuple), st.booleans(), st.lists(text, max_size=2).map(tuple),
  )  # fmt: skip
  whole = st.lists(int32, min_size=count, max_size=count).map(lambda x: np.array(x, np.int32))
  logp = st.lists(st.floats(width=32), min_size=count, max_size=count)
  return Trajectory(
    task_id=draw(text),
    sample=draw(int32),
    seed_path=tuple(draw(st.lists(int32, max_size=4))),
    temperature=draw(float32),
    forbidden_ids=tuple(draw(st.lists(int32, max_size=3))),
    token_ids_T=draw(whole),
    position_TA=np.stack([draw(whole) for _ in range(3)], axis=-1),
    trained_T=draw(whole) % 2 == 0,
    logp_T=np.array([np.nan if np.isnan(x) else x for x in draw(logp)], np.float32),
    policy_step_T=draw(whole),
    images=images,
    image_start=tuple(draw(st.lists(int32, max_size=2))),
    prompt_length=draw(int32),
    prompt_images=draw(int32),
    turns=tuple(draw(st.lists(turn, max_size=3))),
    end_reason=draw(text),
    grammar=draw(st.sampled_from(GRAMMARS)),
  )


@settings(
  max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(any_trajectory())
def test_files_restore_any_content(tmp_path, rollout):
  trajectory_lib.save(rollout, tmp_path / "any.json")
  assert_same(trajectory_lib.load(tmp_path / "any.json"), rollout)


@settings(deadline=None)
@given(any_trajectory())
def test_any_content_has_a_violation_or_none(rollout):
  """The check itself never fails, because it runs on every trajectory of every run."""
  message = trajectory_lib.violation(rollout, (dummies.IMAGE_PAD,))
  assert message is None or message.startswith(f"task {rollout.task_id} sample {rollout.sample}: ")


def test_shared_images_are_stored_once(tmp_path):
  generator = np.random.default_rng(0)
  task = dummies.number_task(generator)
  rollouts = [dummies.trajectory(generator, task, sample, "2.4") for sample in range(4)]
  for rollout in rollouts:
    trajectory_lib.save(rollout, tmp_path / f"{rollout.sample}.json")
  distinct = {image.content_hash for rollout in rollouts for image in rollout.images}
  stored = sorted(path.name for path in (tmp_path / "images").iterdir())
  assert stored == sorted(f"{name}.{kind}" for name in distinct for kind in ("npz", "png"))
  assert json.loads((tmp_path / "0.json").read_text())["turns"][-1][
    "text"
  ]  # readable without decoding


def test_unreadable_files_are_named(tmp_path):
  path = tmp_path / "0.json"
  with pytest.raises(DataError, match=r"0\.json cannot be read .*write it again"):
    trajectory_lib.load(path)
  rollout = valid()
  trajectory_lib.save(rollout, path)
  png = tmp_path / "images" / f"{rollout.images[0].content_hash}.png"
  png.write_bytes(png.read_bytes()[:40])
  with pytest.raises(DataError, match=r"0\.json cannot be read"):
    trajectory_lib.load(path)
  path.write_text(path.read_text().replace(rollout.images[0].content_hash, "../../etc/passwd"))
  with pytest.raises(DataError, match="not a hex digest"):
    trajectory_lib.load(path)


# --- invariants --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_valid_trajectories_have_no_violation(seed):
  trajectory = valid(seed, answer="2.4" if seed % 2 else None)
  assert trajectory_lib.violation(trajectory, (dummies.IMAGE_PAD,)) is None
  trajectory_lib.check(trajectory, (dummies.IMAGE_PAD,))


def changed(array, index, value):
  array = array.copy()
  array[index] = value
  return array


ROLLOUT = with_two_drawings()
SECOND = ROLLOUT.turns[1]
PAD = ROLLOUT.image_start[1]  # first token of the image that turn 1 drew


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"logp_T": ROLLOUT.logp_T[:-1]}, r"logp_T: expected float32\[\d+\], got float32\[\d+\]"),
    ({"logp_T": ROLLOUT.logp_T.astype(np.float64)}, "logp_T: expected float32.*got float64"),
    ({"prompt_length": 0}, "prompt_length 0 of"),
    ({"prompt_images": 9}, "prompt_images 9 of 3 images"),
    ({"image_start": ROLLOUT.image_start[:1]}, "1 starts of 3 images"),
    ({"trained_T": changed(ROLLOUT.trained_T, 2, True)}, "prompt token 2 is trained"),
    (
      {"logp_T": changed(ROLLOUT.logp_T, SECOND.start + 1, 0.5)},
      f"turn 2 token {SECOND.start + 1} has log-probability 0.5",
    ),
    (
      {"logp_T": changed(ROLLOUT.logp_T, SECOND.start, -np.inf)},
      f"turn 2 token {SECOND.start} has log-probability -inf",
    ),
    ({"logp_T": changed(ROLLOUT.logp_T, 0, -1)}, "token 0 is not trained and has log-prob"),
    (
      {"policy_step_T": changed(ROLLOUT.policy_step_T, SECOND.start, -1)},
      f"turn 2 token {SECOND.start} has policy step -1",
    ),
    (
      {"token_ids_T": changed(ROLLOUT.token_ids_T, SECOND.start, dummies.VISION_END)},
      f"turn 2 token {SECOND.start} is forbidden id {dummies.VISION_END}",
    ),
    (
      {"trained_T": changed(ROLLOUT.trained_T, SECOND.end - 1, False)},
      f"turn 2 token {SECOND.end - 1} is not trained",
    ),
    ({"turns": (ROLLOUT.turns[0], ROLLOUT.turns[2])}, f"token {SECOND.start} is trained"),
    (
      {"turns": (ROLLOUT.turns[0], dataclasses.replace(SECOND, start=3), ROLLOUT.turns[2])},
      "turn 2 spans tokens 3 to",
    ),
    (
      {"turns": (ROLLOUT.turns[0], ROLLOUT.turns[0], *ROLLOUT.turns[1:])},
      f"turn 2 spans tokens {ROLLOUT.turns[0].start} to {ROLLOUT.turns[0].end}, after",
    ),
    (
      {"turns": (dataclasses.replace(ROLLOUT.turns[0], produced=()), *ROLLOUT.turns[1:])},
      "turns produced 1 images, the trajectory has 2",
    ),
    (
      {"token_ids_T": changed(ROLLOUT.token_ids_T, PAD, 5)},
      f"47 image tokens, 48 from the grids; they first differ at token {PAD}",
    ),
    ({"image_start": (6, PAD, 10_000)}, "image 3 spans tokens 10000 to 10016"),
    (
      {"position_TA": changed(ROLLOUT.position_TA, SECOND.start, 0)},
      "positions do not continue at",
    ),
    (
      {"position_TA": changed(ROLLOUT.position_TA, slice(PAD, None), 7)},
      rf"positions do not continue at \d+ from token {PAD}",
    ),
  ],
)
def test_each_violation_is_named(change, message):
  with pytest.raises(ValueError, match=rf"task room-7/chair\.table sample 5: .*{message}"):
    trajectory_lib.check(dataclasses.replace(ROLLOUT, **change), (dummies.IMAGE_PAD,))


# --- images over the budget --------------------------------------------------------------------


def at_most(most, images):
  return len(images) <= most


def test_the_rollout_that_drew_most_is_left_out_until_images_fit():
  many = with_two_drawings()
  plain = dataclasses.replace(valid(), sample=1)
  whole = len({i.content_hash for t in (many, plain) for i in t.images})
  fits = functools.partial(at_most, whole)
  assert trajectory_lib.limit_images([[many, plain]], fits) == ([[many, plain]], 0)
  fits = functools.partial(at_most, whole - 1)
  (group,), faults = trajectory_lib.limit_images([[many, plain]], fits)
  assert faults >= 1
  assert group[0].end_reason == "fault"
  assert len(group[0].images) == many.prompt_images
  assert not group[0].trained_T.any()
  assert trajectory_lib.violation(group[0], (dummies.IMAGE_PAD,)) is None


def test_prompts_that_exceed_the_budget_alone_are_kept():
  plain = trajectory_lib.as_fault(valid())
  assert trajectory_lib.limit_images([[plain]], lambda _: False) == ([[plain]], 0)
