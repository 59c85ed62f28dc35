"""`python -m spatial_jax.evaluate`: from checkpoint to report, and its errors."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax import checkpoint, sharding
from spatial_jax.config import ConfigError
from spatial_jax.data import source as source_lib
from spatial_jax.data.source import make_source
from spatial_jax.errors import CheckpointError, DataError, UserError
from spatial_jax.evaluate.evaluator import evaluation_rollout_config, gallery_tasks
from spatial_jax.evaluate.results import read_results
from spatial_jax.evaluate_main import EvaluateRun, evaluate
from spatial_jax.sharding import MeshConfig
from spatial_jax.stages.context import settings_of
from spatial_jax.stages.load import load_policy, record
from spatial_jax.synthetic import tasks as tasks_lib
from spatial_jax.types import TrainState
from tests import dummies
from tests import evaluate_fixtures as fixtures
from tests.test_data_photos import entry, photo
from tests.test_evaluate_comparison import make_prediction, turn


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory):
  return fixtures.save_policy(tmp_path_factory.mktemp("policy"), 0)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
  """The work directory of a run that trained on the benchmark's rooms."""
  workdir = tmp_path_factory.mktemp("run")
  state = TrainState(fixtures.random_params(1), {"momentum": jnp.zeros(3)}, jnp.int32(4))
  progress = checkpoint.Progress(4, "vsi-bench", {"model": record(fixtures.policy_config())})
  with checkpoint.Saver(workdir, keep=1) as saver:
    saver.save(state, progress)
  fixtures.tokenizer().inner.save(str(workdir / "tokenizer.json"))
  return workdir


@pytest.fixture(scope="module")
def street(tmp_path_factory):
  """One photograph with a dozen questions."""
  objects = entry("car", -4, 10, (2, 1.5, 4)), entry("car", 4, 20, (2, 1.5, 4)), entry("tree", 0, 6)
  return photo(tmp_path_factory.mktemp("photos"), *objects)


def photo_settings(street, init: object = "", **evaluation):
  return fixtures.with_settings(
    init=str(init),
    source={"kind": "photos", "path": str(street)},
    evaluation=evaluation,
  )


# --- loading -----------------------------------------------------------------------------------


def test_a_policy_loads_from_either_kind_of_folder(policy_folder, run_folder, mesh):
  for folder, seed, benchmark in ((policy_folder, 0, None), (run_folder, 1, "vsi-bench")):
    loaded = load_policy(folder, mesh)
    assert loaded.policy.cfg == fixtures.policy_config()
    assert loaded.benchmark == benchmark
    assert loaded.tokenizer.encode("a1") == fixtures.tokenizer().encode("a1")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, fixtures.random_params(seed))
  one = load_policy(run_folder / "checkpoints" / "4", mesh)
  jax.tree.map(np.testing.assert_array_equal, one.params, fixtures.random_params(1))


def test_what_cannot_be_loaded_is_named_in_one_line(tmp_path, policy_folder, mesh):
  with pytest.raises(CheckpointError, match=r"nothing does not exist; give"):
    load_policy(tmp_path / "nothing", mesh)
  (tmp_path / "empty").mkdir()
  with pytest.raises(CheckpointError, match=r"empty has no complete checkpoint; give"):
    load_policy(tmp_path / "empty", mesh)
  bare = fixtures.save_policy(tmp_path / "bare", 0)
  (bare / "tokenizer.json").unlink()
  with pytest.raises(DataError, match=r"tokenizer\.json does not exist"):
    load_policy(bare, mesh)
  state = TrainState(fixtures.random_params(1), {}, jnp.int32(0))
  with checkpoint.Saver(tmp_path / "other", keep=1) as saver:
    saver.save(state, checkpoint.Progress(1, None, {}))
  with pytest.raises(CheckpointError, match=r"does not say which model.*; give the Hugging Face"):
    load_policy(tmp_path / "other", mesh)


# --- sources -----------------------------------------------------------------------------------


def numbered(scenes):
  """A stand-in for rendering: one task per visit, which names its scene."""
  plain = dummies.number_task(np.random.default_rng(0))

  def scene_tasks(scene, number, look, questions):
    task_id = f"{questions.task_id_prefix}{scene.scene_id}/{number}"
    return [dataclasses.replace(plain, task_id=task_id, scene_id=scene.scene_id)]

  return scene_tasks


@dataclasses.dataclass(frozen=True)
class Room:
  scene_id: str
  benchmark: str = "vsi-bench"


def source_config(types=("object_abs_distance",), **changes):
  """Of the one type that `numbered` asks."""
  source = fixtures.run_config().source
  questions = dataclasses.replace(source.questions, types=types)
  return dataclasses.replace(source, questions=questions, **changes)


