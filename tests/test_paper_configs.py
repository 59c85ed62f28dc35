"""The configs of the papers: every variant is accepted, with the values that its paper states."""

import itertools
import os
import pathlib
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from configs import qwen_vl, reward_study, smooth_operator, vilasr, vsgrpo
from spatial_jax.automatic import AUTOMATIC, filled
from spatial_jax.config import ConfigError, build
from spatial_jax.hf.model_zoo import NAMES
from spatial_jax.prepare import conditions_of
from spatial_jax.reward.config import COMPONENTS
from spatial_jax.train_config import TrainConfig, has_start_copy, stage_config

ROOT = pathlib.Path(__file__).parent.parent
SIZES_AND_METHODS = [
  ",".join(words) for words in itertools.product(("2b", "7b"), ("grpo", "sft", "dpo"))
]
VARIANTS = {
  vilasr: ("", "cold_start", "reject", "rl", "tiny"),
  vsgrpo: (*SIZES_AND_METHODS, "2b", "7b", "dpo", "tiny"),
  smooth_operator: ("2b", "3b", "7b", "8b", "7b,full", "2b,full", "tiny"),
  reward_study: ("", *reward_study.CONDITIONS, "tiny", "tiny,accuracy", "accuracy,rubric"),
}
ALL = [(module, variant) for module, variants in VARIANTS.items() for variant in variants]
SIGNALS = {
  "format": {"format"},
  "accuracy": {"accuracy"},
  "format_accuracy": {"format", "accuracy"},
  "rubric": {"rubric"},
  "attention": {"attention"},
}


def name_of(value):
  return value.__name__.removeprefix("configs.") if hasattr(value, "__name__") else value


def built(config):
  """Condition -> typed config, with placeholders for what the policy and the data decide."""
  return {
    name: build(TrainConfig, filled(settings, AUTOMATIC))
    for name, settings in conditions_of(config).items()
  }


def one(module, variant, **changes):
  """The typed config of a variant without conditions."""
  config = module.get_config(variant)
  config.update_from_flattened_dict(changes)
  (cfg,) = built(config).values()
  return cfg


# --- every variant -------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "variant"), ALL, ids=name_of)
def test_every_variant_is_accepted_by_every_stage(module, variant):
  for cfg in built(module.get_config(variant)).values():
    for stage in cfg.stages:
      alone = stage_config(cfg, stage)
      assert alone.stages == (stage,)
      optimizer = alone.learn.optimizer
      updates = alone.loop.steps * alone.learn.updates
      assert optimizer.total_steps == updates, "the schedule ends with the run"
      assert optimizer.warmup_steps < optimizer.total_steps
    if "tiny" in variant:
      assert cfg.init == "@warm_up" or (ROOT / cfg.init).is_dir()
    else:
      assert cfg.init in NAMES


@pytest.mark.parametrize("module", VARIANTS, ids=name_of)
def test_every_variant_that_the_description_names_is_tested(module):
  name = name_of(module)
  named = re.findall(rf"configs/{name}\.py(?::([\w,]+))?", module.__doc__)
  assert len(named) > 2
  for variant in named:
    assert not variant or variant in VARIANTS[module]


@pytest.mark.parametrize("module", VARIANTS, ids=name_of)
def test_the_variant_may_be_left_out(module):
  assert len(built(module.get_config())) >= 1


@pytest.mark.parametrize(
  ("module", "variant", "message"),
  [
    (vilasr, "warm", "warm is no variant; use cold_start, reject, rl, tiny, or none"),
    (vsgrpo, "9b", r"9b is no size \(2b, 7b\) and no method \(grpo, sft, dpo\)"),
    (vsgrpo, "2b,ppo", "ppo is no size"),
    (smooth_operator, "9b", "9b is no released size; use 2b, 3b, 7b, 8b, 32b, 72b"),
    (reward_study, "acuracy", "acuracy is no condition; use sft, format, accuracy, .*, or tiny"),
    (reward_study, "tiny,base", "base is no condition"),
  ],
)
def test_unknown_variants_are_refused(module, variant, message):
  with pytest.raises(ValueError, match=message) as caught:
    module.get_config(variant)
  assert "\n" not in str(caught.value)


