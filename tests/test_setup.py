"""The package has all its files when it is installed."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "spatial_jax"


def test_package_data_has_every_file_that_is_not_python():
  tree = ast.parse((ROOT / "setup.py").read_text())
  call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and n.keywords)
  data = next(keyword.value for keyword in call.keywords if keyword.arg == "package_data")
  patterns = ast.literal_eval(data)["spatial_jax"]
  listed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
  files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in str(path)}
  assert listed == {path for path in files if path.suffix != ".py"}
