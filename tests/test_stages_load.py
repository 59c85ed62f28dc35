"""A path that is no usable policy is refused in one line, before an array is on a device."""

import dataclasses
import json
import pathlib
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import tiny_defaults, tiny_pretrain
from experiments.tiny import pretrain
from spatial_jax import chat, evaluate_main, run_stage, sharding, train
from spatial_jax.config import ConfigError, build
from spatial_jax.data.chat_template import read_chat_template
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.prompt_form import form_of, read_form
from spatial_jax.data.tokenizer import END_OF_TEXT, IM_END
from spatial_jax.errors import DataError, UserError
from spatial_jax.hf import processor, weights
from spatial_jax.hf.generation import read_generation
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.stages.context import RunConfig, open_context, settings_of
from spatial_jax.stages.load import (
  check_normalisation,
  load_policy,
  own_preprocess,
  read_policy,
  read_shape,
)
from spatial_jax.tools import verify
from spatial_jax.types import ImageRef
from tests import evaluate_fixtures as fixtures
from tests import rollout_fixtures
from tests.row_fixtures import rows, save_images, save_rows
from tests.test_chat_template import QWEN2_VL
from tests.test_data_photos import entry, photo

PREPROCESS = build(PreprocessConfig, tiny_defaults.preprocess())


@pytest.fixture
def folder(tmp_path):
  """A Hugging Face folder with two shards, tokenizer and processor."""
  path = fixtures.save_policy(tmp_path / "policy", 0)
  cfg = fixtures.policy_config()
  weights.save(fixtures.random_params(0), cfg, path, file_bytes=40_000)
  (path / processor.IMAGE_FILE).write_text(json.dumps(processor.to_hf(pixels(14))))
  return path


@pytest.fixture
def single(folder):
  """The same folder with one file of weights."""
  weights.save(fixtures.random_params(0), fixtures.policy_config(), folder)
  for shard in folder.glob("model-*"):
    shard.unlink()
  return folder


def pixels(
  patch_size: int = 14, mean: tuple[float, float, float] = PREPROCESS.mean
) -> PreprocessConfig:
  return PreprocessConfig(patch_size, 2, 2, 784, 3136, mean, PREPROCESS.std)


def mesh():
  return sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])


def refuse_devices(monkeypatch) -> None:
  """Any array put on a device fails the test."""

  def refuse(*_: object, **__: object):
    raise AssertionError("an array was put on a device")

  monkeypatch.setattr(jax, "device_put", refuse)
  monkeypatch.setattr(jax, "make_array_from_single_device_arrays", refuse)


def refused(path, monkeypatch) -> str:
  """The line with which a path is refused."""
  refuse_devices(monkeypatch)
  with pytest.raises(UserError) as caught:
    load_policy(path, mesh())
  assert "\n" not in str(caught.value)
  assert len(str(caught.value)) < 1000
  return str(caught.value)


def change_json(path: pathlib.Path, **changes: object) -> None:
  record = json.loads(path.read_text()) if path.exists() else {}
  path.write_text(json.dumps(record | changes))


def change_tensors(path: pathlib.Path, change) -> None:
  tensors = load_file(path / weights.WEIGHTS)
  save_file(change(tensors), path / weights.WEIGHTS, metadata={"format": "pt"})


def test_the_folder_itself_loads(folder):
  assert len(list(folder.glob("*.safetensors"))) > 1
  assert load_policy(folder, mesh()).policy.cfg == read_shape(folder)


# --- a folder with one mistake -----------------------------------------------------------------


def other_family(path):
  (path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))


def cut_shard(path):
  file = sorted(path.glob("*.safetensors"))[1]
  file.write_bytes(file.read_bytes()[:-100])


def empty_shard(path):
  sorted(path.glob("*.safetensors"))[1].write_bytes(b"")


def broken_header(path):
  file = sorted(path.glob("*.safetensors"))[1]
  file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def lfs_pointer(path):
  text = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"
  sorted(path.glob("*.safetensors"))[1].write_bytes(text)


