"""Hugging Face weights: equal bits after a round trip, shards, and every misfit in one error."""

import dataclasses
import json
import shutil

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


def save(folder, tied):
  cfg = fixtures.small_config(tied)
  params = fixtures.small_params(cfg)
  weights.save(params, cfg, folder)
  return folder, cfg, params


@pytest.fixture
def saved(tmp_path):
  return save(tmp_path, tied=False)


@pytest.fixture
def tied(tmp_path):
  return save(tmp_path, tied=True)


def float32(path):
  return np.dtype(np.float32)


def equal(params, expected):
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def read(folder):
  """Config and parameters, as a run starts from them."""
  cfg = weights.read_config(folder)
  return cfg, weights.load(folder, cfg, float32, one_device)


def change_tensors(folder, change):
  """Stores the tensors that `change` returns; `change` may edit them in place."""
  tensors = load_file(folder / weights.WEIGHTS)
  save_file(change(tensors) or tensors, folder / weights.WEIGHTS)


def change_config(folder, change):
  record = json.loads((folder / weights.CONFIG).read_text())
  change(record)
  (folder / weights.CONFIG).write_text(json.dumps(record))


def test_load_returns_the_bits_of_save(saved):
  directory, cfg, params = saved
  assert weights.read_config(directory) == cfg
  equal(weights.load(directory, cfg, float32, one_device), params)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  weights.save(half, cfg, directory)
  back = weights.load(directory, cfg, lambda path: jnp.dtype(jnp.bfloat16), one_device)
  equal(back, half)


@pytest.mark.parametrize("name", fixtures.family_configs())
def test_files_of_any_size_have_the_same_bits(name, tmp_path):
  cfg = fixtures.family_configs()[name]
  params = fixtures.small_params(cfg)
  weights.save(params, cfg, tmp_path, file_bytes=20_000)
  files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
  index = json.loads((tmp_path / weights.INDEX).read_text())
  assert len(files) > 3
  assert set(files) == set(index["weight_map"].values())
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
  assert index["metadata"]["total_size"] == sum(sizes)
  most = max(20_000, *sizes) + 2**13  # for the header
  assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < most
  assert weights.read_config(tmp_path) == cfg
  equal(weights.load(tmp_path, cfg, float32, one_device), params)


def test_a_missing_file_and_a_broken_index_are_named(saved):
  directory, cfg, params = saved
  weights.save(params, cfg, directory, file_bytes=20_000)
  assert not (directory / weights.WEIGHTS).exists(), "it would hide the shards"
  first = sorted(directory.glob("*.safetensors"))[0]
  data = first.read_bytes()
  first.write_bytes(data[:-1000])
  with pytest.raises(CheckpointError, match=first.name):
    weights.load(directory, cfg, float32, one_device)
  first.unlink()
  with pytest.raises(CheckpointError, match=first.name):
    weights.load(directory, cfg, float32, one_device)
  (directory / weights.INDEX).write_text("{")
  with pytest.raises(CheckpointError, match=weights.INDEX):
    weights.load(directory, cfg, float32, one_device)


def test_load_reads_shards_and_the_names_of_transformers_5(saved):
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
  equal(weights.load(directory, cfg, float32, one_device), params)


def test_each_array_is_sharded_as_asked(saved):
  directory, cfg, params = saved
  mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2), jax.devices()[:8])

  def place(path, shape):
    return jax.sharding.NamedSharding(mesh, sharding.param_spec(path, shape, mesh))

  loaded = weights.load(directory, cfg, float32, place)
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
    weights.load(directory, cfg, float32, one_device)
  message = str(error.value)
  assert "model.norm.weight is missing" in message
  assert "model.extra.weight is unknown" in message
  assert f"{name}: expected [48, 48], file has [48, 40]" in message
  assert "model.embed_tokens.weight is there twice" in message


def test_a_long_list_of_misfits_is_cut(saved):
  directory, cfg, _ = saved
  other = dataclasses.replace(cfg, decoder=dataclasses.replace(cfg.decoder, layers=9))
  with pytest.raises(CheckpointError, match=r"and \d\d more such tensors") as error:
    weights.load(directory, other, float32, one_device)
  assert len(str(error.value)) < 1000


def test_missing_files_are_named(tmp_path):
  with pytest.raises(CheckpointError, match=r"config\.json"):
    weights.read_config(tmp_path)
  with pytest.raises(CheckpointError, match=r"model\.safetensors"):
    weights.load(tmp_path, fixtures.small_config(True), float32, one_device)


