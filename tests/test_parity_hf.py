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
from tests import hf_reference  # noqa: E402
from tests import policy_fixtures as fixtures  # noqa: E402
from tests.test_policy_parity import CASES, GOLDEN, assert_parity  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]


@functools.cache
def reference_model(tied: bool):
  cfg = fixtures.small_config(tied)
  return hf_reference.model(cfg, fixtures.small_params(cfg))


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name):
  case = CASES[name]
  cfg = fixtures.small_config(case.tied)
  live = hf_reference.reference(case, cfg, reference_model(case.tied))
  assert_parity(case, live)
  with np.load(GOLDEN) as golden:  # the committed files are still what transformers says
    np.testing.assert_allclose(golden[f"{name}/logits"], live["logits"], atol=1e-4)


def test_vision_tower_equals_transformers_on_mixed_grids():
  """Ragged windows, several images of different sizes and a clip in one batch."""
  policy = fixtures.small_policy()
  params = fixtures.small_params(policy.cfg)
  images = [
    fixtures.image(seed, *size) for seed, size in enumerate([(24, 40), (8, 8), (40, 8), (32, 32)])
  ]
  clip = fixtures.patch_frames(
    [fixtures.picture(9 + i, 16, 24) for i in range(5)], fixtures.PREPROCESS
  )
  images.append(clip)
  batch, index = plan_vision(images, policy.cfg.vision.window_blocks, fixtures.BUCKETS)
  features_MD = np.asarray(jax.jit(policy.encode)(params, jax.tree.map(jnp.asarray, batch)))
  patches = torch.tensor(np.concatenate([image.patches_PX for image in images]))
  grids = torch.tensor([image.grid_3 for image in images])
  with torch.no_grad():
    expected = reference_model(True).model.visual(patches, grids).pooler_output.numpy()
  ours = np.concatenate([features_MD[rows] for rows in index])
  np.testing.assert_allclose(ours / expected.std(), expected / expected.std(), rtol=0, atol=1e-4)
