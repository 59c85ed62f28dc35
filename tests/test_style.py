"""The rules a machine can hold: who imports whom, one alphabet of axes, size budgets."""

import ast
import graphlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "spatial_jax"
LIBRARY = sorted(PACKAGE.rglob("*.py"))
OTHERS = sorted(
  p for folder in ("configs", "benchmarks", "experiments") for p in (ROOT / folder).rglob("*.py")
)
SOURCES = [*LIBRARY, *OTHERS]

# A module imports from its own level and the levels below it.
LEVELS = {
  "types": 1, "rng": 1, "config": 1, "errors": 1, "checks": 1, "grammar": 1,
  "sharding": 2, "metrics": 2, "checkpoint": 2, "workdir": 2, "preemption": 2,
  "data": 3, "policy": 3, "drawing": 3, "reward": 3, "synthetic": 3,
  "rollout": 4, "learn": 4, "hf": 4, "datasets": 4,
  "compiled": 5, "abstract_inputs": 5,
  "stages": 6,
  "evaluate": 7,
  "report": 8,
  "train": 9, "run_stage": 9, "build_grpo": 9, "supervised": 9, "study": 9, "dry_run": 9,
  "train_config": 9, "prepare": 9, "automatic": 9, "machines": 9,
  "evaluate_main": 9, "aot": 9, "chat": 9, "cli": 9, "tools": 9,
}  # fmt: skip
# Folders of one set do not import one another.
BLIND = ({"data", "policy", "drawing", "reward", "synthetic"}, {"rollout", "learn", "hf"})
# Exceptions: readers of files that give scenes, and the table of task sources.
MAY_IMPORT_SYNTHETIC = {"data/source.py", "data/vsi_rooms.py", "data/photos.py"}
# Modules that are run with -m: they may import everything, and nothing imports them.
ENTRY_POINTS = {
  "evaluate/__main__.py", "tools/build.py", "tools/export.py", "tools/verify.py",
}  # fmt: skip
AXES = set("BGRTSVDFHKQUNPMXEAJZLCWIOY")
VERIFY = "spatial_jax/tools/verify.py"  # compares with transformers where it is installed
FILE_LINES, FUNCTION_LINES, LINE_LENGTH = 400, 50, 100
# What a reader of the GRPO stage may have to open: all modules that it imports, also indirectly.
# Each reward is a file of its own.
CLOSURE_FILES, CLOSURE_LINES = 66, 11000

# Words of an earlier vocabulary. Use the terms of the field: evaluation, slot, after, image, batch.
OLD_WORDS = (
  "exam", "contest", "contestant", "seat", "seated", "behind", "mend", "mended", "mending", "grey",
  "coolest", "lesson", "teacher", "patience", "barren", "picture", "hear",
)  # fmt: skip
OLD_PHRASES = (r"whose \w+ it is", r"those of which")
FORBIDDEN = re.compile(rf"\b({'|'.join(OLD_WORDS + OLD_PHRASES)})s?\b", re.IGNORECASE)
# Things in rooms: furniture, colours, the kinds of objects.
SYNTHETIC_WORDS = {"seat", "seats", "grey", "behind", "picture"}


def _tree(path: pathlib.Path) -> ast.Module:
  return ast.parse(path.read_text(), str(path))


def _imports(path: pathlib.Path) -> set[str]:
  found = set()
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def _name(path: pathlib.Path) -> str:
  return str(path.relative_to(ROOT))


def _unit(path: pathlib.Path) -> str:
  relative = path.relative_to(PACKAGE)
  return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_imports_point_down(path):
  relative = str(path.relative_to(PACKAGE))
  unit = _unit(path)
  if unit == "__init__" or relative in ENTRY_POINTS:
    return
  for module in _imports(path):
    if not module.startswith("spatial_jax."):
      continue
    parts = module.split(".")[1:]
    target = parts[0]
    assert "/".join(parts) + ".py" not in ENTRY_POINTS, f"{relative} imports entry point {module}"
    if target == unit:
      continue
    assert LEVELS[target] <= LEVELS[unit], f"{relative} (level {LEVELS[unit]}) imports {module}"
    if target == "synthetic" and relative in MAY_IMPORT_SYNTHETIC:
      continue
    for blind in BLIND:
      assert not {unit, target} <= blind, f"{relative} ({unit}) imports {module}"