def test_weights_can_be_read_by_everyone(saved):
  assert (saved[0] / weights.WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_one_file_comes_before_the_index(saved):
  """As in transformers; the shards may be those of the policy before its fine-tuning."""
  directory, cfg, params = saved
  new = jax.tree.map(lambda x: x + 1, params)
  weights.save(new, cfg, directory / "new")
  weights.save(params, cfg, directory, file_bytes=20_000)
  shutil.copy(directory / "new" / weights.WEIGHTS, directory)
  equal(read(directory)[1], new)
  weights.save(params, cfg, directory)
  assert not (directory / weights.INDEX).exists()


def test_constants_of_old_checkpoints_are_ignored(saved):
  directory, cfg, params = saved
  change_tensors(directory, lambda t: t.update({"model.rotary_emb.inv_freq": np.ones(4)}))
  equal(weights.load(directory, cfg, float32, one_device), params)


# --- output head and embedding -----------------------------------------------------------------


def test_a_second_copy_of_a_tied_head_is_ignored(tied):
  directory, cfg, params = tied
  change_tensors(directory, lambda t: t.update({weights.HEAD: t[weights.EMBEDDING].copy()}))
  found, loaded = read(directory)
  assert found == cfg
  equal(loaded, params)


def test_the_only_copy_of_a_tied_embedding_may_have_the_name_of_the_head(tied):
  directory, cfg, params = tied
  change_tensors(directory, lambda t: t.update({weights.HEAD: t.pop(weights.EMBEDDING)}))
  found, loaded = read(directory)
  assert found == cfg
  equal(loaded, params)


@pytest.mark.parametrize("file_bytes", [1 << 20, 20_000])
def test_a_head_of_other_values_is_used_though_the_config_ties_it(file_bytes, tmp_path):
  """transformers 4 wrote `tie_word_embeddings: true` into the config of some untied models."""
  cfg = fixtures.small_config(tied=False)
  params = fixtures.small_params(cfg)
  weights.save(params, cfg, tmp_path, file_bytes)
  change_config(tmp_path, lambda record: record.update(tie_word_embeddings=True))
  found, loaded = read(tmp_path)
  assert found == cfg
  equal(loaded, params)
  tied_cfg = fixtures.small_config(tied=True)
  with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
    weights.load(tmp_path, tied_cfg, float32, one_device)


def test_a_missing_head_is_named(tied):
  directory, _, _ = tied
  change_config(directory, lambda record: record.update(tie_word_embeddings=False))
  with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
    read(directory)


TIES = [
  ("qwen2_5_vl/tied", True, None, True),
  ("qwen2_5_vl/tied", None, True, True),
  ("qwen2_5_vl/tied", False, True, True),  # transformers 4 wrote the inner value
  ("qwen2_5_vl/untied", False, False, False),
  ("qwen3_vl/tied", True, False, True),
  ("qwen3_vl/tied", True, None, True),
  ("qwen3_vl/untied", False, True, False),  # the outer value decides
]


def write_ties(folder, name, outer, inner):
  """A folder whose config has these two values of `tie_word_embeddings`; None for no value."""
  cfg = fixtures.family_configs()[name]
  weights.save(fixtures.small_params(cfg), cfg, folder)

  def change(record):
    text = record.setdefault("text_config", {})
    if cfg.family != "qwen3_vl":
      outside = ("model_type", "vision_config", "text_config", "architectures", "torch_dtype")
      moved = [key for key in record if key not in outside and not key.endswith("token_id")]
      text.update({key: record.pop(key) for key in moved})
    for group, value in ((record, outer), (text, inner)):
      group.pop("tie_word_embeddings", None)
      group.update({} if value is None else {"tie_word_embeddings": value})

  change_config(folder, change)
  return cfg


@pytest.mark.parametrize(("name", "outer", "inner", "expected"), TIES)
def test_the_config_ties_the_head_as_in_transformers(name, outer, inner, expected, tmp_path):
  cfg = write_ties(tmp_path, name, outer, inner)
  assert read(tmp_path)[0] == cfg
  assert cfg.decoder.tied == expected


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "outer", "inner", "expected"), TIES)
def test_transformers_ties_the_same_heads(name, outer, inner, expected, tmp_path):
  pytest.importorskip("torch", reason="needs torch (extra bench)")
  from transformers import AutoModelForImageTextToText

  write_ties(tmp_path, name, outer, inner)
  model = AutoModelForImageTextToText.from_pretrained(tmp_path)
  head = model.get_output_embeddings()
  assert head is not None
  assert (model.get_input_embeddings().weight is head.weight) == expected


def test_save_refuses_parameters_that_do_not_fit(saved):
  directory, cfg, params = saved
  wrong = {**params, "decoder": {**params["decoder"], "norm": {"scale": jnp.ones(3)}}}
  del wrong["decoder"]["head"]
  with pytest.raises(
    CheckpointError, match=r"head/embedding is missing.*expected \[48\], policy has \[3\]"
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


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"model_type": "llama"}, "model_type is 'llama' and must be one of"),
    ({"model_type": "qwen3_vl_moe"}, "model_type is 'qwen3_vl_moe' and must be one of"),
    ({"model_type": "qwen2_5_vl_text"}, "model_type is 'qwen2_5_vl_text' and must be one of"),
    ({"num_hidden_layers": ...}, "'num_hidden_layers' is missing"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers is '3' and must be a whole number"),
    ({"vocab_size": 0}, "vocab_size is 0 and must be"),
    ({"vision_config": None}, "wrong type"),
    ({"vision_config": ...}, "'vision_config' is missing"),
    ({"image_token_id": 96}, "image_token_id is 96 and must be below vocab_size 96"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 1]}}, "rope_sections"),
    ({"rope_scaling": {"type": "yarn", "mrope_section": [4, 6, 6]}}, "rope type is 'yarn'"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantised \(awq\)"),
    ({"quantization_config": {"quant_method": "fp8"}}, r"quantised \(fp8\)"),
    ({"quantization_config": {"load_in_4bit": True}}, "quantised"),
  ],
)
def test_the_config_error_names_the_key(change, message):
  record = {**config.to_hf(fixtures.small_config(True)), **change}
  with pytest.raises(ValueError, match=message) as caught:
    config.from_hf({key: value for key, value in record.items() if value is not ...})
  assert "\n" not in str(caught.value)


def test_a_config_that_is_no_mapping_is_refused(tmp_path):
  for text in ("[1, 2]", "null", "{", ""):
    (tmp_path / weights.CONFIG).write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
      weights.read_config(tmp_path)
