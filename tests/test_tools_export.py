"""An exported checkpoint: its weights bit by bit, and the files that transformers needs."""

import dataclasses
import errno
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import spatial_jax
from spatial_jax import checkpoint, cli, sharding
from spatial_jax.data.chat_template import CHATML
from spatial_jax.data.tokenizer import IM_END
from spatial_jax.errors import CheckpointError, DataError
from spatial_jax.evaluate.results import (
  Cell,
  Paired,
  ResultColumn,
  ResultRow,
  ResultTable,
  write_results,
)
from spatial_jax.hf import export as export_lib
from spatial_jax.hf import processor, weights
from spatial_jax.hf.export import write_files
from spatial_jax.hf.processor import read_processor
from spatial_jax.policy import lora, param_tree
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.sharding import MeshConfig
from spatial_jax.stages.load import load_policy, record
from spatial_jax.tools import export
from spatial_jax.types import TokenArrays, TrainState
from tests import policy_fixtures as fixtures
from tests.rollout_fixtures import TOKENIZER, policy_config
from tests.test_chat_template import QWEN2_VL

LIBRARY = pathlib.Path(spatial_jax.__file__).parent
ROOT = LIBRARY.parent
PREPROCESS = dataclasses.asdict(fixtures.PREPROCESS)


def save_run(workdir: pathlib.Path, base: pathlib.Path, params=None, **more: object):
  """The checkpoint and tokenizer of a run."""
  cfg = policy_config()
  params = params or fixtures.hashed_params(cfg, 1)
  config = {"model": record(cfg), "init": str(base), "seed": 3, "stages": ["grpo"]}
  config |= {"preprocess": PREPROCESS, **more}
  state = TrainState(params, {"momentum": jnp.zeros(3)}, jnp.int32(4))
  with checkpoint.Saver(workdir, keep=1) as saver:
    saver.save(state, checkpoint.Progress(4, None, config))
  TOKENIZER.inner.save(str(workdir / "tokenizer.json"))
  return cfg, params


def read_back(folder: pathlib.Path, cfg):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return weights.load(folder, cfg, lambda path: np.dtype(np.float32), lambda path, shape: device)


@pytest.mark.filterwarnings("ignore")
def test_export_writes_the_parameters_of_the_run(tmp_path):
  cfg, params = save_run(tmp_path / "run", tmp_path / "gone")
  out = tmp_path / "hf"
  export.export(tmp_path / "run", out, None)
  jax.tree.map(np.testing.assert_array_equal, read_back(out, cfg), params)
  assert {path.name for path in out.iterdir()} == {
    *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("chat_template.jinja", "preprocessor_config.json", "generation_config.json"),
    *("README.md", "training_config.json"),
  }
  assert {path.stat().st_mode & 0o444 for path in out.iterdir()} == {0o444}
  assert read_processor(out) == fixtures.PREPROCESS
  again = load_policy(out, sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
  jax.tree.map(np.testing.assert_array_equal, again.params, params)
  with pytest.raises(CheckpointError, match=r"already has model\.safetensors"):
    export.export(tmp_path / "run", out, None)
  with pytest.raises(CheckpointError, match="is a Hugging Face folder already"):
    export.export(out, tmp_path / "other", None)


@pytest.mark.filterwarnings("ignore")
def test_export_copies_only_what_stays_true_of_the_base_policy(tmp_path):
  """Its weights of any format, its scores, its image settings and its adapters do not."""
  base = tmp_path / "base"
  base.mkdir()
  copied = ("chat_template.jinja", "merges.txt", "LICENSE", "special_tokens_map.json")
  others = ("config.json", "tokenizer.json", "README.md", "model-00001-of-00002.safetensors")
  others += ("pytorch_model.bin", "model.gguf", "adapter_config.json", "trainer_state.json")
  for name in (*copied, *others):
    (base / name).write_text(f"@base {name}")
  clips = {"video_processor": {"fps": 2, "note": "@base"}, "image_processor": {"size": 1}}
  (base / processor.NESTED_FILE).write_text(json.dumps(clips))
  save_run(tmp_path / "run", base)
  out = tmp_path / "hf"
  export.export(tmp_path / "run", out, None, "bfloat16")
  kept = {path.name for path in out.iterdir() if "@base" in path.read_text("latin1")}
  assert kept == {*copied, processor.VIDEO_FILE}
  assert not (out / processor.NESTED_FILE).exists(), "it would override the run's image settings"
  assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.filterwarnings("ignore")
def test_export_writes_the_chat_template_of_the_run(tmp_path):
  """Also if the base policy is gone, or has its template in another file."""
  base = tmp_path / "base"
  base.mkdir()
  (base / "config.json").write_text("{}")
  (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": QWEN2_VL}))
  for where in (base, tmp_path / "gone"):
    run, out = tmp_path / f"{where.name}_run", tmp_path / f"{where.name}_hf"
    save_run(run, where)
    (run / "chat_template.jinja").write_text(QWEN2_VL)
    export.export(run, out, None)
    assert (out / "chat_template.jinja").read_text() == QWEN2_VL
    assert (
      load_policy(out, sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])).template.source
      == QWEN2_VL
    )