def test_no_circles_between_folders():
  graph = {}
  for path in LIBRARY:
    if str(path.relative_to(PACKAGE)) in ENTRY_POINTS:
      continue
    targets = {m.split(".")[1] for m in _imports(path) if m.startswith("spatial_jax.")}
    graph.setdefault(_unit(path), set()).update(targets - {_unit(path)})
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_foreign_imports_have_one_home(path):
  name, imports = _name(path), _imports(path)
  tops = {module.split(".")[0] for module in imports}
  assert "torch" not in tops or name.startswith("benchmarks/") or name == VERIFY
  assert "flax" not in tops or name.startswith("spatial_jax/policy/")
  assert "tensorflow" not in tops
  assert "jax._src" not in " ".join(imports)
  assert not any(m.endswith("PartitionSpec") for m in imports) or name == "spatial_jax/sharding.py"
  if name.startswith("configs/"):
    assert tops <= {"ml_collections", "configs"}
  if name.startswith(("spatial_jax/data/", "spatial_jax/synthetic/")):
    assert "jax" not in tops, "data and synthetic compute in NumPy"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_budgets(path):
  lines = path.read_text().splitlines()
  assert len(lines) <= FILE_LINES, f"{len(lines)} lines"
  long = [i for i, line in enumerate(lines, 1) if len(line) > LINE_LENGTH]
  assert not long, f"lines over {LINE_LENGTH}: {long}"
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      size = (node.end_lineno or node.lineno) - node.lineno + 1
      assert size <= FUNCTION_LINES, f"{node.name}: {size} lines"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_one_alphabet_of_axes(path):
  for node in ast.walk(_tree(path)):
    name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
    match = re.fullmatch(r"[a-z][a-z0-9_]*_([A-Z0-9]*[A-Z][A-Z0-9]*)", name)
    if match:
      unknown = set(re.sub(r"\d", "", match[1])) - AXES
      assert not unknown, f"line {node.lineno}: {name} has unknown axes {sorted(unknown)}"


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_public_names_are_documented_and_annotated(path):
  tree = _tree(path)
  assert not tree.body or ast.get_docstring(tree), "module docstring"
  for node in tree.body:
    if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
      continue
    assert ast.get_docstring(node), f"{node.name} has no docstring"
    if isinstance(node, ast.FunctionDef):
      arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
      bare = [a.arg for a in arguments if a.annotation is None]
      assert not bare, f"{node.name}: arguments without annotation {bare}"
      assert node.args.kwarg is None, f"{node.name} takes **{node.args.kwarg}"


@pytest.mark.parametrize("path", LIBRARY, ids=_name)
def test_no_registry_habits(path):
  for node in ast.walk(_tree(path)):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
      assert node.func.id not in ("getattr", "setattr", "eval", "exec"), f"line {node.lineno}"
    if isinstance(node, ast.Attribute):
      assert node.attr not in ("literal_eval", "pjit"), f"line {node.lineno}: {node.attr}"


def _closure(start: str) -> set[pathlib.Path]:
  """Modules that are imported when `start` is imported; empty `__init__` files are left out."""
  found, todo = set(), [ROOT / start]
  while todo:
    path = todo.pop()
    if path in found:
      continue
    found.add(path)
    for module in _imports(path):
      candidate = ROOT / (module.replace(".", "/") + ".py")
      if module.startswith("spatial_jax.") and candidate.exists():
        todo.append(candidate)
  return found


def test_the_grpo_stage_needs_few_files():
  lines = {
    path: len(path.read_text().splitlines()) for path in _closure("spatial_jax/stages/grpo.py")
  }
  assert len(lines) <= CLOSURE_FILES
  assert sum(lines.values()) <= CLOSURE_LINES


@pytest.mark.parametrize("path", [*SOURCES, ROOT / "README.md"], ids=_name)
def test_no_word_of_the_earlier_vocabulary(path):
  if not _name(path).startswith(("spatial_jax/", "configs/", "README")):
    return
  about_rooms = "/synthetic/" in _name(path) or _name(path) == "configs/tiny_pretrain.py"
  allowed = SYNTHETIC_WORDS if about_rooms else set()
  lines = enumerate(path.read_text().splitlines(), 1)
  found = [(i, m[0]) for i, line in lines for m in FORBIDDEN.finditer(line)]
  assert not [one for one in found if one[1].lower() not in allowed]
