"""README.md is true: its code runs, its files and modules exist."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))


def test_the_python_example_runs():
  (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  values = [float(x) for x in re.findall(r"-?\d+\.\d*", done.stdout)]
  assert len(values) == 4
  assert values[0] == max(values) > 0


@pytest.mark.parametrize("path", [ROOT / "README.md", *DOCS], ids=lambda path: path.name)
def test_modules_configs_and_links_exist(path):
  text = path.read_text()
  for module in re.findall(r"python -m ((?:spatial_jax|experiments|benchmarks)[\w.]*)", text):
    place = ROOT / module.replace(".", "/")
    assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
  for config in re.findall(r"--config=(configs/\w+\.py)", text):
    assert (ROOT / config).exists(), config
  for name in re.findall(r"`((?:tests|spatial_jax|configs|experiments)/[\w./]+)`", text):
    assert (ROOT / name).exists(), name
  for link in re.findall(r"\]\(([^)#:]+)\)", text):
    assert (path.parent / link).exists(), link


def test_the_tree_lists_every_folder_and_entry_point():
  tree = README.split("## The tree")[1]
  for path in sorted((ROOT / "spatial_jax").iterdir()):
    if path.name.startswith("__") or path.suffix not in ("", ".py"):
      continue
    name = path.name if path.is_file() else f"{path.name}/"
    assert name in tree, name