def shard_is_a_folder(path):
  file = sorted(path.glob("*.safetensors"))[1]
  file.unlink()
  file.mkdir()


def missing_shard(path):
  sorted(path.glob("*.safetensors"))[1].unlink()


def broken_index(path):
  (path / weights.INDEX).write_text('{"weight_map": [1]}')


def missing_index(path):
  (path / weights.INDEX).unlink()


def odd_patches(path):
  (path / processor.IMAGE_FILE).write_text(json.dumps(processor.to_hf(pixels(13))))


def odd_nested_patches(path):
  record = {"image_processor": processor.to_hf(pixels(13))}
  (path / processor.NESTED_FILE).write_text(json.dumps(record))


def no_tokenizer(path):
  (path / "tokenizer.json").unlink()


def no_config(path):
  (path / "config.json").unlink()


def config_alone(path):
  for file in path.iterdir():
    if file.name != "config.json":
      file.unlink()


def smaller_mlp_in_the_config(path):
  config = json.loads((path / "config.json").read_text())
  config["vision_config"]["intermediate_size"] = 20
  (path / "config.json").write_text(json.dumps(config))


def quantised(method):
  return lambda path: change_json(
    path / "config.json", quantization_config={"quant_method": method}
  )


def adapter_beside_weights(path):
  change_json(path / "adapter_config.json", base_model_name_or_path="Qwen/Qwen2.5-VL-3B-Instruct")


def adapter_alone(path):
  adapter_beside_weights(path)
  for file in path.glob("model*"):
    file.unlink()
  (path / "config.json").unlink()


def other_ids(path):
  change_json(path / "config.json", image_token_id=3)


def more_tokens(path):
  inner = fixtures.tokenizer().inner
  inner.add_tokens([f"<obj{number}>" for number in range(20)])
  inner.save(str(path / "tokenizer.json"))


def byte_tokenizer(path):
  """Without any special token."""
  record = json.loads((path / "tokenizer.json").read_text())
  (path / "tokenizer.json").write_text(json.dumps(record | {"added_tokens": []}))


MISTAKES = {
  other_family: r"config\.json: .*model_type is 'llama'.*give the folder of a Qwen",
  cut_shard: r"model-00002-of-\d+\.safetensors is damaged or incomplete .*download it again",
  empty_shard: r"model-00002-of-\d+\.safetensors is damaged or incomplete",
  broken_header: r"model-00002-of-\d+\.safetensors is damaged or incomplete",
  lfs_pointer: r"model-00002-of-\d+\.safetensors is a Git LFS pointer.*git lfs pull",
  shard_is_a_folder: r"model-00002-of-\d+\.safetensors is damaged or incomplete",
  missing_shard: r"has no model-00002-of-\d+\.safetensors: 1 of the \d+ files",
  broken_index: r"index\.json has no readable weight_map",
  missing_index: r"holds shards such as model-00001-of.* without model\.safetensors\.index\.json",
  odd_patches: r"/preprocessor_config\.json: patch_size is 13, but this policy has 14",
  odd_nested_patches: r"/processor_config\.json: patch_size is 13, but this policy has 14",
  no_tokenizer: r"tokenizer\.json does not exist; copy",
  no_config: r"policy has no config\.json",
  config_alone: r"policy has no model\.safetensors; copy the weights",
  smaller_mlp_in_the_config: r"blocks\.0\.mlp\.gate_proj\.weight: expected \[20, 16\], file has",
  quantised("awq"): r"the weights are quantised \(awq\), .*give the model's folder without",
  quantised("gptq"): r"the weights are quantised \(gptq\)",
  quantised("bitsandbytes"): r"the weights are quantised \(bitsandbytes\)",
  quantised("fp8"): r"the weights are quantised \(fp8\)",
  adapter_beside_weights: r"holds a PEFT adapter; merge it into its base model Qwen/Qwen2",
  adapter_alone: r"holds a PEFT adapter; merge it into its base model Qwen/Qwen2",
  other_ids: r"tokenizer\.json: <\|image_pad\|> has id \d+, but the config of the policy has 3",
  more_tokens: r"tokenizer\.json: token '<obj19>' has id 297, but the embedding has 288 rows",
  byte_tokenizer: r"tokenizer\.json has no special token <\|im_start\|>",
}