def test_real_rooms_are_split_by_their_names(monkeypatch):
  rooms = [Room(f"arkitscenes/{i}") for i in range(60)]
  monkeypatch.setattr(source_lib, "load_rooms", lambda path: rooms)
  monkeypatch.setattr(tasks_lib, "scene_tasks", numbered(rooms))
  source = make_source(source_config(kind="rooms", path="rooms"))
  held_out = source.held_out(40)
  trained = [task for step in range(40) for task in source.batch(0, step, 10)]
  examples = source.examples(0, 50)
  out = {task.scene_id for task in held_out}
  assert out.isdisjoint(task.scene_id for task in [*trained, *examples])
  assert out | {task.scene_id for task in trained} == {room.scene_id for room in rooms}
  assert 4 <= len(out) <= 20
  assert len({task.task_id for task in held_out}) == 40  # rooms come again, with another walk
  assert source.benchmark == "vsi-bench"
  assert [t.task_id for t in source.held_out(10)] == [t.task_id for t in held_out[:10]]
  assert source.types == ("object_abs_distance",)


@pytest.mark.parametrize(("rows", "left"), [(0, 0), (5, 5), (200, 12)])
def test_an_evaluation_has_no_more_rows_than_rollouts(rows, left):
  """4 slots with 3 samples each, whatever the number of rows of training."""
  run = fixtures.run_config()
  training = dataclasses.replace(run.rollout, rows=rows)
  shapes = evaluation_rollout_config(training, run.evaluation, 10, has_start=False)
  assert shapes.rows == left


def test_types_that_no_frame_count_allows_are_left_out():
  types = ("camera_distance", "object_counting", "obj_appearance_order")  # of one, any, several
  for counts, kept in (((1,), types[:2]), ((4, 8), types[1:]), ((1, 4), types)):
    camera = dataclasses.replace(fixtures.run_config().source.camera, frame_counts=counts)
    assert make_source(source_config(types, camera=camera)).types == kept
  with pytest.raises(ConfigError, match=r"'camera_distance'.* cannot be asked .*frame_counts"):
    make_source(source_config(types[:1], camera=dataclasses.replace(camera, frame_counts=(4,))))


def test_procedural_rooms_are_split_by_their_numbers(monkeypatch):
  monkeypatch.setattr(tasks_lib, "procedural_scene", lambda number, rooms: Room(f"room-{number}"))
  monkeypatch.setattr(tasks_lib, "scene_tasks", numbered(None))
  source = make_source(source_config())
  for task in source.held_out(20):
    assert int(task.scene_id.split("-")[1]) >= source_lib.HELD_OUT_SEED
  for task in source.examples(3, 20):
    assert int(task.scene_id.split("-")[1]) < source_lib.HELD_OUT_SEED


def test_rooms_without_questions_are_an_error_not_a_wait(monkeypatch):
  monkeypatch.setattr(tasks_lib, "procedural_scene", lambda number, rooms: Room("bare"))
  monkeypatch.setattr(tasks_lib, "scene_tasks", lambda *_: [])
  source = make_source(source_config())
  for give in (source.held_out, lambda count: source.examples(0, count)):
    with pytest.raises(DataError, match=r"gave no question"):
      give(5)


def test_photographs_are_for_evaluation(street):
  source = make_source(source_config(kind="photos", path=str(street)))
  tasks = source.held_out(1000)
  assert 5 <= len(tasks) < 100
  assert source.held_out(3) == tasks[:3]
  assert len({task.question_type for task in tasks[: len(source.types)]}) == len(source.types) > 3
  assert {task.task_id for task in source.examples(0, 5)} == {task.task_id for task in tasks}
  with pytest.raises(ConfigError, match=r"set source\.kind"):
    source.batch(0, 0, 1)
  with pytest.raises(ConfigError, match=r"source\.path is empty"):
    make_source(source_config(kind="photos", path=""))


# --- whole runs --------------------------------------------------------------------------------


