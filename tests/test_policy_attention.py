"""Every form of attention equals one softmax over the visible keys."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.policy import attention, attention_modes
from spatial_jax.policy.cache import RowAssignment
from tests.policy_fixtures import small_policy

# Prompts, group, KV heads, queries per KV head, prefix, suffix: few, because each is compiled.
SHAPES = (
  (1, 1, 1, 1, 1, 1),
  (1, 4, 2, 3, 5, 2),
  (3, 2, 2, 1, 4, 5),
  (2, 5, 1, 2, 1, 3),
  (4, 1, 3, 2, 5, 4),
  (2, 3, 2, 2, 3, 1),
)


@dataclasses.dataclass(frozen=True)
class Case:
  """Rows that continue prefixes: random queries, keys and values, and which of them are valid."""

  q_RKQTC: np.ndarray
  prefix: tuple[np.ndarray, np.ndarray]
  prefix_length_B: np.ndarray
  suffix: tuple[np.ndarray, np.ndarray]
  valid_RT: np.ndarray


@st.composite
def cases(draw):
  prompts, group, kv_heads, per_kv, size, tokens = draw(st.sampled_from(SHAPES))
  generator = np.random.default_rng(draw(st.integers(0, 2**32)))
  rows = prompts * group

  def normal(*shape):
    return generator.normal(size=(*shape, 4)).astype(np.float32)

  return Case(
    q_RKQTC=normal(rows, kv_heads, per_kv, tokens),
    prefix=(normal(prompts, kv_heads, size), normal(prompts, kv_heads, size)),
    prefix_length_B=generator.integers(0, size + 1, prompts).astype(np.int32),
    suffix=(normal(rows, kv_heads, tokens), normal(rows, kv_heads, tokens)),
    valid_RT=np.arange(tokens)[None] < generator.integers(1, tokens + 1, (rows, 1)),
  )


def expected_output(case: Case) -> np.ndarray:
  """One query at a time, in float64; 0 for invalid queries."""
  out = np.zeros(case.q_RKQTC.shape)
  group = len(case.q_RKQTC) // len(case.prefix_length_B)
  for r, k, n, t in np.ndindex(out.shape[:4]):
    if not case.valid_RT[r, t]:
      continue
    length = case.prefix_length_B[r // group]
    keys, values = (
      np.concatenate([old[r // group, k, :length], new[r, k, : t + 1]]).astype(np.float64)
      for old, new in zip(case.prefix, case.suffix, strict=True)
    )
    weight = np.exp(keys @ case.q_RKQTC[r, k, n, t] / 2)  # sqrt(C) = 2
    out[r, k, n, t] = weight @ values / weight.sum()
  return out


@jax.jit
def attend_with_prefix(*fields) -> jax.Array:
  """The XLA form, of the fields of a case."""
  return attention.attend_with_prefix(*fields, None)


@jax.jit
def gradient_with_prefix(q_RKQTC, prefix, prefix_length_B, suffix, valid_RT):
  """Derivative of the squared outputs of valid queries by prefix and suffix keys and values."""

  def total(prefix, suffix):
    out = attention.attend_with_prefix(q_RKQTC, prefix, prefix_length_B, suffix, valid_RT, None)
    return jnp.sum(jnp.where(valid_RT[:, None, None, :, None], out, 0.0) ** 2)

  return jax.grad(total, argnums=(0, 1))(prefix, suffix)


def assert_same(out, case: Case) -> None:
  assert np.isfinite(out).all()
  valid = np.broadcast_to(case.valid_RT[:, None, None, :, None], out.shape)
  np.testing.assert_allclose(np.asarray(out)[valid], expected_output(case)[valid], atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(cases())
def test_rows_attend_to_their_prefix_and_themselves(case):
  assert_same(attend_with_prefix(*dataclasses.astuple(case)), case)


@pytest.mark.slow(always=True)
@settings(deadline=None, max_examples=40)
@given(cases())
def test_concatenated_row_of_a_kernel_gives_the_same_output(case):
  """A kernel reads prefix and suffix as one row; here XLA reads that row."""

  def attend_xla(q_RKQTC, k_RKSC, v_RKSC, valid_RS, causal, mesh):
    return attention.attend_xla(q_RKQTC, k_RKSC, v_RKSC, valid_RS, causal)

  device = types.SimpleNamespace(platform="tpu")
  mesh = types.SimpleNamespace(devices=np.array([device]))
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(attention, "_splash", attend_xla)
    out = attention.attend_with_prefix(
      case.q_RKQTC, case.prefix, case.prefix_length_B, case.suffix, case.valid_RT, mesh
    )
  assert_same(out, case)


# Prompts, group, cache rows, query tokens, sizes of the suffix blocks.
CACHES = ((2, 3, 6, 1, (4, 3, 5)), (2, 3, 4, 1, (12,)), (3, 2, 5, 2, (5, 7)), (1, 4, 3, 3, (2, 10)))
attend_cache = jax.jit(attention.attend_cache)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CACHES), st.integers(0, 2**32))
def test_shared_prefix_gives_the_output_of_a_copied_prefix(shape, seed):
  """Reference: one query at a time over a prefix that is copied for every row, in float64."""
  prompts, group, rows, tokens, sizes = shape
  random = np.random.default_rng(seed)

  def normal(*shape):
    return random.normal(size=(*shape, 4)).astype(np.float32)

  prefix = (normal(prompts, 2, 5), normal(prompts, 2, 5))
  length_B = random.integers(1, 6, prompts).astype(np.int32)
  suffix = [(normal(rows, 2, size), normal(rows, 2, size)) for size in sizes]
  start_R = random.integers(0, sum(sizes) - tokens + 1, rows).astype(np.int32)
  q_RKQTC = normal(rows, 2, 3, tokens)
  rollout_R = np.arange(prompts * group, dtype=np.int32)
  assignment = None
  if rows < prompts * group:
    rollout_R = random.permutation(rollout_R)[:rows]
    row_BG = np.zeros(prompts * group, np.int32)
    row_BG[rollout_R] = np.arange(rows)
    assignment = RowAssignment(rollout_R, row_BG.reshape(prompts, group))
  last = np.int32(start_R.max() + tokens - 1)
  out = attend_cache(q_RKQTC, prefix, length_B, suffix, start_R, last, None, assignment)
  whole = [np.concatenate(parts, axis=2) for parts in zip(*suffix, strict=True)]
  for r, k, n, t in np.ndindex(rows, 2, 3, tokens):
    b = rollout_R[r] // group
    keys, values = (
      np.concatenate([old[b, k, : length_B[b]], new[r, k, : start_R[r] + t + 1]]).astype(float)
      for old, new in zip(prefix, whole, strict=True)
    )
    weight = np.exp(keys @ q_RKQTC[r, k, n, t] / 2)  # sqrt(C) = 2
    np.testing.assert_allclose(out[r, k, n, t], weight @ values / weight.sum(), atol=1e-5)


def test_modes_of_all_layers_stack_keys_and_values_alone():
  cache = small_policy().init_cache(2, 2, 4, 6, (3, 5))
  valid_RT = np.ones((4, 1), bool)
  modes = {
    "causal": attention_modes.causal(valid_RT, 3),
    "prefix": attention_modes.with_prefix(valid_RT, cache.prefix),
    "cache": attention_modes.with_cache(valid_RT, cache, None)[0],
  }
  for name, layers in modes.items():
    assert len(layers) == 3
    stacked, per_layer = attention_modes.stack_layers(layers), {"prefix", "suffix"}
    for field, value in stacked._asdict().items():
      shapes = [x.shape for x in jax.tree.leaves(layers[0]._asdict()[field])]
      expected = [(3, *shape) for shape in shapes] if field in per_layer else shapes
      assert [x.shape for x in jax.tree.leaves(value)] == expected, (name, field)


@settings(deadline=None, max_examples=20)
@given(cases())
def test_padding_has_no_gradient(case):
  prefix_grads, suffix_grads = gradient_with_prefix(*dataclasses.astuple(case))
  size = case.prefix[0].shape[2]
  padding_BS = np.arange(size)[None] >= case.prefix_length_B[:, None]
  for grad in prefix_grads:
    assert np.isfinite(grad).all()
    assert (np.moveaxis(np.asarray(grad), 2, 1)[padding_BS] == 0).all()
  for grad in suffix_grads:
    assert np.isfinite(grad).all()
    assert (np.moveaxis(np.asarray(grad), 2, 1)[~case.valid_RT] == 0).all()


@pytest.mark.parametrize("queries", [1, 2, 3, 4, 8, 20])
@pytest.mark.parametrize("causal", [False, True])
def test_pieces_of_queries_give_the_same_output(monkeypatch, queries, causal):
  """Values and gradients, also if the pieces divide neither a row's 4 queries nor the 5 rows."""
  q_RKQTC = jax.random.normal(jax.random.key(0), (5, 2, 3, 4, 4))
  k_RKSC, v_RKSC = jax.random.normal(jax.random.key(1), (2, 5, 2, 6, 4))
  valid_RS = jnp.arange(6)[None] < jnp.asarray([6, 1, 3, 4, 2])[:, None]

  def squares(attend):
    out = lambda *qkv: attend(*qkv, valid_RS, causal)  # noqa: E731
    total = lambda *qkv: jnp.sum(out(*qkv) ** 2)  # noqa: E731
    return out(q_RKQTC, k_RKSC, v_RKSC), jax.grad(total, (0, 1, 2))(q_RKQTC, k_RKSC, v_RKSC)

  monkeypatch.setattr(attention, "_SCORE_BYTES", queries * 2 * 3 * 6 * 4)
  pieces = squares(lambda *arguments: attention.attend(*arguments, None))
  whole = squares(attention.attend_xla)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), pieces, whole)


def test_scores_of_large_images_are_never_all_in_memory():
  """16 frames of 1,024 patches with a gradient need a fraction of their 1 GiB of scores."""
  shape = jax.ShapeDtypeStruct((16, 16, 1, 1024, 4), jnp.float32)
  rows = jax.ShapeDtypeStruct((16, 16, 1024, 4), jnp.float32)

  def total(q, k, v):
    return jnp.sum(attention.attend(q, k, v, jnp.ones((16, 1024), bool), False, None) ** 2)

  compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(shape, rows, rows).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 1 << 27
