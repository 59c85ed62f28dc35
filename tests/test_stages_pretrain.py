"""The recipe of the embedded policy in small: lessons, their truth, resuming, what it leaves."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding

from configs import common, tiny_pretrain
from spatial_jax import rng, train
from spatial_jax import trajectory as trajectory_lib
from spatial_jax.config import ConfigError, build
from spatial_jax.data.dense import dense_targets
from spatial_jax.data.loader import HELD_OUT_SEED, views_of
from spatial_jax.data.procedural import procedural_scene
from spatial_jax.data.text import IM_END
from spatial_jax.data.vision import patch_image
from spatial_jax.errors import DataError
from spatial_jax.learn.dense import DenseBatch, dense_loss, init_head
from spatial_jax.policy import weights
from spatial_jax.rollout.demonstration import play
from spatial_jax.stages import pretrain
from spatial_jax.stages.pretrain import PretrainRun, Teacher
from spatial_jax.types import TrainState
from tests import rollout_fixtures as fixtures

SEE, STEPS = 1, 4


def small_config(out):
  """`configs/tiny_pretrain.py`, hardly there: one seeing step, then plain and drawing lessons."""
  cfg = tiny_pretrain.get_config()
  cfg.recipe.update(
    {
      "see_steps": SEE,
      "see_scenes": 2,
      "micro": {"group": 1, "lengths": (256, 1024)},
      "lessons": (
        {"scenes": 1, "group": 2, "answer": "choice", "draw_share": 0.0},
        {"scenes": 2, "group": 2, "answer": "number", "draw_share": 0.0},
        {"scenes": 2, "group": 1, "answer": "number", "draw_share": 1.0},
      ),
    }
  )
  cfg.loop.steps, cfg.loop.checkpoint_every = STEPS, 1
  cfg.optimizer.update(total_steps=9, warmup_steps=0, decay_steps=0)
  cfg.shapes.update(
    prefix_buckets=(256,),
    tokens=512,
    vision={"windows": (32,), "frames": (8,), "patches": (144,)},
  )
  cfg.vision.update(layers=2, width=32, heads=2, mlp_width=32, full_layers=(1,))
  cfg.decoder.update(
    layers=1, width=32, heads=2, kv_heads=1, head_dim=16, mlp_width=32, rope_sections=(2, 3, 3)
  )
  cfg.tokenizer_rooms = 2
  cfg.out = str(out)
  return cfg


def settings(cfg):
  return {key: value for key, value in cfg.items() if key != "stage"}


@functools.cache
def teacher() -> Teacher:
  run = build(PretrainRun, settings(small_config("unused")))
  policy = dataclasses.replace(
    fixtures.policy_config(),
    vision=run.vision,
    decoder=dataclasses.replace(run.decoder, vocabulary=fixtures.VOCABULARY),
  )
  talk = dataclasses.replace(
    fixtures.conversation(policy), text=run.text, preprocess=run.preprocess
  )
  shapes = dataclasses.replace(
    run.shapes, prefix_buckets=(512,), tokens=1024, vocabulary=fixtures.VOCABULARY
  )
  return Teacher(talk, run.recipe, run.rooms, run.look, run.questions, shapes, run.style, run.seed)


# --- lessons -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_lesson_is_a_function_of_the_step(step):
  one, again = teacher().lesson(step), teacher().lesson(step)
  jax.tree.map(np.testing.assert_array_equal, one, again)
  assert (one.batch is None) == (step < SEE)


def test_lessons_take_turns():
  plain, drawing, choice = (teacher().lesson(step) for step in (1, 2, 3))
  assert [x.batch.prefix.token_BT.shape[0] for x in (plain, drawing, choice)] == [2, 2, 1]
  assert [x.batch.token_RT.shape[0] for x in (plain, drawing, choice)] == [4, 2, 2]
  end = fixtures.TOKENIZER.id(IM_END)

  def turns(batch):
    return ((batch.token_RT == end) & batch.trained_RT).sum(1)

  assert (turns(plain.batch) == 1).all()
  assert (turns(drawing.batch) == 2).any()
  assert (turns(choice.batch) == 1).all()


def test_rooms_of_lessons_are_not_held_out(monkeypatch):
  seen = []

  def scene_of(number, cfg):
    seen.append(number)
    return procedural_scene(number, cfg)

  monkeypatch.setattr(pretrain, "procedural_scene", scene_of)
  for step in range(6):
    teacher().lesson(step)
  assert len(set(seen)) == len(seen) >= 2 * SEE + 2 + 2 + 1
  assert max(seen) < HELD_OUT_SEED


@pytest.mark.parametrize("step", [0, 2])
def test_truth_stands_where_its_features_do(step, monkeypatch):
  """Each original picture's truth at its own features; drawn pictures and padding have none."""
  seen = []

  def look(scene, number, cfg):
    views = views_of(scene, number, cfg)
    seen.extend((scene, view) for view in views)
    return views

  monkeypatch.setattr(pretrain, "views_of", look)
  one = teacher()
  lesson = one.lesson(step)
  patches_M4X = lesson.vision.patches_PX.reshape(-1, 4, lesson.vision.patches_PX.shape[1])
  found = 0
  for scene, view in seen:
    truth = dense_targets(scene, view, one.cfg.categories, 28, one.cfg.share)
    image = patch_image(view.image, one.conversation.preprocess)
    for m, patches_4X in enumerate(image.patches_PX.reshape(image.tokens, 4, -1)):
      places = np.flatnonzero((patches_M4X == patches_4X[None]).all((1, 2)))
      if len(places) != 1:
        continue  # its room is not asked about, or two cells look alike
      (index,) = places
      found += 1
      assert lesson.dense.valid_M[index]
      assert lesson.dense.category_M[index] == truth.category_M[m]
      assert lesson.dense.log_depth_M[index] == truth.log_depth_M[m]
      np.testing.assert_array_equal(lesson.dense.box_M4[index], truth.box_M4[m])
      np.testing.assert_array_equal(lesson.dense.extent_M2[index], truth.extent_M2[m])
      assert lesson.dense.object_M[index] == truth.object_M[m]
  assert found > 10
  shown = lesson.vision.valid_P.reshape(-1, 4).all(1)
  assert not (lesson.dense.valid_M & ~shown).any()
  if step == 2:
    assert (shown & ~lesson.dense.valid_M).any(), "drawn pictures have no truth"