@pytest.mark.parametrize(("spoil", "message"), MISTAKES.items(), ids=range(len(MISTAKES)))
def test_each_mistake_in_a_folder_is_refused_by_its_name(folder, monkeypatch, spoil, message):
  spoil(folder)
  line = refused(folder, monkeypatch)
  assert line.startswith(str(folder))
  assert re.search(message, line), line


def rename_weights(name):
  return lambda path: (path / weights.WEIGHTS).rename(path / name)


def int8(dtype):
  """The first kernel as bitsandbytes or FP8 training stores it, without a word in the config."""

  def spoil(path):
    name = "model.layers.0.mlp.up_proj.weight"
    change_tensors(path, lambda tensors: tensors | {name: np.zeros(tensors[name].shape, dtype)})

  return spoil


def gptq(path):
  name = "model.layers.0.mlp.up_proj"

  def change(tensors):
    del tensors[f"{name}.weight"]
    return tensors | {
      f"{name}.qweight": np.zeros((2, 32), np.int32),
      f"{name}.scales": np.zeros((1, 32), np.float16),
    }

  change_tensors(path, change)


@pytest.mark.parametrize(
  ("spoil", "message"),
  [
    (rename_weights("pytorch_model.bin"), r"holds PyTorch weights \(pytorch_model\.bin\)"),
    (rename_weights("consolidated.00.pth"), r"holds PyTorch weights \(consolidated\.00\.pth\)"),
    (rename_weights("model-Q4_K_M.gguf"), "quantised weights in GGUF"),
    (
      rename_weights("model.fp16.safetensors"),
      r"holds model\.fp16\.safetensors, but no model\.saf",
    ),
    (rename_weights("adapter_model.safetensors"), "holds a PEFT adapter; merge it into its base"),
    (int8(np.int8), r"quantised \(model\.layers\.0\.mlp\.up_proj\.weight is stored as I8\)"),
    (int8(np.uint8), "quantised .* is stored as U8"),
    (int8(ml_dtypes.float8_e4m3fn), "quantised .* is stored as F8_E4M3"),
    (gptq, r"quantised \(model\.layers\.0\.mlp\.up_proj\.(qweight|scales) is stored as"),
  ],
)
def test_weights_in_another_format_are_refused_by_its_name(single, monkeypatch, spoil, message):
  spoil(single)
  line = refused(single, monkeypatch)
  assert line.startswith(str(single))
  assert re.search(message, line), line


# --- a path that is no folder of weights --------------------------------------------------------


def test_each_other_path_is_refused_by_its_name(single, tmp_path, monkeypatch):
  cache = tmp_path / "models--Qwen--Qwen2.5-VL-3B-Instruct" / "snapshots" / "66285546"
  shutil.copytree(single, cache)
  trainer = tmp_path / "sft"
  shutil.copytree(single, trainer / "checkpoint-500")
  (tmp_path / "empty").mkdir()
  monkeypatch.chdir(tmp_path)
  for path, message in (
    ("Qwen/Qwen2.5-VL-3B-Instruct", "hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir"),
    (single / weights.WEIGHTS, "is a file; give the folder that contains it"),
    (cache.parents[1], f"but its folder {cache} has; give that folder"),
    (trainer, f"but its folder {trainer / 'checkpoint-500'} has; give that folder"),
    (tmp_path / "empty", "has no complete checkpoint; give"),
    (tmp_path / "gone", "does not exist; give"),
  ):
    line = refused(path, monkeypatch)
    assert str(path) in line
    assert message in line, line


# --- a config that does not fit the policy ------------------------------------------------------


