"""A run's checkpoint exported: every bit and every file that transformers needs."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax import checkpoint, sharding
from spatial_jax.data.tokenizer import IM_END
from spatial_jax.errors import CheckpointError
from spatial_jax.hf import weights
from spatial_jax.hf.export import write_files
from spatial_jax.hf.processor import read_processor
from spatial_jax.policy import lora, param_tree
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.sharding import MeshConfig
from spatial_jax.stages.load import load_policy, record
from spatial_jax.tools import export
from spatial_jax.types import TrainState
from tests import policy_fixtures as fixtures
from tests.rollout_fixtures import TOKENIZER


def saved_run(workdir: pathlib.Path, began: pathlib.Path, **more: object):
  """A run's checkpoint and tokenizer, as training leaves them."""
  cfg = fixtures.small_config(False)
  params = fixtures.small_params(cfg)
  config = {"model": record(cfg), "init": str(began)}
  config |= {"preprocess": dataclasses.asdict(fixtures.PREPROCESS), **more}
  state = TrainState(params, {"momentum": jnp.zeros(3)}, jnp.int32(4))
  with checkpoint.Saver(workdir, keep=1) as saver:
    saver.save(state, checkpoint.Progress(4, 4, {}, None, config))
  TOKENIZER.inner.save(str(workdir / "tokenizer.json"))
  return cfg, params


def read_back(folder: pathlib.Path, cfg):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return weights.load(folder, cfg, np.dtype(np.float32), lambda path, shape: device)


@pytest.mark.filterwarnings("ignore")
def test_export_writes_the_runs_parameters(tmp_path):
  cfg, params = saved_run(tmp_path / "run", tmp_path / "gone")
  export.export(tmp_path / "run", tmp_path / "hf", None)
  jax.tree.map(np.testing.assert_array_equal, read_back(tmp_path / "hf", cfg), params)
  assert {path.name for path in (tmp_path / "hf").iterdir()} == {
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "preprocessor_config.json", "generation_config.json"),
  }
  assert read_processor(tmp_path / "hf") == fixtures.PREPROCESS
  again = load_policy(tmp_path / "hf", sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  with pytest.raises(CheckpointError, match=r"already holds model\.safetensors"):
    export.export(tmp_path / "run", tmp_path / "hf", None)


@pytest.mark.filterwarnings("ignore")
def test_export_keeps_the_files_the_run_began_with(tmp_path):
  """But not what the run has of its own: tokenizer, pixels, weights."""
  began = tmp_path / "began"
  began.mkdir()
  for name in ("config.json", "chat_template.jinja", "merges.txt", "tokenizer.json"):
    (began / name).write_text(f"of the start: {name}")
  (began / "model-00001-of-00002.safetensors").write_text("")
  saved_run(tmp_path / "run", began)
  export.export(tmp_path / "run", tmp_path / "hf", None, "bfloat16")
  kept = {
    path.name for path in (tmp_path / "hf").iterdir() if "of the start" in path.read_text("latin1")
  }
  assert kept == {"chat_template.jinja", "merges.txt"}
  assert not list((tmp_path / "hf").glob("model-0*"))
  assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.filterwarnings("ignore")
def test_export_needs_a_run_that_names_its_model(tmp_path):
  with pytest.raises(CheckpointError, match="does not exist"):
    export.export(tmp_path / "nothing", tmp_path / "hf", None)
  state = TrainState({"x": jnp.zeros(2)}, (), jnp.int32(4))
  with checkpoint.Saver(tmp_path / "run", keep=1) as saver:
    saver.save(state, checkpoint.Progress(4, 4, {}, None, {}))
  with pytest.raises(CheckpointError, match=r"config\.model"):
    export.export(tmp_path / "run", tmp_path / "hf", None)
  assert not (tmp_path / "hf").exists()


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_what_is_exported_is_what_transformers_computes(tmp_path):
  """Weights with adapters merged, tokenizer, pixels: logits of the run's own policy."""
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  adapters = LoraConfig(("^decoder/layers/attn/q/kernel",), 2, 4.0)
  cfg = fixtures.small_config(False)
  policy = dataclasses.replace(make_policy(cfg, jnp.float32), lora=adapters)
  noise = jax.tree.map(
    lambda x: 0.5 * jax.random.normal(jax.random.key(x.shape[-1]), x.shape),
    lora.split(policy.init(jax.random.key(0)))[1],
  )
  params = param_tree.merge(fixtures.small_params(cfg), noise)
  config = {"model": record(cfg), "init": "", "lora": dataclasses.asdict(adapters)}
  config |= {"preprocess": dataclasses.asdict(fixtures.PREPROCESS)}
  with checkpoint.Saver(tmp_path / "run", keep=1) as saver:
    saver.save(TrainState(params, (), jnp.int32(1)), checkpoint.Progress(1, 1, {}, None, config))
  TOKENIZER.inner.save(str(tmp_path / "run" / "tokenizer.json"))
  export.export(tmp_path / "run", tmp_path / "hf", None)
  ids = np.arange(3, 40)
  rows = (ids[None].astype(np.int32), np.repeat(np.arange(37)[None, :, None], 3, 2))
  features_MYD = jnp.zeros((1, 1, cfg.decoder.width))
  hidden = policy.hidden(params, *rows, np.ones((1, 37), bool), features_MYD, np.full((1, 37), -1))
  ours = np.asarray(policy.logits(params, hidden))[0]
  model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").eval()
  with torch.no_grad():
    theirs = model(input_ids=torch.asarray(ids[None])).logits[0].float().numpy()
  assert np.abs(ours - theirs).max() < 1e-4 * theirs.std()
  base = policy.without_adapters.logits(
    params,
    policy.without_adapters.hidden(
      lora.split(params)[0], *rows, np.ones((1, 37), bool), features_MYD, np.full((1, 37), -1)
    ),
  )
  assert np.abs(np.asarray(base)[0] - theirs).max() > 1e-2 * theirs.std(), "adapters matter"
  words = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  assert words("How far is the chair?").input_ids == TOKENIZER.encode("How far is the chair?")
  assert model.generation_config.eos_token_id == TOKENIZER.id(IM_END)


def test_what_is_published_again_is_of_the_new_tokenizer(tmp_path):
  """A second policy in the same folder leaves nothing of the first."""
  write_files(TOKENIZER, fixtures.PREPROCESS, tmp_path, None)
  (tmp_path / "generation_config.json").write_text("{}")
  write_files(TOKENIZER, fixtures.PREPROCESS, tmp_path, None)
  written = json.loads((tmp_path / "generation_config.json").read_text())
  assert written["eos_token_id"] == TOKENIZER.id(IM_END)