def test_demonstrations_of_lessons_are_sound(monkeypatch):
  played = []
  monkeypatch.setattr(
    pretrain, "play", lambda *arguments: played.append(play(*arguments)) or played[-1]
  )
  for step in (1, 2):
    teacher().lesson(step)
  pads = (teacher().conversation.policy.image_pad_id,)
  for trajectory in played:
    trajectory_lib.check(trajectory, pads)
  assert len(played) >= 4


def test_rooms_without_questions_are_an_error(monkeypatch):
  monkeypatch.setattr(pretrain, "_TRIES", 3)
  nothing = dataclasses.replace(
    teacher(), questions=dataclasses.replace(teacher().questions, min_pixels=10**6)
  )
  with pytest.raises(DataError, match="rooms in a row gave no question that a number answers"):
    nothing.lesson(1)


# --- the head ------------------------------------------------------------------------------------


def test_dense_loss_learns_and_leaves_out_what_has_no_truth():
  generator = np.random.default_rng(0)
  features_MD = jnp.asarray(generator.normal(size=(40, 6)).astype(np.float32))
  truth = DenseBatch(
    category_M=generator.integers(0, 3, 40).astype(np.int32),
    log_depth_M=generator.normal(size=40).astype(np.float32),
    box_M4=generator.normal(size=(40, 4)).astype(np.float32),
    extent_M2=generator.normal(size=(40, 2)).astype(np.float32),
    object_M=generator.random(40) < 0.5,
    valid_M=np.arange(40) < 30,
  )
  head = init_head(6, 2)
  assert head["kernel"].shape == (6, 3 + 7)
  value, metrics = dense_loss(head, features_MD, truth)
  valid, known = truth.valid_M, truth.valid_M & truth.object_M
  box, extent = np.abs(truth.box_M4[known]).mean(), np.abs(truth.extent_M2[known]).mean()
  depth = np.abs(truth.log_depth_M[valid]).mean()
  np.testing.assert_allclose(value, np.log(3) + depth + 10 * box + extent, rtol=1e-5)
  np.testing.assert_allclose(metrics["dense_box"], box, rtol=1e-5)
  wild = DenseBatch(*(np.where(_along(valid, x), x, 99).astype(x.dtype) for x in truth))
  wild = wild._replace(valid_M=valid, category_M=np.where(valid, truth.category_M, 0))
  other, _ = dense_loss(head, features_MD, wild)
  np.testing.assert_allclose(other, value, rtol=1e-6)
  kernel = jnp.asarray(generator.normal(size=(6, 10)).astype(np.float32))
  grads = jax.grad(lambda f: dense_loss({"kernel": kernel, "bias": head["bias"]}, f, truth)[0])
  moved = np.abs(np.asarray(grads(features_MD))).max(1) > 0
  np.testing.assert_array_equal(moved, valid)


