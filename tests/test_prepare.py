"""Automatic values of a config: from the policy, from the data, from the memory of devices."""

import json

import jax
import pytest

from configs import qwen_vl, tiny, vsi_bench
from spatial_jax import dry_run
from spatial_jax import prepare as prepare_lib
from spatial_jax.automatic import AUTOMATIC, changes, filled, get, has, is_automatic
from spatial_jax.config import ConfigError, build
from spatial_jax.data.pipeline import PipelineConfig
from spatial_jax.errors import UserError
from spatial_jax.hf.model_zoo import NAMES, released, released_processor
from spatial_jax.machines import MACHINES, devices_of, this_machine
from spatial_jax.prepare import prepare
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.encode import PromptEncoder
from spatial_jax.stages import auto_values
from spatial_jax.stages.auto_values import ASSUMED, PromptSize
from spatial_jax.train_config import TrainConfig
from tests import evaluate_fixtures as fixtures
from tests.row_fixtures import rows, save_images, save_rows


def settings_of(name: str, **changed: object) -> dict:
  """configs/qwen_vl.py as JSON values, with other values."""
  cfg = qwen_vl.get_config(name)
  with cfg.unlocked():
    for key, value in changed.items():
      cfg.update_from_flattened_dict({key: value})
  return json.loads(cfg.to_json_best_effort())


def test_values_that_are_given_are_kept():
  given = {"rollout": {"slots": None, "prompts": 8}, "mesh": {"tensor": None}}
  after = filled(given, {"rollout.slots": 4, "rollout.prompts": 2, "learn.micro.rows": 1})
  assert after == {"rollout": {"slots": 4, "prompts": 8}, "mesh": {"tensor": None}}
  assert given["rollout"]["slots"] is None, "the given settings stay as they are"
  assert is_automatic(after)
  assert changes(given, after) == ["  mesh: tensor None", "  rollout: slots 4"]


def test_the_placeholders_build_every_config():
  """With them a config is checked before anything is read."""
  build(TrainConfig, filled(settings_of("7b"), AUTOMATIC))
  benchmark = json.loads(vsi_bench.get_config("7b").to_json_best_effort())
  assert build(TrainConfig, filled(benchmark, AUTOMATIC)).video.max_frames == 32
  with pytest.raises(ConfigError, match=r"config\.rollout\.group is 1"):
    build(TrainConfig, filled(settings_of("7b", **{"rollout.group": 1}), AUTOMATIC))


FAST = {("v5e-8", "7b"), ("v6e-8", "2b")}
CASES = [
  pytest.param(machine, name, marks=() if (machine, name) in FAST else pytest.mark.slow)
  for machine in MACHINES
  for name in ("2b", "3b", "7b", "8b", "32b")
]


@pytest.mark.parametrize(("machine", "name"), CASES)
def test_a_dry_run_needs_no_files_and_fills_in_everything(machine, name, capsys):
  ready = prepare(settings_of(name), None, devices_of(machine), needs_weights=False)
  assert not is_automatic(ready.settings)
  assert all(get(ready.settings, key) is not None for key in AUTOMATIC if has(ready.settings, key))
  assert ready.cfg.rollout.prompt_buckets[-1] >= ASSUMED.tokens
  tensor = ready.cfg.mesh.tensor
  assert released(qwen_vl.RELEASED[name]).decoder.kv_heads % tensor == 0
  assert "automatic values of the config:" in capsys.readouterr().out
  fits = name != "32b" or machine in ("v6e-8", "v5p-8")
  assert (ready.plan.total <= ready.plan.device) == fits
  [stage] = dry_run.describe(ready)
  description = "\n".join([*dry_run.head(ready), *stage.lines])
  for word in ("stages: grpo", "B parameters", "no data", "memory per device", "programs:"):
    assert word in description


def test_a_dry_run_names_the_data_of_each_stage():
  def lines(**changes):
    settings = settings_of("3b", stages=("sft", "reject", "dpo"), **changes)
    ready = prepare(settings, None, devices_of("v6e-8"), needs_weights=False)
    return [stage.lines[0] for stage in dry_run.describe(ready)]

  sft, reject, dpo = lines(**{"sft.path": "a.jsonl", "dpo.pairs": "samples"})
  assert "demonstrations of a.jsonl" in sft
  assert "after sampling 40,000 tasks" in reject
  assert "pairs, after sampling 1,000 tasks" in dpo
  sft, reject, dpo = lines(**{"reject.path": "kept.jsonl", "dpo.path": "b.jsonl"})
  assert "demonstrations;" in sft
  assert "demonstrations of kept.jsonl" in reject
  assert "pairs of b.jsonl" in dpo