@pytest.mark.slow(always=True)
@pytest.mark.filterwarnings("default")  # Orbax
def test_an_evaluation_from_checkpoint_to_report(
  policy_folder, run_folder, street, tmp_path, capsys
):
  workdir = tmp_path / "out"
  evaluate(photo_settings(street, policy_folder), str(run_folder), workdir)
  table = read_results(workdir)
  assert table is not None
  assert [column.key for column in table.columns] == [
    "start_greedy", "start_sampled", "start_best_temperature", "end_greedy", "end_sampled",
    "end_best_of_n", "median", "start_fitted_factor",
  ]  # fmt: skip
  assert sum(row.n for row in table.rows) == 10
  assert table.overall["median"].mean > 0.3
  assert any("of these very questions" in note for note in table.notes)
  lines = map(json.loads, (workdir / "predictions.jsonl").read_text().splitlines())
  texts: dict[str, list[str]] = {}
  for line in lines:
    texts.setdefault(line["column"], []).append(line["text"])
  assert {len(answers) for answers in texts.values()} == {10}
  policies = [tuple(texts[key]) for key in texts if key not in ("median", "start_fitted_factor")]
  assert len(set(policies)) == 6  # no two columns of a policy are the same
  origin = json.loads((workdir / "results.json").read_text())["origin"]
  assert origin["checkpoint"] == str(run_folder)
  assert origin["config"]["source"]["path"] == str(street)
  page = (workdir / "report.html").read_text()
  assert "<h2>Held-out questions at the start and at the end</h2>" in page
  assert page.count("<article>") == 2
  assert page.count('<p class="name">start, greedy</p>') == 2
  assert "<dt>Start</dt>" in page.split("<h2>")[0]
  assert "<h2>Reward</h2>" in page
  out = capsys.readouterr().out
  assert "difference, paired by question" in out
  lines = [line for line in out.splitlines() if line.startswith("evaluating ")]
  assert lines == [f"evaluating {done}/6" for done in range(7)]
  with pytest.raises(ConfigError, match="work directory of another config"):
    evaluate(photo_settings(street, policy_folder, tasks=4), str(run_folder), workdir)


@pytest.mark.filterwarnings("default")
def test_a_policy_is_not_compared_with_itself_nor_with_another_shape(
  policy_folder, run_folder, street, tmp_path, monkeypatch
):
  settings = photo_settings(street, policy_folder, tasks=2, temperatures=())
  evaluate(settings, str(policy_folder), tmp_path / "alone")
  table = read_results(tmp_path / "alone")
  assert table is not None
  assert [column.label for column in table.columns][:2] == ["greedy", "sampled"]
  assert not any("start" in paired.label for paired in table.paired)
  shallow = dataclasses.replace(
    fixtures.policy_config(),
    decoder=dataclasses.replace(fixtures.policy_config().decoder, layers=1),
  )
  monkeypatch.setattr(fixtures, "policy_config", lambda: shallow)
  other = fixtures.save_policy(tmp_path / "shallow", 0)
  with pytest.raises(CheckpointError, match=r"different shapes; set --config\.init=''"):
    evaluate(photo_settings(street, other), str(run_folder), tmp_path / "never")
  assert not (tmp_path / "never").exists()


def test_a_training_config_is_accepted():
  training = {k: v for k, v in fixtures.SETTINGS.items() if k != "reward"}
  training |= {"stages": ("grpo",), "remat": False, "lora": {"paths": ()}, "loop": {"steps": 3}}
  training |= {"learn": {"reward": fixtures.SETTINGS["reward"], "micro": {"rows": 8}}}
  assert settings_of(EvaluateRun, training) == fixtures.SETTINGS
  assert settings_of(EvaluateRun, fixtures.SETTINGS) == fixtures.SETTINGS


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"sead": 1}, r"config\.sead is unknown"),
    ({"source": {"kind": "photos", "path": "missing"}}, r"missing"),
    ({"mesh": {"data": 3}}, r"does not fit"),
  ],
)
def test_bad_input_is_one_line_and_writes_no_result(changes, message, policy_folder, tmp_path):
  with pytest.raises(UserError, match=message) as caught:
    evaluate(fixtures.with_settings(**changes), str(policy_folder), tmp_path / "out")
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "out").exists()


def test_the_command_exits_with_2_and_one_line(tmp_path):
  config = tmp_path / "config.py"
  config.write_text(
    "from ml_collections import ConfigDict\n"
    f"def get_config():\n  return ConfigDict({fixtures.SETTINGS!r})\n"
  )
  done = subprocess.run(
    [
      *(sys.executable, "-m", "spatial_jax.evaluate", f"--config={config}"),
      *(f"--checkpoint={tmp_path}/none", f"--workdir={tmp_path}/out"),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2, done.stderr
  assert re.fullmatch(r"error: .*none does not exist; give .*\n", done.stderr)
  assert not (tmp_path / "out").exists()


def test_the_gallery_shows_every_type_and_drawings_first():
  tasks = [
    dataclasses.replace(
      dummies.number_task(np.random.default_rng(i), f"task-{i}"), question_type=f"type-{i % 2}"
    )
    for i in range(8)
  ]
  given = [
    [
      make_prediction(i, 0.0, turns=(turn(produced=("a1",) if i == drawn else ()),))
      for i in range(8)
    ]
    for drawn in (3, 6)
  ]
  assert [task.task_id for task in gallery_tasks(tasks, given, 4)] == [
    "task-3", "task-6", "task-0", "task-1",
  ]  # fmt: skip
