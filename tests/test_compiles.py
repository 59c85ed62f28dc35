"""The programs of a tiny policy compile for TPUs without a TPU."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import types
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from benchmarks import memory as tables
from configs import chat, tiny_defaults, tiny_pretrain
from spatial_jax import abstract_inputs, aot, compiled, sharding
from spatial_jax.abstract_inputs import Program
from spatial_jax.config import ConfigError, build
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.errors import UserError
from spatial_jax.hf.config import to_hf
from spatial_jax.hf.model_zoo import released
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.learn.train_batch import BatchConfig, Microbatches
from spatial_jax.machines import MACHINES
from spatial_jax.policy import lora, param_tree
from spatial_jax.policy.config import DecoderConfig, QwenVLConfig, VisionConfig
from spatial_jax.policy.lora import LoraConfig
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.rollout import memory
from spatial_jax.stages.load import read_shape
from spatial_jax.train_config import TrainConfig, plan_for, reference_bytes, training_parts
from spatial_jax.types import FeatureBatch

TINY_VISION = VisionBuckets((16,), (4,), (144,))
ROOT = pathlib.Path(__file__).parent.parent
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(
  not HAS_LIBTPU, reason="libtpu is not installed (extra tpu): nothing to compile for TPU with"
)


def tiny_policy() -> QwenVLConfig:
  cfg = tiny_defaults.policy()
  vision, decoder = build(VisionConfig, cfg.vision), build(DecoderConfig, cfg.decoder)
  return QwenVLConfig(vision, decoder, 1, 2, 3, 4, 2, "qwen2_5_vl")


def tiny_config() -> TrainConfig:
  """The default limits with one small bucket each, which compile quickly."""
  cfg = build(TrainConfig, dict(tiny_defaults.get_config()))
  learn = dataclasses.replace(
    cfg.learn, prefix_buckets=(128,), micro=Microbatches(4, (256,)), vision=TINY_VISION
  )
  rollout = dataclasses.replace(
    cfg.rollout,
    prompts=4,
    slots=4,
    prefill=(4,),
    prompt_buckets=(128,),
    observation_buckets=(64,),
    feature_buffer_tokens=256,
    vision=TINY_VISION,
  )
  return dataclasses.replace(cfg, learn=learn, rollout=rollout, lora=lora.OFF)


PROGRAMS = [
  "decode_params",
  "encode_images",
  "prefill",
  "start_rows",
  "decode",
  "decode_gathered",
  "append",
  "update",
]


@pytest.fixture(scope="module")
def compiled_step():
  mesh = aot.topology_mesh("v5e:2x2", sharding.MeshConfig(1, 2, 2))
  programs = aot.programs_to_compile(tiny_config(), tiny_policy(), mesh, mesh)
  return {program.name: aot.compile_program(program) for program in programs}


@pytest.mark.slow(always=True)
@needs_libtpu
def test_every_program_compiles_and_fits(compiled_step):
  assert list(compiled_step) == PROGRAMS
  for one in compiled_step.values():
    assert one.error is None, f"{one.name}: {one.error}"
    assert one.fits(one.program_total + one.resident)
    assert not one.fits(one.program_total + one.resident - 1)
  assert compiled_step["decode"].resident > 0, "the train state"


@pytest.mark.slow(always=True)
@needs_libtpu
@pytest.mark.parametrize("name", ["encode_images", "prefill", "update"])
def test_attention_of_whole_rows_uses_the_kernel(compiled_step, name):
  calls = [line for line in compiled_step[name].text.splitlines() if "tpu_custom_call" in line]
  assert any("splash" in line for line in calls), f"{len(calls)} kernels, none of them splash"


def programs_of(
  topology: str, shape: QwenVLConfig, cfg: TrainConfig | None = None
) -> dict[str, Program]:
  mesh = aot.topology_mesh(topology, sharding.MeshConfig(-1, 2, 2))
  host = aot.host_mesh(topology, mesh)
  found = aot.programs_to_compile(cfg or tiny_config(), shape, mesh, host)
  return {program.name: program for program in found}


@pytest.mark.slow
@needs_libtpu
def test_decoding_needs_little_memory_besides_its_cache():
  """At the head size of every published Qwen2.5-VL."""
  cfg = tiny_policy()
  decoder = dataclasses.replace(cfg.decoder, head_dim=128, rope_sections=(16, 24, 24))
  tiny = tiny_config()
  stop = dataclasses.replace(tiny.rollout.stop, max_response_tokens=2048)
  rollout = dataclasses.replace(tiny.rollout, prompt_buckets=(512,), stop=stop)
  learn = dataclasses.replace(tiny.learn, prefix_buckets=(512,), micro=Microbatches(4, (2304,)))
  tiny = dataclasses.replace(tiny, rollout=rollout, learn=learn)
  found = programs_of("v5e:2x2", dataclasses.replace(cfg, decoder=decoder), tiny)
  cache = memory.bytes_of(found["decode"].arguments[1].cache)
  assert cache > 60 << 20
  one = aot.compile_program(found["decode"])
  assert one.error is None, one.error
  assert one.temporaries <= 0.1 * cache
  gathered = aot.compile_program(found["decode_gathered"])
  assert gathered.error is None, gathered.error
  suffixes = memory.bytes_of(found["decode"].arguments[1].cache.layers)
  assert gathered.temporaries <= 0.1 * cache + 0.6 * suffixes, "no prefix is copied"


@needs_libtpu
@pytest.mark.slow
def test_estimate_of_the_update_is_near_the_compiled_scratch():
  """At sizes that fill the tiles of a TPU; XLA stores fewer activations of a layer than assumed."""
  mesh = aot.topology_mesh("v5e:2x2", sharding.MeshConfig(1, 2, 2))
  cfg, learn, rollout = tiny_policy(), tiny_config().learn, tiny_config().rollout
  sizes = {"width": 512, "heads": 8, "head_dim": 64, "rope_sections": (8, 12, 12)}
  decoder = dataclasses.replace(cfg.decoder, layers=2, mlp_width=1024, vocabulary=4096, **sizes)
  cfg, frozen = dataclasses.replace(cfg, decoder=decoder), ("^vision/",)
  policy = dataclasses.replace(make_policy(cfg, jnp.bfloat16, mesh), frozen=frozen)
  optimizer = make_optimizer(dataclasses.replace(learn.optimizer, frozen=frozen))
  batch = BatchConfig((512,), 512, rollout.vision, cfg.vision.window_blocks, 4096)
  micro = Microbatches(4, (512,))
  (program,) = (
    p
    for p in abstract_inputs.all_programs(
      policy, policy, optimizer, learn.loss, micro, rollout, batch, 1.0
    )
    if p.name == "update"
  )
  _, trained = param_tree.partition(program.arguments[0].params, frozen)
  gradients = memory.bytes_of(trained)
  shapes = compiled.update_shapes(policy, micro, batch, rollout.prompts)
  estimate = gradients + memory.estimate_update_scratch(cfg, shapes, gradients)
  measured = aot.compile_program(program).temporaries
  assert measured / 2 < estimate < measured * 3, f"{estimate:,} estimated, {measured:,} compiled"


LOW = {"learn.optimizer.mu_dtype": "bfloat16", "learn.optimizer.gradient_dtype": "bfloat16"}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
  ("model", "training", "settings"),
  [("Qwen2-VL-2B", "LoRA", {}), ("Qwen2.5-VL-3B", "decoder", LOW)],
)
def test_rows_of_the_memory_document_are_near_the_compiled_update(
  model, training, settings, monkeypatch
):
  """On the eight chips of one host."""
  shape, machine = released(model), MACHINES["v5e-8"]
  config = tables.config_of(shape, tables.TRAINING[training], machine, tables.TABLES["short"])
  config.update_from_flattened_dict(settings)
  cfg = build(TrainConfig, dict(config))
  for name, value in aot.LIBTPU_ENVIRONMENT.items():
    monkeypatch.setenv(name, value)
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x4", chips_per_host_bounds=(2, 4, 1)
  )
  mesh = sharding.make_mesh(cfg.mesh, topology.devices)
  (update,) = (
    program
    for program in aot.programs_to_compile(cfg, shape, mesh, mesh)
    if program.name == "update"
  )
  plan, one = plan_for(cfg, shape, machine), aot.compile_program(update)
  assert one.error is None, one.error
  assert one.arguments == pytest.approx(plan.resident - reference_of(cfg, mesh, shape), rel=0.1)
  estimate = plan.gradients + plan.update_scratch
  assert one.temporaries / 2 < estimate < one.temporaries * 2, f"{estimate:,} {one.temporaries:,}"


def reference_of(cfg: TrainConfig, mesh: jax.sharding.Mesh, shape: QwenVLConfig) -> int:
  """Bytes of the KL reference, which is no argument of the update."""
  return reference_bytes(cfg, training_parts(cfg, shape, mesh).policy)


@needs_libtpu
@pytest.mark.slow
def test_adapters_compile_with_the_attention_kernel():
  """Adapters at every kernel of the decoder; the frozen vision tower is not in the update."""
  adapters = LoraConfig(("^decoder/layers/.*/kernel$",), 8, 16.0)
  found = programs_of("v5e:2x2", tiny_policy(), dataclasses.replace(tiny_config(), lora=adapters))
  assert isinstance(found["update"].arguments[1].vision, FeatureBatch)
  for name in ("decode_params", "update"):
    one = aot.compile_program(found[name])
    assert one.error is None, f"{name}: {one.error}"
  calls = [line for line in one.text.splitlines() if "tpu_custom_call" in line]
  assert any("splash" in line for line in calls)


@needs_libtpu
def test_the_weights_of_several_hosts_are_resharded_to_each_host():
  found = programs_of("v5e:4x4", tiny_policy())
  tokens = found["update"].arguments[1].rows.tokens.token_RT
  sampled = 4 * found["decode"].arguments[1].position_R.shape[0]
  assert tokens.shape[0] == tiny_config().learn.keep_fraction * sampled, "the rows of four hosts"
  for name in ("decode_params", "decode"):
    one = aot.compile_program(found[name])
    assert one.error is None, f"{name}: {one.error}"


@needs_libtpu
def test_a_topology_that_does_not_exist_is_one_line():
  with pytest.raises(ConfigError, match="--topology=v5e:1x99 is not a TPU topology"):
    aot.topology_mesh("v5e:1x99", sharding.MeshConfig(-1, 1, 1))
  with pytest.raises(ConfigError, match="does not fit 4 devices"):
    aot.topology_mesh("v5e:2x2", sharding.MeshConfig(3, 1, 1))


def test_without_libtpu_the_error_names_the_extra(monkeypatch):
  def missing(platform, topology_name):
    raise RuntimeError("Unable to find libtpu.so")

  monkeypatch.setattr(aot.topologies, "get_topology_desc", missing)
  with pytest.raises(ConfigError, match=r"libtpu is not installed: pip install .*\[tpu\]"):
    aot.topology_mesh("v5e:2x2", sharding.MeshConfig(-1, 1, 1))


def test_the_table_names_programs_that_do_not_fit():
  good = aot.CompiledProgram("decode", 1.0, 1 << 30, 0, 2 << 30, 1 << 30, "", None)
  bad = dataclasses.replace(good, name="update", error="RESOURCE_EXHAUSTED: 20 GiB")
  lines = aot.table([good, bad], 4 << 30).splitlines()
  assert lines[1].endswith("3.000  fits")
  assert lines[2].endswith("RESOURCE_EXHAUSTED: 20 GiB")
  assert aot.table([good], 2 << 30).splitlines()[1].endswith("DOES NOT FIT")


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (chat, r"^config\.learn\.micro\.lengths ends at \d+ and must be at least "),
    (tiny_pretrain, r"^config\.mesh is missing; .*config\.stages is missing; "),
  ],
)
def test_config_that_training_refuses_is_one_line(config, message):
  with pytest.raises(ConfigError, match=message) as error:
    aot.run(config.get_config(), "v5e:2x2")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"preprocess.patch_size": 16}, r"config\.preprocess: patch_size is 16, but"),
    ({"lora.paths": ("nothing",)}, r"config\.lora\.paths: 'nothing' matches no kernel"),
    ({"learn.optimizer.frozen": ("nothing",)}, r"optimizer\.frozen: 'nothing' matches no"),
    ({"rollout.prompts": 12}, r"config\.rollout\.prompts is 12 and must be a multiple of"),
  ],
)
def test_a_config_that_does_not_fit_the_policy_is_one_line(changes, message):
  cfg = tiny_defaults.get_config()
  cfg.update_from_flattened_dict(changes)
  mesh = sharding.make_mesh(sharding.MeshConfig(-1, 1, 1), jax.devices())
  with pytest.raises(ConfigError, match=message):
    aot.programs_to_compile(build(TrainConfig, dict(cfg)), tiny_policy(), mesh, mesh)


def test_the_reference_on_the_devices_is_resident_for_every_program():
  mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1), jax.devices()[:1])
  tiny = tiny_config()

  def resident(kl_weight: float, place: Literal["device", "host"]) -> list[int]:
    loss = dataclasses.replace(
      tiny.learn.loss, kl=dataclasses.replace(tiny.learn.loss.kl, weight=kl_weight)
    )
    learn = dataclasses.replace(tiny.learn, loss=loss, reference=place)
    cfg = dataclasses.replace(tiny, learn=learn)
    programs = aot.programs_to_compile(cfg, tiny_policy(), mesh, mesh)
    return [memory.bytes_of(*program.resident) for program in programs]

  none, host, device = resident(0.0, "device"), resident(0.1, "host"), resident(0.1, "device")
  assert host == none
  trained = [one - other for one, other in zip(device, host, strict=True)]
  assert len(set(trained)) == 1
  assert trained[0] > 0


@pytest.mark.slow(always=True)
@needs_libtpu
def test_the_updates_of_all_supervised_stages_compile(capsys):
  cfg = tiny_defaults.get_config()
  cfg.stages = ("sft", "reject", "dpo")
  for stage in (cfg.sft, cfg.reject.train, cfg.dpo):
    stage.update({"batch": 4, "micro_rows": 2})
  cfg.rollout.prompt_buckets = (128,)
  cfg.learn.prefix_buckets = (128,)
  assert aot.run(cfg, "v5e:2x2") == 0
  lines = capsys.readouterr().out.splitlines()
  table = lines[-(len(lines) - 3) // 2 :]
  assert [line[:15].strip() for line in table] == [
    "sft update", *PROGRAMS[:-1], "reject update", "dpo reference", "dpo update",
  ]  # fmt: skip
  assert all(line.endswith("fits") for line in table)


def fake_topology(monkeypatch):
  device = types.SimpleNamespace(device_kind="TPU v5 lite", process_index=0)
  mesh = types.SimpleNamespace(devices=np.array([device]), size=1, shape={"data": 1})
  monkeypatch.setattr(aot, "topology_mesh", lambda *_: mesh)
  return mesh


def test_the_policy_is_found_as_in_training(monkeypatch, tmp_path):
  """The embedded one from any directory; a remote path is refused in full."""
  monkeypatch.chdir(tmp_path)
  fake_topology(monkeypatch)
  shapes = []
  monkeypatch.setattr(aot, "programs_to_compile", lambda cfg, shape, *_: shapes.append(shape) or [])
  cfg = tiny_defaults.get_config()
  aot.run(cfg, "v5e:1x1")
  assert shapes == [read_shape(cfg.init)]
  cfg.init = "gs://bucket/policy"
  with pytest.raises(UserError, match=r"^gs://bucket/policy is remote"):
    aot.run(cfg, "v5e:1x1")


def test_progress_is_printed_for_each_program(monkeypatch, capsys, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(to_hf(tiny_policy())))
  fake_topology(monkeypatch)
  programs = [Program(name, jax.jit(abs), (), ()) for name in ("decode", "update")]
  monkeypatch.setattr(aot, "programs_to_compile", lambda *_: programs)
  done = {
    "decode": aot.CompiledProgram("decode", 1.5, 0, 0, 1 << 30, 0, "", None),
    "update": aot.CompiledProgram("update", 2.5, 0, 0, 99 << 30, 0, "", None),
  }
  monkeypatch.setattr(aot, "compile_program", lambda program: done[program.name])
  cfg = tiny_defaults.get_config()
  cfg.init = str(tmp_path)
  assert aot.run(cfg, "v5e:1x1") == 1
  lines = capsys.readouterr().out.splitlines()
  assert lines[2:4] == ["[1/2] decode ... 1.5 s", "[2/2] update ... 2.5 s"]
  assert lines[5].endswith("fits")
  assert lines[6].endswith("DOES NOT FIT")


@needs_libtpu
@pytest.mark.slow
def test_the_command_line(tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(to_hf(tiny_policy())))
  command = [sys.executable, "-m", "spatial_jax.aot", "--config=configs/tiny.py"]

  def run(*more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, check=False)

  done = run(f"--config.init={tmp_path}", "--topology=v5e:2x2")
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()[2:]
  progress, table = lines[: len(PROGRAMS)], lines[len(PROGRAMS) + 1 :]
  assert [line.split()[1] for line in progress] == PROGRAMS
  assert [line.split()[0] for line in table] == PROGRAMS
  assert all(line.endswith("  fits") for line in table)
  done = run(f"--config.init={tmp_path}/nowhere", "--topology=v5e:2x2")
  assert done.returncode == 2
  assert done.stderr.startswith("error: ")
  assert "nowhere" in done.stderr