@pytest.mark.filterwarnings("ignore")
def test_export_needs_a_run_that_names_its_model(tmp_path):
  with pytest.raises(CheckpointError, match="does not exist"):
    export.export(tmp_path / "nothing", tmp_path / "hf", None)
  state = TrainState({"x": jnp.zeros(2)}, (), jnp.int32(4))
  with checkpoint.Saver(tmp_path / "run", keep=1) as saver:
    saver.save(state, checkpoint.Progress(4, None, {}))
  with pytest.raises(CheckpointError, match=r"config\.model"):
    export.export(tmp_path / "run", tmp_path / "hf", None)
  assert not (tmp_path / "hf").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
  ("module", "name"), [(weights, "save_file"), (export_lib, "write_text"), (weights, "write_text")]
)
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, module, name):
  save_run(tmp_path / "run", tmp_path / "gone")

  def fill(*_: object, **__: object):
    if name == "save_file":  # what the library raises: it has no error number
      raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "hf/tokenizer.json")

  monkeypatch.setattr(module, name, fill)
  with (
    pytest.raises(SystemExit) as exit_,
    cli.one_line_exits("stopped"),
  ):
    export.export(tmp_path / "run", tmp_path / "hf", None)
  assert exit_.value.code == 2


def test_tokenizers_are_written_by_the_function_that_names_full_disks(tmp_path):
  """`Tokenizer.save` of the library raises a bare Exception."""
  for path in (*LIBRARY.rglob("*.py"), *(ROOT / "experiments").rglob("*.py")):
    assert "inner.save(" not in path.read_text(), path


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_files_that_does_not_exist_is_refused(tmp_path):
  save_run(tmp_path / "run", tmp_path / "gone")
  with pytest.raises(CheckpointError, match=r"--files_from=.*nowhere is not a folder; give"):
    export.export(tmp_path / "run", tmp_path / "hf", tmp_path / "nowhere")
  assert not (tmp_path / "hf").exists()


# --- model card --------------------------------------------------------------------------------


def results(mean: float) -> ResultTable:
  cells = {"start_greedy": Cell(0.5, 0.4, 0.6), "end_greedy": Cell(mean, 0.6, 0.8)}
  paired = Paired("score", "end_greedy", "start_greedy", "score", mean - 0.5, 0.1, 0.3)
  return ResultTable(
    columns=tuple(ResultColumn(key, key.replace("_", ", ")) for key in reversed(cells)),
    rows=(ResultRow("object_counting", 40, cells), ResultRow("camera_distance", 24, cells)),
    overall=cells,
    parsed=dict.fromkeys(cells, 1.0),
    summary=(),
    paired=(paired,),
    notes=("Directions are left out.",),
  )