# --- what the papers state -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["", "rl", "tiny"])
def test_vilasrs_reinforcement_learning(variant):
  cfg = stage_config(one(vilasr, variant), "grpo")
  loss = cfg.learn.loss
  assert (loss.kind, loss.clip_low, loss.clip_high, loss.dual_clip) == ("clip", 0.2, 0.3, 3.0)
  assert (loss.kl.weight, loss.kl.final_weight) == (0.0, 0.0)
  assert (cfg.learn.minibatches, cfg.learn.epochs, cfg.rollout.group) == (2, 1, 8)
  assert cfg.learn.advantage.alpha == 0.0
  reward = cfg.learn.reward
  assert reward.active == ("accuracy", "format")
  assert (reward.weights.accuracy, reward.weights.format) == (1.0, 1.0)
  assert reward.gated == ("accuracy", "format")
  assert (reward.number, reward.score, reward.choice) == ("mra", "strict_mra", "exact")


def test_vilasrs_sizes_and_rates():
  cfg = one(vilasr, "")
  assert cfg.stages == ("sft", "reject", "grpo")
  assert cfg.text == "vilasr"
  assert not cfg.lora.paths, "all parameters"
  rl, sft, reject = (stage_config(cfg, name).learn for name in ("grpo", "sft", "reject"))
  assert rl.optimizer.learning_rate == 1e-6
  assert rl.optimizer.frozen == (), "the vision tower is trained"
  for learn in (sft, reject):
    assert learn.optimizer.learning_rate == 1e-5
    assert learn.optimizer.frozen == ("^vision/",)
    assert learn.optimizer.schedule == "cosine"
    assert learn.optimizer.warmup_steps == learn.optimizer.total_steps // 10
  assert cfg.preprocess.max_pixels == cfg.video.max_pixels == 256 * 28 * 28
  assert (cfg.video.min_frames, cfg.video.max_frames) == (16, 16)
  assert cfg.rollout.stop.max_images == 42
  assert cfg.sft.steps * cfg.sft.batch == pytest.approx(3 * 33_000, rel=0.01)
  assert cfg.reject.train.steps * cfg.reject.train.batch == pytest.approx(3 * 7_800, rel=0.01)
  assert cfg.loop.steps * 32 == 40_000
  unread = {"path", "draw_fraction", "correct_fraction"}
  assert not unread & set(vars(cfg.reject.train)), "it trains on the kept rows alone"
  assert cfg.reject.keep.executable
  assert cfg.reject.keep.reflective


@pytest.mark.parametrize("stage", ["cold_start", "reject", "rl"])
def test_a_stage_of_vilasr_alone_is_that_of_the_chain(stage):
  name = {"cold_start": "sft", "reject": "reject", "rl": "grpo"}[stage]
  alone, chain = one(vilasr, stage), one(vilasr, "")
  assert alone.stages == (name,)
  assert stage_config(alone, name) == stage_config(chain, name)


@pytest.mark.parametrize("variant", SIZES_AND_METHODS)
def test_vsgrpo(variant):
  size, method = variant.split(",")
  cfg = one(vsgrpo, variant)
  assert cfg.stages == (method,)
  assert cfg.init == {"2b": "Qwen2-VL-2B", "7b": "Qwen2-VL-7B"}[size]
  assert cfg.lora.paths, "adapters"
  assert cfg.rollout.group == 14
  assert cfg.rollout.sampling.temperature == 1.0
  kl = cfg.learn.loss.kl
  assert (kl.weight, kl.final_weight, kl.steps, kl.reference) == (1e-4, 0.0, 0, "start")
  rate = {"2b": 1e-5, "7b": 5e-6}[size]
  assert cfg.learn.optimizer.learning_rate == cfg.sft.optimizer.learning_rate == rate
  assert (cfg.learn.loss.clip_low, cfg.learn.loss.clip_high) == (0.2, 0.2)
  assert cfg.learn.advantage.alpha == 0.0
  reward = cfg.learn.reward
  assert (reward.gated, reward.number, reward.choice) == ((), "ratio", "exact")


def test_the_miniature_of_vsgrpo_compares_the_three_methods():
  found = built(vsgrpo.get_config("tiny"))
  assert {name: cfg.stages for name, cfg in found.items()} == {
    name: (name,) for name in ("grpo", "sft", "dpo")
  }
  for cfg in found.values():
    assert cfg.learn.loss.kl.weight == 1e-4
    assert cfg.learn.reward.weights.format == 1.0
    assert cfg.sft.draw_fraction == 0.0


