"""Building dataclasses from configs: exact keys and types, finite numbers, all mistakes at once."""

import dataclasses
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, FieldReference

from spatial_jax import config as config_lib
from spatial_jax.config import ConfigError, build


@dataclasses.dataclass(frozen=True)
class Inner:
  kind: Literal["a", "b"]
  sizes: tuple[int, ...]
  pair: tuple[float, str]


@dataclasses.dataclass(frozen=True)
class Outer:
  steps: int
  rate: float
  name: str
  flag: bool
  limit: float | None
  inner: Inner
  inners: tuple[Inner, ...]


GOOD: dict[str, Any] = {
  "steps": 3,
  "rate": 0.5,
  "name": "x",
  "flag": True,
  "limit": None,
  "inner": {"kind": "a", "sizes": (1, 2), "pair": (1.0, "y")},
  "inners": (),
}


def with_value(path: str, value: Any) -> dict[str, Any]:
  """GOOD with one key replaced, added or (by Ellipsis) removed."""
  *groups, key = path.split(".")
  config = {k: dict(v) if isinstance(v, dict) else v for k, v in GOOD.items()}
  place = config
  for group in groups:
    place = place[group]
  place.pop(key, None)
  if value is not ...:
    place[key] = value
  return config


@pytest.mark.parametrize("form", [dict, ConfigDict])
def test_build(form):
  built = build(Outer, form(GOOD))
  assert built == Outer(3, 0.5, "x", True, None, Inner("a", (1, 2), (1.0, "y")), ())


def test_lists_become_tuples_and_ints_become_floats():
  config = with_value("inner.sizes", [4, 5]) | {"rate": 2, "limit": 7, "inners": [GOOD["inner"]]}
  built = build(Outer, config)
  assert built.inner.sizes == (4, 5)
  assert (built.rate, built.limit) == (2.0, 7.0)
  assert isinstance(built.rate, float)
  assert built.inners == (Inner("a", (1, 2), (1.0, "y")),)


def test_field_references_are_resolved():
  steps = FieldReference(3)
  config = ConfigDict(with_value("steps", steps) | {"rate": steps * 2})
  config.steps = 8
  built = build(Outer, config)
  assert (built.steps, built.rate) == (8, 16.0)


@pytest.mark.parametrize(
  ("path", "value", "expected"),
  [
    ("steps", ..., "config.steps is missing"),
    ("inner.kind", ..., "config.inner.kind is missing"),
    ("bogus", 1, "config.bogus is unknown (keys: steps, rate"),
    ("inner.bogus", 1, "config.inner.bogus is unknown (keys: kind, sizes, pair)"),
    ("steps", 1.5, "config.steps must be int, got 1.5"),
    ("steps", True, "config.steps must be int, got True"),
    ("steps", None, "config.steps must be int, got None"),
    ("rate", "0.5", "config.rate must be float, got '0.5'"),
    ("rate", False, "config.rate must be float, got False"),
    ("flag", 1, "config.flag must be bool, got 1"),
    ("limit", "x", "config.limit must be float, got 'x'"),
    ("inner", 3, "config.inner must be a mapping, got 3"),
    (
      "rate",
      float("nan"),
      "config.rate must be a finite number of float32 (0, 1.2e-38 to 3.4e+38), got nan",
    ),
    (
      "rate",
      10**400,
      "config.rate must be a finite number of float32 (0, 1.2e-38 to 3.4e+38), got inf",
    ),
    (
      "limit",
      1e39,
      "config.limit must be a finite number of float32 (0, 1.2e-38 to 3.4e+38), got 1e+39",
    ),
    (
      "rate",
      -1e-50,
      "config.rate must be a finite number of float32 (0, 1.2e-38 to 3.4e+38), got -1e-50",
    ),
    (
      "limit",
      float("-inf"),
      "config.limit must be a finite number of float32 (0, 1.2e-38 to 3.4e+38), got -inf",
    ),
    (
      "inner.pair",
      (float("inf"), "y"),
      "config.inner.pair[0] must be a finite number of float32 (0, 1.2e-38 to 3.4e+38), got inf",
    ),
    ("step", 1, "config.step is unknown (did you mean steps?)"),
    ("inner.kind", True, "config.inner.kind must be one of a, b, got True"),
    ("inner.kind", "c", "config.inner.kind must be one of a, b, got 'c'"),
    ("inner.sizes", 3, "config.inner.sizes must be a list, got 3"),
    ("inner.sizes", (1, "2"), "config.inner.sizes[1] must be int, got '2'"),
    ("inner.pair", (1.0,), "config.inner.pair must have 2 items, got 1"),
    ("inners", ({"kind": "a"},), "config.inners[0].sizes is missing"),
  ],
)
def test_every_mistake_is_named(path, value, expected):
  with pytest.raises(ConfigError) as caught:
    build(Outer, with_value(path, value))
  assert expected in str(caught.value)
  assert "\n" not in str(caught.value)


