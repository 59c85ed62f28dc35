"""What cannot be used is refused in one line that names it, before anything lies on a device."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from configs import common
from spatial_jax import sharding, train
from spatial_jax.config import ConfigError
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.errors import DataError, UserError
from spatial_jax.hf import processor, weights
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.stages.load import load_policy, read_shape
from spatial_jax.tools import verify
from tests import evaluate_fixtures as fixtures
from tests import rollout_fixtures


@pytest.fixture
def folder(tmp_path):
  """A Hugging Face folder in two files, with its tokenizer and processor."""
  path = fixtures.save_policy(tmp_path / "policy", 0)
  (path / weights.WEIGHTS).unlink()
  cfg = fixtures.policy_config()
  weights.save(fixtures.random_params(0), cfg, path, file_bytes=40_000)
  (path / processor.IMAGE_FILE).write_text(json.dumps(processor.to_hf(pixels(14))))
  return path


def pixels(patch_size: int) -> PreprocessConfig:
  return PreprocessConfig(patch_size, 2, 2, 784, 3136, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def mesh():
  return sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])


def other_architecture(path: pathlib.Path) -> None:
  (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))


def truncated(path: pathlib.Path) -> None:
  file = sorted(path.glob("*.safetensors"))[1]
  file.write_bytes(file.read_bytes()[:-100])


def missing_shard(path: pathlib.Path) -> None:
  sorted(path.glob("*.safetensors"))[1].unlink()


def odd_patches(path: pathlib.Path) -> None:
  (path / processor.IMAGE_FILE).write_text(json.dumps(processor.to_hf(pixels(13))))


def no_tokenizer(path: pathlib.Path) -> None:
  (path / "tokenizer.json").unlink()


def narrow_tensor(path: pathlib.Path) -> None:
  """Of a policy that is a little wider than its config says."""
  config = json.loads((path / "config.json").read_text())
  config["vision_config"]["intermediate_size"] = 20
  (path / "config.json").write_text(json.dumps(config))


def test_the_folder_itself_loads(folder):
  assert len(list(folder.glob("*.safetensors"))) > 1
  assert load_policy(folder, mesh()).policy.cfg == read_shape(folder)


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (other_architecture, r"config\.json: .*llama"),
    (truncated, r"model-00002-of-\d+\.safetensors is not a safetensors file"),
    (missing_shard, r"has no model-00002-of-\d+\.safetensors"),
    (odd_patches, r"preprocessor_config\.json: patch_size is 13, but this policy has 14"),
    (no_tokenizer, r"tokenizer\.json does not exist"),
    (narrow_tensor, r"visual\.blocks\.0\.mlp\.gate_proj\.weight: expected \[20, 16\], file has"),
  ],
)
def test_a_spoilt_folder_is_refused_before_anything_is_placed(folder, monkeypatch, spoil, message):
  spoil(folder)
  refuse_devices(monkeypatch)
  with pytest.raises(UserError, match=message) as caught:
    load_policy(folder, mesh())
  assert "\n" not in str(caught.value)


def refuse_devices(monkeypatch) -> None:
  """Any array put on a device fails the test."""

  def refuse(*_: object, **__: object):
    raise AssertionError("something was put on a device")

  monkeypatch.setattr(jax, "device_put", refuse)
  monkeypatch.setattr(jax, "make_array_from_single_device_arrays", refuse)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"preprocess.patch_size": 13},
      r"config\.preprocess: patch_size is 13, but this policy has 14",
    ),
    (
      {"lora.paths": ("attn/z/",), "learn.optimizer.gains": ()},
      r"config\.lora\.paths: no kernel's path matches 'attn/z/'",
    ),
    (
      {"lora.paths": ("attn/q/kernel$",)},
      r"config\.learn\.optimizer\.gains must be \(\) where config\.lora has paths",
    ),
  ],
)
def test_a_run_that_does_not_fit_its_policy_is_refused_before_it_is_loaded(
  folder, tmp_path, monkeypatch, changes, message
):
  config = common.get_config()
  config.init = str(folder)
  config.update_from_flattened_dict(changes)
  refuse_devices(monkeypatch)
  with pytest.raises(ConfigError, match=message):
    train.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_image_tokens_without_an_image_name_the_task():
  words = dataclasses.replace(rollout_fixtures.WORDS, image_line="<|image_pad|>")
  conversation = rollout_fixtures.conversation()
  conversation = Conversation(
    conversation.tokenizer, words, conversation.preprocess, conversation.policy
  )
  with pytest.raises(DataError, match=r"task room/7: the text has 2 image tokens for 1 images"):
    conversation.prompt(rollout_fixtures.task("room/7"))


def test_pads_that_do_not_match_are_refused_before_weights_are_read(folder, monkeypatch):
  cfg = read_shape(folder)
  ids = np.array([3, cfg.image_pad_id, cfg.image_pad_id, 4])
  patches = np.zeros((4, cfg.vision.patch_values), np.float32)
  refuse_devices(monkeypatch)
  with pytest.raises(ValueError, match="2 image pads, but 1 tokens of the grids"):
    verify.forward(folder, ids, patches, np.array([[1, 2, 2]]))
