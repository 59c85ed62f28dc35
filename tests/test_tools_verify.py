"""`verify.forward` in the layout of the processor, and `verify` against transformers."""

import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from spatial_jax.hf import golden as golden_lib
from spatial_jax.hf import weights
from spatial_jax.tools import verify
from tests import policy_fixtures as fixtures
from tests.test_policy_parity import CASES, PATH

ASSET = pathlib.Path(__file__).parent.parent / "spatial_jax" / "assets" / "tiny"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  path = tmp_path_factory.mktemp("checkpoint")
  cfg = fixtures.small_config(True)
  weights.save(fixtures.small_params(cfg), cfg, path)
  return path


@pytest.mark.parametrize("name", ["text", "two_images", "video_hf5", "video_max"])
def test_forward_reads_the_layout_of_the_processor(directory, name):
  case = CASES[f"qwen2_5_vl/tied/{name}"]
  row = case.sequence()
  inputs = {}
  if row.images:
    patches = np.concatenate([image.patches_PX for image in row.images])
    grids = np.array([image.grid_3 for image in row.images])
    kind = ("pixel_values_videos", "video_grid_thw") if "video" in name else None
    inputs = dict(zip(kind or ("pixel_values", "image_grid_thw"), (patches, grids), strict=True))
    inputs |= {"second_per_grid_ts": case.second_per_grid} if kind else {}
  out = verify.forward(directory, row.ids[None], **inputs, video_positions=case.rule)
  with np.load(PATH) as golden:
    np.testing.assert_array_equal(out["positions"].T, golden[f"{case.name}/positions"])
    np.testing.assert_allclose(out["logits"], golden[f"{case.name}/logits"], rtol=0, atol=4e-4)
  tokens = sum(image.tokens for image in row.images)
  assert out["image_features"].shape == (tokens, 48)
  assert {value.dtype.name for value in out.values()} == {"float32", "int32"}


def test_forward_takes_images_and_videos_in_any_order(directory):
  """A video before an image. The features of images come first."""
  image = fixtures.image(1, 16, 16)
  clip = fixtures.patch_frames([fixtures.pixels(i, 16, 24) for i in range(4)], fixtures.PREPROCESS)
  cfg = fixtures.small_config(True)
  row = fixtures.sequence([2, clip, 3, image, 2], cfg, "hf5", (1.0,))
  out = verify.forward(
    directory,
    row.ids,
    image.patches_PX,
    np.array([image.grid_3]),
    clip.patches_PX,
    np.array([clip.grid_3]),
  )
  np.testing.assert_array_equal(out["positions"].T, row.positions)
  alone = verify.forward(
    directory,
    fixtures.sequence([image], cfg).ids,
    image.patches_PX,
    np.array([image.grid_3]),
  )
  np.testing.assert_allclose(
    out["image_features"][: image.tokens], alone["image_features"], rtol=0, atol=1e-4
  )


def test_forward_names_the_input_that_does_not_fit(directory):
  image = fixtures.image(1, 16, 16)
  ids = fixtures.sequence([2, image], fixtures.small_config(True)).ids
  with pytest.raises(ValueError, match="image pads"):
    verify.forward(directory, ids)
  with pytest.raises(ValueError, match="patches"):
    verify.forward(directory, ids, image.patches_PX[:-4], np.array([image.grid_3]))


@pytest.mark.torch
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["qwen2_vl/odd", "qwen2_5_vl/tied", "qwen3_vl/tied"])
def test_verify_compares_with_transformers(name, tmp_path):
  pytest.importorskip("torch", reason="live parity needs torch (extra bench)")
  cfg = fixtures.family_configs()[name]
  weights.save(fixtures.small_params(cfg), cfg, tmp_path)
  golden = golden_lib.make_golden(tmp_path, cfg)
  np.savez_compressed(tmp_path / "golden.npz", **golden)
  checks = verify.compare(tmp_path, golden)
  assert [check for check in checks if not check.passed] == []
  kinds = {check.kind for check in checks}
  assert kinds == {"text", "images", "video", "mixed"}
  deepstack = {check.what for check in checks if "DeepStack" in check.what}
  assert len(deepstack) == len(cfg.vision.deepstack)
  wrong = fixtures.hashed_params(cfg, 77)
  weights.save(wrong, cfg, tmp_path)
  verify._load.cache_clear()
  failed = [check.what for check in verify.compare(tmp_path, golden) if not check.passed]
  assert {"logits", "vision features", *deepstack} <= set(failed)


@pytest.mark.torch
@pytest.mark.filterwarnings("default")
def test_the_embedded_policy_passes_with_torch_and_with_saved_outputs(tmp_path):
  pytest.importorskip("torch", reason="live parity needs torch (extra bench)")
  golden = tmp_path / "golden.npz"
  done = run_verify("as installed", ASSET, f"--export={golden}")
  assert done.returncode == 0, done.stdout
  assert "pixels" in done.stdout
  assert "sentences" in done.stdout
  again = run_verify("without torch", ASSET, f"--golden={golden}")
  assert again.returncode == 0, again.stdout
  assert again.stdout == done.stdout


WITHOUT_TORCH = """
  import runpy, sys

  class WithoutTorch:  # a finder, as if torch were not installed
    def __init__(self, finder):
      self.finder = finder

    def find_spec(self, name, path=None, target=None):
      return None if name.split(".")[0] == "torch" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
      return getattr(self.finder, name)

  sys.meta_path[:] = [WithoutTorch(finder) for finder in sys.meta_path]
  runpy.run_module("spatial_jax.tools.verify", run_name="__main__", alter_sys=True)
"""
HOW = {
  "as installed": ["-m", "spatial_jax.tools.verify"],
  "without torch": ["-c", textwrap.dedent(WITHOUT_TORCH)],
}


def run_verify(how, directory, *more):
  command = [sys.executable, *HOW[how], f"--checkpoint={directory}", *more]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("how", HOW)
def test_a_missing_checkpoint_is_one_line_and_exit_code_2(how, tmp_path):
  done = run_verify(how, tmp_path)
  assert done.returncode == 2
  assert f"error: {tmp_path} has no config.json" in done.stderr.splitlines()[-1]


def test_a_missing_folder_of_the_export_is_one_line(directory, tmp_path):
  done = run_verify("as installed", directory, f"--export={tmp_path}/nowhere/golden.npz")
  assert done.returncode == 2
  assert f"/nowhere/golden.npz: {tmp_path}/nowhere is not a folder" in done.stderr.splitlines()[-1]


def test_missing_torch_is_one_line_that_names_the_extra(directory):
  done = run_verify("without torch", directory)
  assert done.returncode == 2
  line = done.stderr.splitlines()[-1]
  assert line.startswith("error: verify compares with transformers and needs torch")
  assert "install the extra `bench`: pip install -e '.[bench]'" in line