def test_drawing_needs_longer_responses_and_room_for_drawings():
  plain, drawing = (
    prepare(settings_of("3b", text=form), None, devices_of("v6e-8"), needs_weights=False).cfg
    for form in ("think", "vilasr")
  )
  assert plain.rollout.stop.max_turns == 1
  assert drawing.rollout.stop.max_response_tokens == 13312
  assert drawing.rollout.stop.max_image_tokens > plain.rollout.stop.max_image_tokens
  assert len(drawing.rollout.observation_buckets) > 1


def test_more_memory_takes_no_fewer_prompts():
  found = [
    prepare(settings_of("7b"), None, devices_of(name), needs_weights=False).cfg.rollout.prompts
    for name in ("v5e-8", "v6e-8")
  ]
  assert found == sorted(found)


@pytest.mark.parametrize("size", [16, 100, 1000, 5000])
def test_every_prompt_that_was_measured_fits_the_buckets(size):
  sizes = [PromptSize(n, ((1, 8, 8),) * (n // 40 + 1)) for n in (size // 3, size // 2, size)]
  shape = released("Qwen2.5-VL-3B")
  settings = settings_of("3b", **{"rollout.prompts": 4})
  values = auto_values.data_values(settings, sizes, False, None, shape)
  lengths = values["rollout.prompt_buckets"]
  assert list(lengths) == sorted(set(lengths))
  assert lengths[-1] >= size
  assert lengths[-1] < size + 128
  assert values["learn.micro.lengths"][-1] > values["rollout.stop.max_response_tokens"]


@pytest.mark.parametrize(
  ("changes", "whole"),
  [
    ({}, False),
    ({"learn.reward.weights.attention": 0.1}, True),
    ({"learn.loss.kl.weight": 0.1, "learn.loss.kl.place": "reward"}, True),
    ({"learn.loss.kl.weight": 0.1}, False),
  ],
)
def test_the_images_of_the_update_are_those_of_one_minibatch(changes, whole):
  """Unless a program reads the whole step."""
  sizes = [PromptSize(1000, ((1, 32, 32),) * 3)] * 4

  def vision(**more):
    settings = settings_of("3b", **{"rollout.prompts": 32}, **changes, **more)
    shape = released("Qwen2.5-VL-3B")
    return auto_values.data_values(settings, sizes, False, None, shape)["learn.vision"]

  one, parts = vision(), vision(**{"learn.minibatches": 4})
  smaller = [parts[name][-1] < one[name][-1] for name in ("windows", "frames")]
  assert smaller == [not whole] * 2


def test_prompts_to_try_divide_over_the_devices():
  assert auto_values.prompts_to_try(1, 1) == [32, 16, 8, 4, 2, 1]
  assert auto_values.prompts_to_try(12, 1) == [24, 12]
  assert auto_values.prompts_to_try(64, 1) == [64]
  assert auto_values.prompts_to_try(1, 16) == [2, 1]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_sharded_until_they_fit(name):
  shape = released(name)
  one = auto_values.tensor_devices(shape, 8, 10**13)
  some = auto_values.tensor_devices(shape, 8, 16 * 10**9)
  assert one == 1
  assert shape.decoder.kv_heads % some == 0
  image, video = released_processor(shape)
  assert image.patch_size == video.patch_size == shape.vision.patch_size


def test_a_config_of_the_embedded_policy_is_refused_for_a_large_one():
  cfg = tiny.get_config()
  cfg.init = "Qwen2.5-VL-7B"
  given = json.loads(cfg.to_json_best_effort())
  with pytest.raises(ConfigError, match=r"at most 20 M .*use configs/qwen_vl\.py") as caught:
    prepare(given, None, this_machine(), needs_weights=False)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("name", "message"),
  [("7b", "is Qwen2.5-VL-7B, the name of a released model; download it"), ("", "is empty; set it")],
)
def test_training_needs_a_folder(name, message):
  with pytest.raises(ConfigError, match=message):
    prepare(settings_of(name), None, this_machine(), needs_weights=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return fixtures.save_policy(tmp_path_factory.mktemp("policy"), 0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("data")
  return save_rows(path / "rows.jsonl", rows(save_images(path, 4), 40))


def prepared(folder, data, workdir=None, **changed):
  values = {
    "source.path": str(data),
    "pipeline.workers": 0,
    "text": "vanilla",
    "lora.paths": (),
    "learn.optimizer.frozen": (),
  }
  return prepare(
    settings_of(str(folder), **values | changed), workdir, this_machine(), needs_weights=True
  )


def test_real_prompts_of_a_data_file_fit_the_measured_shapes(folder, data):
  ready = prepared(folder, data)
  cfg = build(RolloutConfig, ready.settings["rollout"])
  conversation = prepare_lib.conversation_of(ready.settings, ready.shape, ready.files, ready.form)
  encode = PromptEncoder(conversation, cfg)
  tasks = [*ready.source.examples(0, 100), *ready.source.held_out(100)]
  assert len(tasks) == 40
  assert {len(encode(task).images) for task in tasks} == {1, 2}
  assert ready.settings["preprocess"]["patch_size"] == ready.shape.vision.patch_size
  assert jax.live_arrays() == [] or ready.plan.device > 0


def test_a_run_that_resumes_keeps_its_values(folder, data, tmp_path):
  first = prepared(folder, data)
  recorded = first.settings | {"rollout": first.settings["rollout"] | {"slots": 7}}
  (tmp_path / "config.json").write_text(json.dumps(recorded))
  assert prepared(folder, data, tmp_path).cfg.rollout.slots == 7
  given = prepared(folder, data, tmp_path, **{"rollout.slots": 3})
  assert given.cfg.rollout.slots == 3, "a value that the config gives is kept"


def test_sizes_are_measured_by_worker_processes_alike(folder, data):
  ready = prepared(folder, data)
  conversation = prepare_lib.conversation_of(ready.settings, ready.shape, ready.files, ready.form)
  sizes = prepare_lib.measured_sizes(conversation, ready.source, 0, PipelineConfig(0, 1))
  assert sizes == prepare_lib.measured_sizes(conversation, ready.source, 0, PipelineConfig(0, 2))
  assert all(size.tokens > size.visual_tokens for size in sizes)


@pytest.fixture
def prepared_with(monkeypatch):
  """The settings that `evaluation_settings` passes to `prepare`, which then raises UserError."""
  asked = []

  def record(settings, *_, **__):
    asked.append(settings)
    raise UserError("prepared")

  monkeypatch.setattr(prepare_lib, "prepare", record)
  return asked


@pytest.mark.parametrize(("devices", "kept"), [(8, True), (2, False)])
def test_an_evaluation_on_other_devices_chooses_its_own_mesh(
  monkeypatch, prepared_with, devices, kept
):
  """The tests have eight devices."""
  run = filled(settings_of("2b"), AUTOMATIC | {"mesh.data": 1, "mesh.fsdp": devices})
  monkeypatch.setattr(prepare_lib, "recorded_settings", lambda _: run)
  if kept:
    assert prepare_lib.evaluation_settings(settings_of("2b"), "run")["mesh"] == run["mesh"]
  else:
    with pytest.raises(UserError, match="prepared"):
      prepare_lib.evaluation_settings(settings_of("2b"), "run")
    assert prepared_with[0]["mesh"]["fsdp"] is prepared_with[0]["rollout"]["slots"] is None
    assert prepared_with[0]["rollout"]["prompt_buckets"] == run["rollout"]["prompt_buckets"]


def test_a_size_that_does_not_exist_names_those_that_do():
  with pytest.raises(ValueError, match="9b is no released size; use 2b, 3b, 7b, 8b, 32b, 72b"):
    qwen_vl.get_config("9b")


@pytest.mark.parametrize(("name", "rate"), [("2b", 1e-5), ("3b", 1e-5), ("7b", 5e-6)])
def test_the_rate_of_adapters_follows_the_size_of_the_policy(name, rate):
  ready = prepare(settings_of(name), None, devices_of("v5e-8"), needs_weights=False)
  assert ready.cfg.learn.optimizer.learning_rate == rate
  full = prepare(settings_of(f"{name},full"), None, devices_of("v6e-8"), needs_weights=False)
  assert full.cfg.learn.optimizer.learning_rate == 1e-6


def test_an_evaluation_on_other_data_measures_its_lengths(monkeypatch, prepared_with):
  run = filled(settings_of("2b"), AUTOMATIC | {"mesh.fsdp": 8, "mesh.data": 1})
  monkeypatch.setattr(prepare_lib, "recorded_settings", lambda _: run)
  with pytest.raises(UserError, match="prepared"):
    prepare_lib.evaluation_settings(settings_of("2b", **{"video.max_frames": 32}), "run")
  assert prepared_with[0]["rollout"]["prompt_buckets"] is None
  assert prepared_with[0]["preprocess"] == run["preprocess"]