def test_a_copy_of_the_start_is_kept_only_where_the_kl_term_needs_it():
  """Adapters can be left out, so that the start is the policy without them."""
  assert not has_start_copy(one(vsgrpo, "2b"))
  assert has_start_copy(one(vsgrpo, "2b", **{"lora.paths": ()}))
  assert not has_start_copy(one(vilasr, "rl"))
  assert not has_start_copy(stage_config(one(vsgrpo, "2b", **{"lora.paths": ()}), "sft"))


@pytest.mark.parametrize("variant", ["7b", "7b,full", "2b"])
def test_smooth_operator(variant):
  cfg = one(smooth_operator, variant)
  reward, schedule = cfg.learn.reward, cfg.learn.reward.schedule
  assert (reward.number, reward.choice) == ("sigmoid", "smooth")
  assert (schedule.kind, schedule.k_min, schedule.k_max) == ("sigmoid", 1.0, 100.0)
  assert cfg.learn.advantage.alpha == 1.0
  assert cfg.init == qwen_vl.RELEASED[variant.removesuffix(",full")]
  assert bool(cfg.lora.paths) != variant.endswith(",full")
  assert cfg.loop.steps * 32 == pytest.approx(50_000, rel=0.01)


def test_the_miniature_of_smooth_operator_changes_one_value_at_a_time():
  found = built(smooth_operator.get_config("tiny"))
  assert {name: cfg.learn.advantage.alpha for name, cfg in found.items()} == {
    "ap_grpo": 1.0, "grpo": 0.0, "constant_400": 1.0,
  }  # fmt: skip
  constant = found["constant_400"].learn.reward.schedule
  assert (constant.kind, constant.k_max) == ("constant", 400.0)
  assert found["ap_grpo"].learn.reward == found["grpo"].learn.reward


@pytest.mark.parametrize("variant", ["", "tiny"])
def test_the_reward_study_differs_in_its_weights_alone(variant):
  found = built(reward_study.get_config(variant))
  first = found["accuracy"]
  for name, shown in SIGNALS.items():
    cfg = found[name]
    assert cfg.stages == ("grpo",)
    weights = vars(cfg.learn.reward.weights)
    assert set(weights) == set(COMPONENTS)
    assert weights == {key: float(key in shown) for key in COMPONENTS}
    assert set(cfg.learn.reward.active) == shown
    assert cfg.learn.reward.gated == ()
    assert cfg.learn.advantage == first.learn.advantage
    assert (cfg.learn.optimizer, cfg.loop, cfg.init) == (
      first.learn.optimizer,
      first.loop,
      first.init,
    )
  assert found["sft"].stages == ("sft",)
  rubric, attention = first.learn.reward.rubric, first.learn.reward.attention
  terms = (rubric.correctness, rubric.principle, rubric.unit, rubric.format, rubric.structure)
  assert terms == (0.4, 0.2, 0.2, 0.1, 0.1)
  assert (attention.mass, attention.relative, attention.concentration) == (0.0, 0.5, 0.5)
  assert attention.layers == pytest.approx(1 / 3)


def test_the_miniature_of_the_reward_study_starts_from_its_warm_up():
  found = built(reward_study.get_config("tiny"))
  assert list(found) == ["warm_up", *reward_study.CONDITIONS], "the start comes first"
  assert found["warm_up"].stages == ("sft",)
  assert {cfg.init for name, cfg in found.items() if name != "warm_up"} == {"@warm_up"}
  for name in ("warm_up", "sft"):
    assert found[name].sft.optimizer.total_steps == found[name].sft.steps
  assert list(built(reward_study.get_config("tiny,rubric"))) == ["warm_up", "rubric"]
  assert {cfg.source.kind for cfg in found.values()} == {"physics"}


