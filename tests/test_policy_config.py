"""Every value of a policy's configuration is checked; the message names the key and the rule."""

import dataclasses
import math

import pytest

from spatial_jax.config import ConfigError, build
from spatial_jax.hf.model_zoo import NAMES, released
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.lora import LoraConfig
from tests.policy_fixtures import family_configs, small_config

SIZES = ("layers", "width", "heads", "mlp_width")
WRONG = [
  *((f"vision.{name}", value) for name in (*SIZES, "patch_size") for value in (0, 2.0, True)),
  *((f"decoder.{name}", value) for name in (*SIZES, "kv_heads", "head_dim") for value in (0, "8")),
  *((f"{part}.norm_eps", value) for part in ("vision", "decoder") for value in (0, 1, math.nan)),
  ("vision.heads", 3),
  ("vision.heads", 16),  # heads of 2 channels
  ("vision.merge_size", 3),
  ("vision.temporal_size", 1),
  ("vision.window_px", -1),
  ("vision.window_px", 7),  # less than one merged token
  ("vision.full_layers", (3,)),
  ("vision.full_layers", (1, 0)),
  ("vision.full_layers", (1, 1)),
  ("vision.full_layers", [1]),
  ("vision.deepstack", (-1,)),
  ("vision.norm", "batch"),
  ("vision.mlp", "relu"),
  ("vision.table_side", -1),
  ("decoder.vocabulary", 0),
  ("decoder.kv_heads", 4),
  ("decoder.rope_theta", 0.0),
  ("decoder.rope_theta", math.inf),
  ("decoder.rope_sections", (2, 1, 2)),
  ("decoder.rope_sections", (2, 2)),
  ("decoder.rope_sections", (5, -1, 0)),
  ("image_pad_id", -1),
  ("video_pad_id", 96),
  ("vision_end_id", 2.0),
  ("tokens_per_second", 0),
  ("family", "qwen4_vl"),
]


def changed(path: str, value: object) -> QwenVLConfig:
  cfg, *parts = small_config(True), *path.split(".")
  if len(parts) == 1:
    return dataclasses.replace(cfg, **{parts[0]: value})
  inner = dataclasses.replace(vars(cfg)[parts[0]], **{parts[1]: value})
  return dataclasses.replace(cfg, **{parts[0]: inner})


def assert_refused(path: str, value: object, name: str) -> None:
  """The message is one line that starts with the name of the field."""
  with pytest.raises(ConfigError) as error:
    changed(path, value)
  assert str(error.value).startswith(f"{name} is ")
  assert " and must " in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(("path", "value"), WRONG)
def test_values_outside_their_range_are_refused(path, value):
  assert_refused(path, value, path.split(".")[-1])


@pytest.mark.parametrize(
  ("path", "value", "name"),
  [
    ("vision.window_px", 0, "full_layers"),  # without windows, every layer is full
    ("decoder.vocabulary", 95, "vision_end_id"),  # 95
    ("family", "qwen2_vl", "vision.mlp_width"),  # 48 is not a multiple of the width 32
  ],
)
def test_values_that_contradict_another_value_are_refused(path, value, name):
  assert_refused(path, value, name)


def test_a_config_file_is_refused_with_the_full_key():
  config = dataclasses.asdict(small_config(True))
  config["vision"]["heads"] = 3
  with pytest.raises(
    ConfigError, match=r"^config\.vision\.heads is 3 and must divide the width 32"
  ):
    build(QwenVLConfig, config)


@pytest.mark.parametrize(
  ("part", "name", "value"), [("vision", "patch_bias", 1), ("decoder", "tied", None)]
)
def test_flags_of_another_type_are_refused(part, name, value):
  config = dataclasses.asdict(small_config(True))
  config[part][name] = value
  with pytest.raises(ConfigError, match=rf"^config\.{part}\.{name} must be bool, got {value}"):
    build(QwenVLConfig, config)


def test_shapes_of_released_and_small_models_are_valid():
  assert all(isinstance(released(name), QwenVLConfig) for name in NAMES)
  assert len(family_configs()) == 9


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rank": 0}, r"config\.lora\.rank is 0 and must be a whole number, at least 1"),
    ({"alpha": 0.0}, r"config\.lora\.alpha is 0\.0 and must be above 0 and finite"),
    ({"alpha": math.inf}, r"config\.lora\.alpha must be a finite number"),
    ({"paths": ("(",)}, r"config\.lora\.paths is \('\(',\) and must hold regexes"),
  ],
)
def test_adapters_are_checked(changes, message):
  config = {"paths": ("/kernel$",), "rank": 2, "alpha": 2.0} | changes
  with pytest.raises(ConfigError, match=message):
    build(LoraConfig, config, "config.lora")