@given(st.sets(st.sampled_from(sorted(GOOD))), st.sets(st.sampled_from(("p", "q"))))
def test_all_mistakes_are_named_at_once(missing, unknown):
  config = {k: v for k, v in GOOD.items() if k not in missing} | dict.fromkeys(unknown, 0)
  if not missing | unknown:
    build(Outer, config)
    return
  with pytest.raises(ConfigError) as caught:
    build(Outer, config)
  problems = str(caught.value).split("; ")
  assert {p.split()[0] for p in problems} == {f"config.{key}" for key in missing | unknown}


@dataclasses.dataclass(frozen=True)
class Share:
  share: float

  def __post_init__(self):
    config_lib.check_field(self, "share", 0 <= self.share <= 1, "be at least 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Shares:
  first: Share
  others: tuple[Share, ...]


def test_values_out_of_range_are_named_by_their_full_keys():
  config = {"first": {"share": 2.0}, "others": ({"share": 0.5}, {"share": -0.5})}
  rule = "and must be at least 0 and at most 1"
  with pytest.raises(ConfigError) as caught:
    build(Shares, config, "config.learn")
  assert str(caught.value).split("; ") == [
    f"config.learn.first.share is 2.0 {rule}",
    f"config.learn.others[1].share is -0.5 {rule}",
  ]
  with pytest.raises(ConfigError, match=r"^share is -1.0 and must"):
    Share(-1.0)


@dataclasses.dataclass(frozen=True)
class Sizes:
  rows: int
  depth: int
  rate: float
  alpha: float
  kind: Literal["one", "two"]

  def __post_init__(self):
    config_lib.check_whole(self, "rows", at_least=1)
    config_lib.check_whole(self, "depth", at_least=0, at_most=9)
    config_lib.check_number(self, "rate", at_least=0, below=1)
    config_lib.check_number(self, "alpha", above=0)
    config_lib.check_choice(self, "kind")


SIZES = Sizes(1, 9, 0.0, 0.5, "one")


@pytest.mark.parametrize(
  ("field", "wrong", "rule"),
  [
    ("rows", (0, 1.0, True, None, "1"), "be a whole number, at least 1"),
    ("depth", (-1, 10, 2.5), "be a whole number, at least 0 and at most 9"),
    ("rate", (-0.1, 1.0, float("nan"), None, "0", False), "be at least 0 and below 1"),
    ("alpha", (0.0, -1, float("inf"), float("nan")), "be above 0 and finite"),
    ("kind", ("three", None, 1), "be one of one, two"),
  ],
)
def test_numbers_and_choices_are_checked(field, wrong, rule):
  for value in wrong:
    with pytest.raises(ConfigError) as caught:
      dataclasses.replace(SIZES, **{field: value})
    assert str(caught.value) == f"{field} is {value!r} and must {rule}"
