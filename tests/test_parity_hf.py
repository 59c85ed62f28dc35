"""Live parity with transformers on random small checkpoints written by `weights.save`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip(
  "torch", reason="live parity needs torch (extra bench); golden files stand in"
)

from spatial_jax.data.vision import plan_vision  # noqa: E402
from spatial_jax.policy.qwen_vl import make_policy  # noqa: E402
from tests import hf_reference  # noqa: E402
from tests import policy_fixtures as fixtures  # noqa: E402
from tests.test_policy_parity import CASES, GOLDEN, PATH, assert_parity  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]
CONFIGS = fixtures.family_configs()


@functools.cache
def reference_model(name: str):
  return hf_reference.model(CONFIGS[name], fixtures.small_params(CONFIGS[name]))


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name):
  case = CASES[name]
  live = hf_reference.reference(case, reference_model(case.config))
  assert_parity(case, live)
  if case.config in GOLDEN:
    with np.load(PATH) as golden:  # the committed files are still what transformers says
      np.testing.assert_allclose(golden[f"{name}/logits"], live["logits"], atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_features_equal_transformers_on_mixed_grids(name):
  """Ragged windows, several images of different sizes and a clip in one batch; DeepStack too."""
  policy = make_policy(CONFIGS[name], jnp.float32)
  params = fixtures.small_params(policy.cfg)
  images = [
    fixtures.image(seed, *size) for seed, size in enumerate([(24, 40), (8, 8), (40, 8), (32, 32)])
  ]
  images.append(fixtures.clip_of(5))
  batch, index = plan_vision(images, policy.cfg.vision.window_blocks, fixtures.BUCKETS)
  features_MYD = np.asarray(jax.jit(policy.encode)(params, jax.tree.map(jnp.asarray, batch)))
  ours = np.concatenate([features_MYD[rows] for rows in index])
  patches = torch.tensor(np.concatenate([image.patches_PX for image in images]))
  grids = torch.tensor([image.grid_3 for image in images])
  with torch.no_grad():
    out = reference_model(name).model.visual(patches, grids)
  expected = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
  assert len(expected) == ours.shape[1]
  for stream, features in enumerate(expected):
    theirs = features.numpy()
    scale = theirs.std()
    np.testing.assert_allclose(ours[:, stream] / scale, theirs / scale, rtol=0, atol=1e-5)


def _rows(name: str) -> list[fixtures.Row]:
  cfg, one, other = CONFIGS[name], fixtures.image(1, 24, 40), fixtures.image(2, 16, 16)
  return [fixtures.sequence(parts, cfg) for parts in ((9,), (3, one, 6), (2, other, 4, one, 2))]


def _batch(policy, rows: list[fixtures.Row]):
  """Right-padded rows of ours, and what they see."""
  images = [image for row in rows for image in row.images]
  batch, index = plan_vision(images, policy.cfg.vision.window_blocks, fixtures.BUCKETS)
  first = np.cumsum([0] + [len(row.images) for row in rows])
  length = max(len(row.ids) for row in rows)
  arrays = (
    fixtures.pad_rows([row.ids for row in rows], length),
    fixtures.pad_rows([row.positions for row in rows], length),
    fixtures.pad_rows([np.ones(len(row.ids), bool) for row in rows], length),
    fixtures.pad_rows(
      [row.feature(index[start:]) for row, start in zip(rows, first[:-1], strict=True)], length, -1
    ),
  )
  return batch, arrays


def _left_padded(rows: list[fixtures.Row]) -> dict:
  """The same rows as transformers pads a batch for generation."""
  length = max(len(row.ids) for row in rows)
  ids = torch.tensor(np.stack([np.pad(row.ids, (length - len(row.ids), 0)) for row in rows])).long()
  mask = torch.tensor([[0] * (length - len(row.ids)) + [1] * len(row.ids) for row in rows])
  images = [image for row in rows for image in row.images]
  return {
    "input_ids": ids,
    "attention_mask": mask,
    "mm_token_type_ids": hf_reference.token_types(ids),
    **hf_reference.visual_inputs(images),
  }


@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_equals_a_left_padded_one(name):
  """Rows of three lengths, one without any image."""
  policy = make_policy(CONFIGS[name], jnp.float32)
  params, rows = fixtures.small_params(policy.cfg), _rows(name)
  batch, (ids, positions, valid, feature) = _batch(policy, rows)

  @jax.jit
  def forward(params):
    features = policy.encode(params, batch)
    return policy.logits(params, policy.hidden(params, ids, positions, valid, features, feature))

  ours = np.asarray(forward(params))
  with torch.no_grad():
    theirs = reference_model(name)(**_left_padded(rows)).logits.numpy()
  for row, mine, expected in zip(rows, ours, theirs, strict=True):
    expected = expected[-len(row.ids) :]
    scale = expected.std()
    np.testing.assert_allclose(mine[: len(row.ids)] / scale, expected / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_autograd(name):
  """Of the mean log-probability of every other token, for every parameter."""
  policy = make_policy(CONFIGS[name], jnp.float32)
  params, row = fixtures.small_params(policy.cfg), _rows(name)[2]
  batch, (ids, positions, valid, feature) = _batch(policy, [row])
  chosen = np.arange(len(row.ids) - 1) % 2 == 0

  def loss(params):
    features = policy.encode(params, batch)
    hidden = policy.hidden(params, ids, positions, valid, features, feature)
    logp = jax.nn.log_softmax(policy.logits(params, hidden[:, :-1]))
    return jnp.mean(jnp.take_along_axis(logp, ids[:, 1:, None], axis=-1)[0, chosen, 0])

  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  hf = hf_reference.model(policy.cfg, params)
  logp = torch.log_softmax(hf(**_left_padded([row])).logits[0, :-1], dim=-1)
  expected = logp.gather(1, torch.tensor(row.ids[1:, None]).long())[torch.tensor(chosen), 0].mean()
  expected.backward()
  np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
  theirs = hf_reference.gradients(policy.cfg, hf)
  assert jax.tree.structure(grads) == jax.tree.structure(theirs)
  errors = jax.tree.map(
    lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b)), grads, theirs
  )
  worst = max(jax.tree_util.tree_leaves_with_path(errors), key=lambda leaf: leaf[1])
  assert worst[1] < 1e-4, jax.tree_util.keystr(worst[0])


@pytest.mark.parametrize("name", ["qwen2_vl/tied", "qwen2_5_vl/tied", "qwen3_vl/tied"])
def test_half_precision_is_as_close_as_transformers_own(name):
  """KL to the float32 reference in bfloat16: no larger than that of transformers."""
  row = _rows(name)[2]
  inputs = _left_padded([row])
  policy = make_policy(CONFIGS[name], jnp.bfloat16)
  params = fixtures.small_params(policy.cfg)
  batch, (ids, positions, valid, feature) = _batch(policy, [row])
  features = jax.jit(policy.encode)(params, batch)
  hidden = jax.jit(policy.hidden)(params, ids, positions, valid, features, feature)
  ours = torch.tensor(np.asarray(policy.logits(params, hidden))[0])
  with torch.no_grad():
    exact = torch.log_softmax(reference_model(name)(**inputs).logits[0], dim=-1)
    half = hf_reference.model(policy.cfg, params).to(torch.bfloat16)
    theirs = torch.log_softmax(half(**inputs).logits[0].float(), dim=-1)
  mine = torch.log_softmax(ours, dim=-1)

  def divergence(other: torch.Tensor) -> float:
    return float((exact.exp() * (exact - other)).sum(-1).mean())

  assert divergence(mine) <= divergence(theirs)