def _along(mask_M, x):
  return mask_M.reshape(-1, *(1,) * (x.ndim - 1))


# --- the stage -----------------------------------------------------------------------------------


def test_both_kinds_of_lesson_trace():
  """The updates are strict about dtypes and ranks; the slow test below runs them."""
  one = teacher()
  policy = pretrain.make_policy(one.conversation.policy, jnp.dtype("float32"), remat=False)
  optimizer = optax.sgd(1.0)
  head = init_head(policy.cfg.decoder.width, len(one.cfg.categories))
  params = jax.eval_shape(lambda key: {"policy": policy.init(key), "head": head}, jax.random.key(0))
  state = TrainState(params, jax.eval_shape(optimizer.init, params), jnp.int32(0))
  update = pretrain.pretrain_programs(policy, optimizer, one.cfg)
  for step in (0, 1):
    after, metrics = jax.eval_shape(functools.partial(update, lesson=one.lesson(step)), state)
    same = jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype), after, state)
    assert all(jax.tree.leaves(same))
    assert {"dense_loss", "grad_norm"} <= metrics.keys()
    assert ("loss" in metrics) == (step == 1)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_policy(tmp_path, monkeypatch):
  def start(name):
    train.run(small_config(tmp_path / name / "policy"), tmp_path / name)

  start("whole")
  lesson = Teacher.lesson

  def broken(self, step):
    if step == 2:
      raise DataError("the disk is gone")
    return lesson(self, step)

  monkeypatch.setattr(Teacher, "lesson", broken)
  with pytest.raises(DataError, match="the disk is gone"):
    start("parts")
  monkeypatch.setattr(Teacher, "lesson", lesson)
  start("parts")
  for name in ("model.safetensors", "tokenizer.json", "config.json"):
    one, other = ((tmp_path / run / "policy" / name).read_bytes() for run in ("whole", "parts"))
    assert one == other, name
  folder = tmp_path / "whole" / "policy"
  cfg, place = weights.read_config(folder), SingleDeviceSharding(jax.devices()[0])
  params = weights.load(folder, cfg, np.dtype(np.float32), lambda name, shape: place)
  init = pretrain.make_policy(cfg, jnp.dtype("float32")).init
  first = jax.eval_shape(init, rng.stream(0, "init"))
  assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, first)


def test_microbatches_must_divide_the_lessons():
  cfg = small_config("unused")
  cfg.recipe.micro.group = 2
  with pytest.raises(ConfigError, match=r"micro\.group is 2: .* every lesson, \[2, 2, 1\]"):
    build(PretrainRun, settings(cfg))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"learn.micro.group": 3}, r"micro\.group is 3: not a divisor of config\.rollout\.group 8"),
    ({"learn.micro.lengths": (64, 200)}, r"micro\.lengths ends at 200: .* 255 \+ 1"),
    ({"learn.prefix_buckets": (64,)}, r"prefix_buckets ends at 64: .* 512"),
  ],
)
def test_shapes_of_the_update_must_hold_the_rollouts(changes, message):
  cfg = common.get_config()
  cfg.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message):
    build(train.GrpoRun, settings(cfg))