def run_config(folder, **changes):
  config = tiny_defaults.get_config()
  config.init = str(folder)
  config.evaluation.progress_tasks = 2
  config.update_from_flattened_dict(changes)
  return config


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"preprocess.patch_size": 13},
      r"config\.preprocess: patch_size is 13, but this policy has 14",
    ),
    (
      {"preprocess.mean": (0.5, 0.5, 0.5)},
      r"config\.preprocess\.mean is \(0\.5, 0\.5, 0\.5\), but",
    ),
    ({"preprocess.std": (0.5, 0.5, 0.5)}, r"config\.preprocess\.std is \(0\.5, 0\.5, 0\.5\), but"),
    ({"lora.paths": ("attn/z/",)}, r"config\.lora\.paths: 'attn/z/' matches no kernel path"),
  ],
)
def test_a_run_that_does_not_fit_its_policy_is_refused_before_it_is_loaded(
  folder, tmp_path, monkeypatch, changes, message
):
  refuse_devices(monkeypatch)
  with pytest.raises(ConfigError, match=message):
    train.run(run_config(folder, **changes), tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("file", [processor.IMAGE_FILE, processor.NESTED_FILE])
def test_an_evaluation_with_other_normalisation_is_refused(file, folder, tmp_path, monkeypatch):
  record = processor.to_hf(pixels(mean=(0.5, 0.5, 0.5)))
  nested = {"image_processor": record} if file == processor.NESTED_FILE else record
  (folder / file).write_text(json.dumps(nested))
  refuse_devices(monkeypatch)
  with pytest.raises(ConfigError, match=r"config\.preprocess\.mean is \(0\.48.*with \(0\.5, 0\.5"):
    evaluate_main.evaluate(fixtures.SETTINGS, str(folder), tmp_path / "out")


def test_a_folder_without_a_processor_has_no_normalisation_to_compare(folder):
  (folder / processor.IMAGE_FILE).unlink()
  check_normalisation(pixels(mean=(0.5, 0.5, 0.5)), read_policy(folder))


def test_the_processor_file_of_transformers_5_is_read_with_the_bounds_of_the_config(folder):
  """So does chat, which has no normalisation of its own."""
  (folder / processor.IMAGE_FILE).unlink()
  record = {"image_processor": processor.to_hf(pixels(mean=(0.5, 0.5, 0.5)))}
  (folder / processor.NESTED_FILE).write_text(json.dumps(record))
  bounds = dataclasses.replace(pixels(), min_pixels=1, max_pixels=2)
  expected = dataclasses.replace(bounds, mean=(0.5, 0.5, 0.5))
  assert own_preprocess(read_policy(folder), bounds) == expected


def test_an_image_that_cannot_be_used_names_the_task():
  task = dataclasses.replace(
    rollout_fixtures.task("room/7"), media=(ImageRef(np.zeros((1, 300, 3), np.uint8)),)
  )
  with pytest.raises(DataError, match=r"task room/7: image of 1 x 300 pixels has an aspect ratio"):
    rollout_fixtures.conversation().prompt(task)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    ({"source.kind": "rooms"}, r"config\.source\.path is empty"),
    ({"source.kind": "photos", "source.path": "PHOTOS"}, r"config\.source\.kind is photos"),
    ({"learn.optimizer.frozen": ("nothing",)}, r"optimizer\.frozen: 'nothing' matches no"),
    ({"learn.optimizer.frozen": ("",)}, r"optimizer\.frozen .* no parameter to train"),
    ({"rollout.stop_tokens": ("xx",)}, r"config\.rollout\.stop_tokens: xx cannot end a turn"),
    ({"text": "vilaser"}, r"config\.text is 'vilaser', which is no form; .* vilasr, vsi_bench"),
    ({"rollout.prompts": 12}, r"config\.rollout\.prompts is 12 and must be a multiple of .* 8"),
  ],
)
def test_a_start_that_is_refused_leaves_no_work_directory(
  folder, tmp_path, monkeypatch, wrong, message
):
  objects = entry("car", -4, 10, (2, 1.5, 4)), entry("car", 4, 20, (2, 1.5, 4))
  photos = tmp_path / "photos"
  photos.mkdir()
  photo(photos, *objects)
  wrong = {key: str(photos) if value == "PHOTOS" else value for key, value in wrong.items()}
  refuse_devices(monkeypatch)
  with pytest.raises(UserError, match=message) as caught:
    train.run(run_config(folder, **wrong), tmp_path / "run")
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_number_of_slots_that_a_refusal_names_is_accepted(folder, tmp_path, monkeypatch):
  """In the same work directory, which the refused start did not bind."""
  with monkeypatch.context() as patch:
    refuse_devices(patch)
    with pytest.raises(ConfigError, match=r"lower config\.rollout\.slots to \d+$") as caught:
      train.run(run_config(folder, **{"rollout.slots": 1 << 20}), tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()

  def stop(*_: object):
    raise UserError("the loop begins")

  monkeypatch.setattr(run_stage.loop, "run", stop)
  slots = int(str(caught.value).rsplit(" ", 1)[1])
  with pytest.raises(UserError, match="the loop begins"):
    train.run(run_config(folder, **{"rollout.slots": slots}), tmp_path / "run")
  written = json.loads((tmp_path / "run" / "config.json").read_text())
  assert written["rollout"]["slots"] == slots


def test_a_run_records_form_template_and_generation_settings(folder, tmp_path, monkeypatch):
  """And a changed form is refused when it resumes; the same form in another file is not."""

  def stop(*_: object):
    raise UserError("the loop begins")

  monkeypatch.setattr(run_stage.loop, "run", stop)
  (folder / "chat_template.jinja").write_text(QWEN2_VL)
  (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "top_k": 5}')
  form, moved = tmp_path / "form.toml", tmp_path / "moved.toml"
  text = pathlib.Path(fixtures.SETTINGS["text"]).read_text()
  form.write_text(text)
  moved.write_text(text)
  for name in (form, moved):
    with pytest.raises(UserError, match="the loop begins"):
      train.run(run_config(folder, text=str(name)), tmp_path / "run")
  written = json.loads((tmp_path / "run" / "config.json").read_text())
  assert form_of(written["form"]) == read_form(str(form))
  assert read_chat_template(tmp_path / "run").source == QWEN2_VL
  assert read_generation(tmp_path / "run") == read_generation(folder)
  moved.write_text(text.replace('more = ""', 'more = "Go on."'))
  with pytest.raises(ConfigError, match=r'config\.form\.more is "Go on\.", workdir has ""'):
    train.run(run_config(folder, text=str(moved)), tmp_path / "run")


def test_a_run_whose_data_changed_is_refused(folder, tmp_path, monkeypatch):
  def stop(*_: object):
    raise UserError("the loop begins")

  monkeypatch.setattr(run_stage.loop, "run", stop)
  made = rows(save_images(tmp_path, 3), 40)
  path = save_rows(tmp_path / "rows.jsonl", made)
  cfg = run_config(folder, **{"source.kind": "files", "source.path": str(path)})
  with pytest.raises(UserError, match="the loop begins"):
    train.run(cfg, tmp_path / "run")
  save_rows(path, made[1:])
  with pytest.raises(ConfigError, match=r'config\.data is "rows\.jsonl: 39 rows') as caught:
    train.run(cfg, tmp_path / "run")
  assert 'workdir has "rows.jsonl: 40 rows' in str(caught.value)


def test_files_without_a_held_out_task_are_refused(folder, tmp_path):
  path = save_rows(tmp_path / "rows.jsonl", rows(save_images(tmp_path, 3), 40))
  source = {"source.kind": "files", "source.path": str(path), "source.files.held_out_fraction": 0.0}
  with pytest.raises(ConfigError, match="has no held-out task to evaluate on; set"):
    train.run(run_config(folder, **source), tmp_path / "run")


def test_stop_tokens_of_the_folder_end_a_turn_if_the_config_names_none(folder):
  def stops(*tokens):
    cfg = fixtures.run_config()
    rollout = dataclasses.replace(cfg.rollout, stop_tokens=tokens)
    files = read_policy(folder)
    policy = make_policy(files.cfg, np.dtype(np.float32), mesh())
    with open_context(policy, files, read_form(cfg.text), cfg, None) as context:
      return context.engine(rollout, 0, "config.rollout.slots").stop_ids

  tokenizer = fixtures.tokenizer()
  end, text = tokenizer.id(IM_END), tokenizer.id(END_OF_TEXT)
  assert stops() == stops(IM_END) == (end,)
  change_json(folder / "generation_config.json", eos_token_id=[end, text])
  assert stops() == (end, text)
  assert stops(IM_END) == (end,)
  change_json(folder / "generation_config.json", eos_token_id=text)
  assert stops() == (end, text)


def broken_template(path):
  (path / "chat_template.jinja").write_text("{{ messages[0].content }}")


def broken_generation(path):
  change_json(path / "generation_config.json", eos_token_id="x")


@pytest.mark.parametrize(
  ("break_", "message"),
  [
    (broken_template, r"chat_template\.jinja: the chat template is not that of a Qwen-VL model"),
    (broken_generation, r"generation_config\.json: eos_token_id is 'x'"),
  ],
)
def test_files_of_the_conversation_are_checked_before_weights_are_read(
  folder, monkeypatch, break_, message
):
  break_(folder)
  assert re.search(message, refused(folder, monkeypatch))


def test_a_work_directory_in_use_is_refused_before_anything_is_loaded(
  folder, tmp_path, monkeypatch
):
  def refuse(path):
    raise UserError(f"--workdir={path} is in use by process 1")

  refuse_devices(monkeypatch)
  for module in (run_stage, evaluate_main):
    monkeypatch.setattr(module, "lock_workdir", refuse)
  with pytest.raises(UserError, match="in use by"):
    train.run(run_config(folder), tmp_path / "run")
  with pytest.raises(UserError, match="in use by"):
    evaluate_main.evaluate(fixtures.SETTINGS, str(folder), tmp_path / "run")


def test_an_evaluation_that_is_refused_binds_no_config(folder, tmp_path, monkeypatch):
  refuse_devices(monkeypatch)
  for changes, message in (
    ({"rollout": {"stop_tokens": ("xx",)}}, "xx cannot end a turn"),
    ({"evaluation": {"tasks": 1 << 20, "prompts": 1 << 20, "slots": 1 << 20}}, "evaluation.slots"),
  ):
    with pytest.raises(ConfigError, match=message):
      evaluate_main.evaluate(fixtures.with_settings(**changes), str(folder), tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_pads_that_do_not_match_are_refused_before_weights_are_read(folder, monkeypatch):
  cfg = read_shape(folder)
  ids = np.array([3, cfg.image_pad_id, cfg.image_pad_id, 4])
  patches = np.zeros((4, cfg.vision.patch_values), np.float32)
  refuse_devices(monkeypatch)
  with pytest.raises(ValueError, match="2 image pads, but 1 tokens of the grids"):
    verify.forward(folder, ids, patches, np.array([[1, 2, 2]]))


def test_every_entry_point_refuses_several_processes(folder, tmp_path, monkeypatch):
  refuse_devices(monkeypatch)
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  settings = settings_of(RunConfig, fixtures.SETTINGS)
  how = chat.ChatOptions("", 1, 1, 0.0)
  for start in (
    lambda: train.run(run_config(folder), tmp_path / "run"),
    lambda: evaluate_main.evaluate(fixtures.SETTINGS, str(folder), tmp_path / "run"),
    lambda: chat.chat(
      settings, str(folder), rollout_fixtures.task("x"), how, tmp_path / "run", "", print
    ),
    lambda: pretrain.run(tiny_pretrain.get_config(), tmp_path / "run"),
  ):
    with pytest.raises(UserError, match="several processes are not supported yet"):
      start()
  assert not (tmp_path / "run").exists()
