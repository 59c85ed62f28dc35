"""The values of a config that may be None, which is automatic, and how they are filled in."""

from collections.abc import Mapping
from typing import Any

Settings = dict[str, Any]  # a config as nested dicts
_LARGE = 2**31

# Every key that may be None, with a value of the right type: with these a config is checked before
# anything is read.
AUTOMATIC: dict[str, Any] = {
  "mesh.data": -1,
  "mesh.fsdp": 1,
  "mesh.tensor": 1,
  "preprocess.patch_size": 14,
  "preprocess.merge_size": 2,
  "preprocess.temporal_size": 2,
  "preprocess.min_pixels": 1,
  "preprocess.max_pixels": _LARGE,
  "preprocess.mean": (0.5, 0.5, 0.5),
  "preprocess.std": (0.5, 0.5, 0.5),
  "video.min_pixels": 1,
  "video.max_pixels": _LARGE,
  "rollout.prompts": 1,
  "rollout.slots": 1,
  "rollout.prefill": (1,),
  "rollout.append": (1,),
  "rollout.prompt_buckets": (1,),
  "rollout.observation_buckets": (1,),
  "rollout.suffix_block_edges": (),
  "rollout.feature_buffer_tokens": 1,
  "rollout.vision": {"windows": (1,), "frames": (1,), "patches": (1,)},
  "rollout.max_tokens_per_turn": 1,
  "rollout.stop.max_turns": 1,
  "rollout.stop.max_response_tokens": 1,
  "rollout.stop.max_image_tokens": 0,
  "learn.optimizer.learning_rate": 5e-6,
  "learn.prefix_buckets": (_LARGE,),
  "learn.vision": {"windows": (_LARGE,), "frames": (_LARGE,), "patches": (_LARGE,)},
  "learn.micro.rows": 1,
  "learn.micro.lengths": (_LARGE,),
  "evaluation.prompts": 1,
  "evaluation.slots": 1,
}


def is_automatic(settings: Mapping[str, Any]) -> bool:
  """Returns whether a config has a value to fill in."""
  return any(get(settings, key) is None for key in AUTOMATIC if has(settings, key))


def filled(settings: Settings, values: Mapping[str, Any]) -> Settings:
  """Returns the settings with each value whose key has None; other keys stay as they are."""
  copy = _copy(settings)
  for key, value in values.items():
    if has(copy, key) and get(copy, key) is None:
      *groups, name = key.split(".")
      group = copy
      for part in groups:
        group = group[part]
      group[name] = value
  return copy


def changes(before: Settings, after: Settings) -> list[str]:
  """Returns one line per group of the values that were filled in, for the user."""
  lines: dict[str, list[str]] = {}
  for key in AUTOMATIC:
    if has(before, key) and get(before, key) is None:
      group, _, name = key.rpartition(".")
      lines.setdefault(group, []).append(f"{name} {_shown(get(after, key))}")
  return [f"  {group}: {', '.join(values)}" for group, values in lines.items()]


def has(settings: Mapping[str, Any], key: str) -> bool:
  """Returns whether a config has a key, "rollout.slots" for one."""
  group: Any = settings
  for part in key.split("."):
    if not isinstance(group, Mapping) or part not in group:
      return False
    group = group[part]
  return True


def get(settings: Mapping[str, Any], key: str) -> Any:
  """Returns the value of a key of a config."""
  group: Any = settings
  for part in key.split("."):
    group = group[part]
  return group


def _copy(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _copy(item) for key, item in value.items()}
  return value


def _shown(value: Any) -> str:
  if isinstance(value, Mapping):
    return "{" + ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) + "}"
  if isinstance(value, list | tuple):
    return "(" + ", ".join(map(_shown, value)) + ")"
  if isinstance(value, float):
    return f"{value:g}"
  return f"{value:,}" if isinstance(value, int) else str(value)
