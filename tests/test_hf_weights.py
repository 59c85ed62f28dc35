"""Checkpoints: same bits back, straight to shards, and every misfit named in one error."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from spatial_jax import sharding
from spatial_jax.errors import CheckpointError
from spatial_jax.hf import config, weights
from tests import policy_fixtures as fixtures


def one_device(path, shape):
  del path, shape
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture
def saved(tmp_path):
  cfg = fixtures.small_config(tied=False)
  params = fixtures.small_params(cfg)
  weights.save(params, cfg, tmp_path)
  return tmp_path, cfg, params


def equal(one, other):
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_load_gives_back_the_bits_of_save(saved):
  directory, cfg, params = saved
  assert weights.read_config(directory) == cfg
  equal(weights.load(directory, cfg, np.dtype(np.float32), one_device), params)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  weights.save(half, cfg, directory)
  back = weights.load(directory, cfg, jnp.dtype(jnp.bfloat16), one_device)
  equal(back, half)


@pytest.mark.parametrize("name", fixtures.family_configs())
def test_files_of_any_size_hold_the_same_bits(name, tmp_path):
  cfg = fixtures.family_configs()[name]
  params = fixtures.small_params(cfg)
  weights.save(params, cfg, tmp_path, file_bytes=20_000)
  files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  index = json.loads((tmp_path / weights.INDEX).read_text())
  assert len(files) > 3
  assert set(files) == set(index["weight_map"].values())
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
  assert index["metadata"]["total_size"] == sum(sizes)
  most = max(20_000, *sizes) + 2**13  # a header beside the tensors
  assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < most
  assert weights.read_config(tmp_path) == cfg
  equal(weights.load(tmp_path, cfg, np.dtype(np.float32), one_device), params)


def test_a_missing_file_and_a_broken_index_are_named(saved):
  directory, cfg, params = saved
  (directory / weights.WEIGHTS).unlink()
  weights.save(params, cfg, directory, file_bytes=20_000)
  first = sorted(directory.glob("*.safetensors"))[0]
  data = first.read_bytes()
  first.write_bytes(data[:-1000])
  with pytest.raises(CheckpointError, match=first.name):
    weights.load(directory, cfg, np.dtype(np.float32), one_device)
  first.unlink()
  with pytest.raises(CheckpointError, match=first.name):
    weights.load(directory, cfg, np.dtype(np.float32), one_device)
  (directory / weights.INDEX).write_text("{")
  with pytest.raises(CheckpointError, match=weights.INDEX):
    weights.load(directory, cfg, np.dtype(np.float32), one_device)


def test_load_reads_sharded_files_and_full_names(saved):
  directory, cfg, params = saved
  tensors = load_file(directory / weights.WEIGHTS)
  (directory / weights.WEIGHTS).unlink()

  def full_name(name: str) -> str:
    for short, alias in (("visual.", "model.visual."), ("model.", "model.language_model.")):
      if name.startswith(short):
        return alias + name.removeprefix(short)
    return name

  full = {full_name(name): tensor for name, tensor in tensors.items()}
  names = sorted(full)
  parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
  for file, chosen in parts.items():
    save_file({name: full[name] for name in chosen}, directory / file)
  index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
  (directory / weights.INDEX).write_text(json.dumps(index))
  equal(weights.load(directory, cfg, np.dtype(np.float32), one_device), params)


def test_arrays_go_to_their_shards(saved):
  directory, cfg, params = saved
  mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2), jax.devices()[:8])

  def place(path, shape):
    return jax.sharding.NamedSharding(mesh, sharding.param_spec(path, shape, mesh))

  loaded = weights.load(directory, cfg, np.dtype(np.float32), place)
  equal(loaded, params)
  kernel = loaded["decoder"]["layers"]["attn"]["q"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (3, 24, 3, 8)


def test_every_misfit_is_in_one_error(saved):
  directory, cfg, _ = saved
  tensors = load_file(directory / weights.WEIGHTS)
  del tensors["model.norm.weight"]
  tensors["model.extra.weight"] = np.zeros(2, np.float32)
  name = "model.layers.1.self_attn.q_proj.weight"
  tensors[name] = tensors[name].T[:, :40].copy()
  tensors["model.language_model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
  save_file(tensors, directory / weights.WEIGHTS)
  with pytest.raises(CheckpointError) as error:
    weights.load(directory, cfg, np.dtype(np.float32), one_device)
  message = str(error.value)
  assert "model.norm.weight is missing" in message
  assert "model.extra.weight is unknown" in message
  assert f"{name}: expected [48, 48], file has [48, 40]" in message
  assert "model.embed_tokens.weight is there twice" in message


def test_missing_files_are_named(tmp_path):
  with pytest.raises(CheckpointError, match=r"config\.json"):
    weights.read_config(tmp_path)
  with pytest.raises(CheckpointError, match=r"model\.safetensors"):
    weights.load(tmp_path, fixtures.small_config(True), np.dtype(np.float32), one_device)


def test_a_broken_file_is_named(saved):
  directory, cfg, _ = saved
  (directory / weights.WEIGHTS).write_bytes(b"not a checkpoint")
  with pytest.raises(CheckpointError, match=r"model\.safetensors"):
    weights.load(directory, cfg, np.dtype(np.float32), one_device)


def test_save_refuses_other_parameters(saved):
  directory, cfg, params = saved
  wrong = {**params, "decoder": {**params["decoder"], "norm": {"scale": jnp.ones(3)}}}
  del wrong["decoder"]["head"]
  with pytest.raises(
    CheckpointError, match=r"head/embedding is missing.*expected \[48\], got \[3\]"
  ):
    weights.save(wrong, cfg, directory)


# --- config ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_config_round_trips_flat_and_nested(tied):
  cfg = fixtures.small_config(tied)
  flat = config.to_hf(cfg)
  assert config.from_hf(flat) == cfg
  outer = ("model_type", "vision_config", "tie_word_embeddings", "architectures")
  nested = {k: v for k, v in flat.items() if k in outer or k.endswith("token_id")}
  nested["text_config"] = {k: v for k, v in flat.items() if k not in outer}
  rope = nested["text_config"].pop("rope_scaling")
  theta = nested["text_config"].pop("rope_theta")
  nested["text_config"]["rope_parameters"] = {
    "rope_type": "default",
    "mrope_section": rope["mrope_section"],
    "rope_theta": theta,
  }
  assert config.from_hf(nested) == cfg


def test_config_names_what_is_wrong():
  flat = config.to_hf(fixtures.small_config(True))
  with pytest.raises(ValueError, match="llama"):
    config.from_hf({**flat, "model_type": "llama"})
  with pytest.raises(ValueError, match="num_hidden_layers"):
    config.from_hf({k: v for k, v in flat.items() if k != "num_hidden_layers"})
  with pytest.raises(ValueError, match="rope sections"):
    config.from_hf({**flat, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}})
  with pytest.raises(ValueError, match="sliding"):
    config.from_hf({**flat, "use_sliding_window": True})