# --- configs that make no sense ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"stages": ("grpo", "sft")},
      r"config\.stages is \('grpo', 'sft'\); the order must be \('sft', 'grpo'\)",
    ),
    ({"stages": ("dpo", "reject")}, r"config\.stages .* must be \('reject', 'dpo'\)"),
    ({"stages": ("sft", "sft")}, r"config\.stages is \('sft', 'sft'\) and names a stage twice"),
    ({"stages": ("sft", "ppo")}, r"config\.stages\[1\] must be one of sft, reject, dpo, grpo"),
    ({"stages": ()}, r"config\.stages is empty; name at least one of sft, reject, dpo, grpo"),
    ({"rollout.group": 1}, r"config\.rollout\.group is 1 and must be at least 2"),
    ({"learn.advantage.alpha": -0.5}, r"config\.learn\.advantage\.alpha is -0\.5 .* at least 0"),
    (
      {"learn.reward.schedule.k_min": 200.0},
      r"config\.learn\.reward\.schedule\.k_max is 100\.0 and must be at least k_min, 200\.0",
    ),
    (
      {"learn.loss.kl.weight": 0.1, "learn.loss.kl.reference": "average"},
      r"^config\.learn\.optimizer\.ema_decay is 0 and must be above 0, because the KL reference",
    ),
    ({"learn.loss.kl.reference": "base"}, r"config\.learn\.loss\.kl\.reference must be one of"),
    (
      {"learn.loss.kl.final_weight": 0.1, "learn.loss.kl.steps": 10},
      r"config\.learn\.loss\.kl\.weight is 0 and final_weight is 0\.1",
    ),
    ({"learn.loss.dual_clip": 0.5}, r"config\.learn\.loss\.dual_clip is 0\.5"),
    ({"sft.draw_fraction": 1.5}, r"config\.sft\.draw_fraction is 1\.5 .* at most 1"),
    ({"sft.correct_fraction": -0.5}, r"config\.sft\.correct_fraction is -0\.5 .* at least 0"),
    ({"reject.train.normalise": "constant"}, r"config\.reject\.train\.normalise must be one of"),
    ({"reject.keep.min_score": 1.0}, r"config\.reject\.keep\.min_score is 1\.0"),
    ({"sft.steps": 0}, r"config\.sft\.\S+ is 0 and must be a whole number, at least 1"),
    ({"dpo.loss.beta": 0.0}, r"config\.dpo\.loss\.beta is 0\.0 and must be above 0"),
    ({"learn.reward.gated": ("taste",)}, r"config\.learn\.reward\.gated"),
  ],
)
def test_a_config_that_makes_no_sense_names_its_key(changes, message):
  with pytest.raises(ConfigError, match=message) as caught:
    one(vilasr, "tiny", **changes)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"lerning": {"rate": 1.0}},
      r"config\.conditions\.mine changes lerning\.rate, which is no key",
    ),
    ({"learn": {"optimizer": {"rate": 1.0}}}, r"conditions\.mine changes learn\.optimizer\.rate,"),
    ({"seed": {"x": 1}}, r"config\.conditions\.mine changes seed\.x, which is no key"),
    ({"learn": 3}, r"config\.learn must be a mapping, got 3"),
    ({"stages": ("grpo", "sft")}, r"config\.stages is \('grpo', 'sft'\)"),
  ],
)
def test_a_condition_that_changes_an_unknown_key_is_refused(changes, message):
  config = vilasr.get_config("tiny")
  config.conditions = ConfigDict({"good": {"seed": 1}, "mine": changes})
  with pytest.raises(ConfigError, match=message) as caught:
    built(config)
  assert "\n" not in str(caught.value)


def test_a_condition_changes_its_own_config_alone():
  config = vilasr.get_config("tiny")
  config.conditions = ConfigDict(
    {"a": {"seed": 5, "learn": {"loss": {"kl": {"weight": 0.1}}}}, "b": {}}
  )
  found = built(config)
  assert [(cfg.seed, cfg.learn.loss.kl.weight) for cfg in found.values()] == [(5, 0.1), (0, 0.0)]
  assert found["b"] == one(vilasr, "tiny")


# --- the command ---------------------------------------------------------------------------------


def test_a_dry_run_prints_the_three_stages_of_vilasr():
  command = [sys.executable, "-m", "spatial_jax.train", "--config=configs/vilasr.py:tiny"]
  done = subprocess.run(
    [*command, "--dry_run"],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert lines[0].startswith("stages: sft, reject, grpo")
  assert [line.split(":")[0] for line in lines if re.match(r"(sft|reject|grpo): ", line)] == [
    "sft", "reject", "grpo",
  ]  # fmt: skip
  assert lines[-1] == "fits"
