"""docs/memory.md says what the plan says; plans of absent devices are those of real ones."""

import dataclasses

import jax
import pytest

from benchmarks import memory as tables
from configs import tiny_defaults
from spatial_jax import sharding
from spatial_jax.config import build
from spatial_jax.hf.model_zoo import released
from spatial_jax.machines import MACHINES, Machine
from spatial_jax.rollout import memory
from spatial_jax.stages.load import read_shape
from spatial_jax.train_config import TrainConfig, plan_for, training_parts, whole_plan

SHORT = tables.TABLES["short"]


@pytest.mark.parametrize("training", tables.TRAINING)
def test_a_row_of_the_document_is_the_plan(training):
  assert tables.row("Qwen2.5-VL-3B", training, SHORT) in tables.DOCUMENT.read_text()


@pytest.mark.slow
def test_the_document_is_the_plan():
  text = tables.DOCUMENT.read_text()
  assert tables.with_tables(text) == text


def test_a_plan_of_absent_devices_is_that_of_real_ones():
  cfg = build(TrainConfig, dict(tiny_defaults.get_config()))
  cfg = dataclasses.replace(cfg, mesh=sharding.MeshConfig(2, 2, 2))
  shape, machine = read_shape(cfg.init), Machine("cpu", 8, 1 << 34)
  real = sharding.make_mesh(cfg.mesh, jax.devices())
  expected = whole_plan(cfg, training_parts(cfg, shape, real), 1 << 34)
  assert plan_for(cfg, shape, machine) == expected


def plan_of(training: str, **settings: str) -> memory.MemoryPlan:
  shape, machine = released("Qwen2.5-VL-3B"), MACHINES["gpu-80gb"]
  config = tables.config_of(shape, tables.TRAINING[training], machine, SHORT)
  config.update_from_flattened_dict(settings)
  return plan_for(build(TrainConfig, dict(config)), shape, machine)


def test_each_option_saves_its_bytes():
  """Of a policy whose parameters are all trained, on one device."""
  plain = plan_of("full", **{"learn.loss.kl.weight": 0.0})
  trained = plain.gradients  # 4 bytes of each
  assert plain.resident == pytest.approx(3 * trained, rel=1e-6)
  mu = plan_of("full", **{"learn.loss.kl.weight": 0.0, "learn.optimizer.mu_dtype": "bfloat16"})
  assert mu.resident == pytest.approx(2.5 * trained, rel=1e-6)
  low = plan_of("full", **{"learn.optimizer.gradient_dtype": "bfloat16"})
  assert low.gradients == trained // 2
  assert low.resident == pytest.approx(3.5 * trained, rel=1e-6), "with a reference"
  host = plan_of("full", **{"learn.reference": "host"})
  assert host.resident == plain.resident
  assert host.reference == trained // 2


def test_a_frozen_base_takes_two_bytes_of_a_parameter():
  half, single = plan_of("LoRA"), plan_of("LoRA", frozen_dtype="float32")
  base = single.resident - half.resident
  assert base == half.weights, "the copy for sampling: all parameters in bfloat16"
  adapters = half.gradients  # 4 bytes of each
  assert half.resident == pytest.approx(base + 3 * adapters, rel=1e-6)
