"""The config of a training run: ranges, and shapes of the update that agree with the rollouts."""

import pytest

from configs import tiny, tiny_defaults
from spatial_jax.config import ConfigError, build
from spatial_jax.prepare import flat_changes
from spatial_jax.train_config import MAY_DIFFER, TrainConfig


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"learn.micro.lengths": (64, 200)}, r"micro\.lengths ends at 200 and must be .* 256"),
    ({"learn.prefix_buckets": (64,)}, r"prefix_buckets ends at 64 and must be .* 512"),
    ({"learn.vision.frames": (64,)}, r"learn\.vision\.frames ends at 64 and must be .* 512"),
    ({"learn.keep_fraction": 0.0}, r"learn\.keep_fraction is 0\.0 and must be above 0"),
    ({"learn.prefix_buckets": ()}, r"learn\.prefix_buckets is \(\) and must be ascending"),
    ({"learn.prefix_buckets": (512, 160)}, r"prefix_buckets is \(512, 160\) and must be ascending"),
    ({"learn.save_rollouts_every": -1}, r"save_rollouts_every is -1 and must be .* at least 0"),
    ({"learn.saved_groups": -1}, r"learn\.saved_groups is -1 and must be .* at least 0"),
    ({"learn.minibatches": 0}, r"^config\.learn\.minibatches is 0 and must be .* at least 1"),
    ({"learn.epochs": 0}, r"^config\.learn\.epochs is 0 and must be .* at least 1"),
    ({"loop.steps": 0}, r"^config\.loop\.steps is 0 and must be at least 1"),
    ({"rollout.group": 1}, r"rollout\.group is 1 and must be at least 2"),
    ({"evaluation.tasks": -1}, r"evaluation\.tasks is -1 and must be .* at least 0"),
    ({"evaluation.progress_tasks": 385}, r"progress_tasks is 385 and must be at most tasks, 384"),
    ({"evaluation.temperatures": (0.3, 1e-7)}, r"temperatures is .* from 1e-06 to 1000"),
    ({"evaluation.temperatures": (1001.0,)}, r"temperatures is .* from 1e-06 to 1000"),
    ({"seed": -1}, r"seed is -1 and must be .* at least 0 and at most 4294967295"),
    ({"seed": 2**32}, r"seed is 4294967296 and must be .* at most 4294967295"),
    ({"rollout.sampling.temperature": 1e4}, r"temperature is 10000\.0 and must be .* to 1000"),
    ({"rollout.sampling.top_k": 2**31}, r"top_k is 2147483648 and must be .* below 2\^31"),
    ({"executor.workers": 10**6}, r"executor\.workers is 1000000 and must be .* at most 1024"),
    ({"executor.memory_mib": 2**21}, r"memory_mib is 2097152 and must be .* at most 1048576"),
    ({"learn.optimizer.b1": 0.99999999999}, r"optimizer\.b1 is .* at most 0\.999999"),
    ({"learn.optimizer.b2": 1.0}, r"optimizer\.b2 is 1\.0 and must be .* at most 0\.999999"),
    (
      {"learn.advantage.per_component": True, "learn.advantage.baseline": "leave_one_out"},
      r"advantage\.baseline is 'leave_one_out' and must be mean with per_component",
    ),
    ({"dpo.sampled_tasks": 0}, r"dpo\.sampled_tasks is 0 and must be .* at least 1"),
    ({"dpo.min_gap": -1.0}, r"dpo\.min_gap is -1\.0 and must be"),
    (
      {"dpo.pairs": "samples", "dpo.path": "rows.jsonl"},
      r"dpo\.path is 'rows\.jsonl' and must be \"\" with pairs=\"samples\"",
    ),
    ({"learn.optimizer.learning_rate": 2.0}, r"learning_rate is 2\.0 and must be .* at most 1"),
  ],
)
def test_values_out_of_range_are_refused(changes, message):
  cfg = tiny_defaults.get_config()
  cfg.update_from_flattened_dict(changes)
  with pytest.raises(ConfigError, match=message) as caught:
    build(TrainConfig, dict(cfg))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("learn.optimizer.eps", 1e-50),
    ("learn.optimizer.learning_rate", 1e39),
    ("learn.optimizer.weight_decay", 1e39),
    ("learn.reward.schedule.k_max", 1e39),
    ("learn.reward.schedule.k_min", 1e-50),
    ("learn.reward.schedule.steepness", 1e39),
    ("learn.reward.weights.format", 1e39),
    ("learn.loss.kl.weight", 1e39),
    ("rollout.sampling.temperature", 1e39),
    ("lora.alpha", 1e39),
  ],
)
def test_numbers_that_float32_cannot_hold_are_refused(key, value):
  cfg = tiny_defaults.get_config()
  cfg.update_from_flattened_dict({key: value})
  with pytest.raises(ConfigError, match=rf"^config\.{key} must be a finite number of float32"):
    build(TrainConfig, dict(cfg))


def test_schedules_follow_the_number_of_steps():
  """So `--config.loop.steps=200` is enough, and a run can be resumed with it."""
  cfg = tiny.get_config()
  cfg.loop.steps = 200
  built = build(TrainConfig, dict(cfg))
  optimizer = built.learn.optimizer
  assert (built.loop.steps, optimizer.total_steps, optimizer.warmup_steps) == (200, 200, 40)
  assert {"loop", "learn.optimizer.total_steps", "learn.optimizer.warmup_steps"} <= set(MAY_DIFFER)
  cfg.learn.optimizer.total_steps = 300
  assert cfg.loop.steps == 200


@pytest.mark.parametrize("key", ["sft", "reject.train"])
def test_everything_that_follows_the_number_of_sft_steps_may_differ(key):
  """So a finished stage of SFT or of rejection sampling can be resumed with more steps."""
  one, more = tiny_defaults.get_config(), tiny_defaults.get_config()
  more.update_from_flattened_dict({f"{key}.steps": 4000})
  before, after = (dict(flat_changes(cfg.to_dict())) for cfg in (one, more))
  changed = {name for name in before if before[name] != after[name]}
  assert {f"{key}.steps", f"{key}.optimizer.total_steps"} <= changed <= set(MAY_DIFFER)