@pytest.mark.filterwarnings("ignore")
def test_the_model_card_is_of_the_run(tmp_path):
  cfg, params = save_run(tmp_path / "run", tmp_path / "base-policy")
  origin = {"origin": {"steps": 4, "seed": 3}}
  write_results(results(0.712), tmp_path / "run", origin)
  export.export(tmp_path / "run", tmp_path / "hf", None, command="python -m tool --out=hf")
  card = (tmp_path / "hf" / "README.md").read_text()
  for line in (
    f"| base policy | {tmp_path / 'base-policy'} |",
    "| stages | grpo |",
    "| steps | 4 |",
    "| seed | 3 |",
    f"| parameters | {sum(x.size for x in jax.tree.leaves(params)):,} |",
    "| written by | `python -m tool --out=hf` |",
    "| end, greedy | 0.712 | 0.600 to 0.800 |",
    "Directions are left out.",
  ):
    assert f"\n{line}\n" in card
  assert "On 64 held-out questions the greedy score rose from 0.500 to 0.712: +0.212" in card
  written = json.loads((tmp_path / "hf" / "training_config.json").read_text())
  assert written["model"] == json.loads(json.dumps(record(cfg)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("origin", [{"steps": 50, "seed": 3}, {"steps": 4, "seed": 0}, {}, None])
def test_results_of_another_policy_are_not_in_the_card(origin, tmp_path):
  """results.json may be of another step, or of the base policy, or missing."""
  save_run(tmp_path / "run", tmp_path / "base")
  if origin is not None:
    write_results(results(0.712), tmp_path / "run", {"origin": origin})
  export.export(tmp_path / "run", tmp_path / "hf", None)
  card = (tmp_path / "hf" / "README.md").read_text()
  assert "0.712" not in card
  assert "not evaluated" in card


@pytest.mark.filterwarnings("ignore")
def test_a_broken_result_table_is_named_before_anything_is_written(tmp_path):
  save_run(tmp_path / "run", tmp_path / "base")
  broken = {"origin": {"steps": 4, "seed": 3}, "columns": 1}
  (tmp_path / "run" / "results.json").write_text(json.dumps(broken))
  with pytest.raises(DataError, match=r"results\.json"):
    export.export(tmp_path / "run", tmp_path / "hf", None)
  assert not (tmp_path / "hf").exists()


# --- against transformers ----------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_the_logits_of_the_run(tmp_path):
  """With merged adapters; the tokenizer and the end of generation agree as well."""
  transformers = pytest.importorskip("transformers")
  torch = pytest.importorskip("torch")
  adapters = LoraConfig(("^decoder/layers/attn/q/kernel",), 2, 4.0)
  cfg = policy_config()
  policy = dataclasses.replace(make_policy(cfg, jnp.float32), lora=adapters)
  noise = jax.tree.map(
    lambda x: 0.5 * jax.random.normal(jax.random.key(x.shape[-1]), x.shape),
    lora.split(policy.init(jax.random.key(0)))[1],
  )
  params = param_tree.merge(fixtures.hashed_params(cfg, 1), noise)
  save_run(tmp_path / "run", tmp_path / "gone", params, lora=dataclasses.asdict(adapters))
  export.export(tmp_path / "run", tmp_path / "hf", None)
  ids = np.arange(3, 40)
  rows = (ids[None].astype(np.int32), np.repeat(np.arange(37)[None, :, None], 3, 2))
  features_MYD = jnp.zeros((1, 1, cfg.decoder.width))
  tokens = TokenArrays(*rows, np.ones((1, 37), bool), np.full((1, 37), -1))
  inputs = (tokens, features_MYD)
  ours = np.asarray(policy.logits(params, policy.hidden(params, *inputs)))[0]
  model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").eval()
  with torch.no_grad():
    theirs = model(input_ids=torch.asarray(ids[None])).logits[0].float().numpy()
  assert np.abs(ours - theirs).max() < 1e-4 * theirs.std()
  base = policy.without_adapters
  hidden = base.hidden(lora.split(params)[0], *inputs)
  without = np.asarray(base.logits(params, hidden))[0]
  assert np.abs(without - theirs).max() > 1e-2 * theirs.std(), "adapters matter"
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
  assert tokenizer("How far is the chair?").input_ids == TOKENIZER.encode("How far is the chair?")
  assert model.generation_config.eos_token_id == TOKENIZER.id(IM_END)


def test_files_of_a_second_export_replace_those_of_the_first(tmp_path):
  write_files(TOKENIZER, CHATML, fixtures.PREPROCESS, tmp_path, None)
  (tmp_path / "generation_config.json").write_text("{}")
  write_files(TOKENIZER, CHATML, fixtures.PREPROCESS, tmp_path, None)
  written = json.loads((tmp_path / "generation_config.json").read_text())
  assert written["eos_token_id"] == TOKENIZER.id(IM_END)
