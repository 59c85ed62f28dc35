"""Numerical3D is the same to the byte for any number of workers and after a kill at any moment."""

import collections
import dataclasses
import io
import json
import pathlib
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import shuffle

from spatial_jax.config import ConfigError
from spatial_jax.data.held_out import HELD_OUT_SEED, is_held_out
from spatial_jax.data.tfds import open_tfds
from spatial_jax.data.tfds_features import decode_row
from spatial_jax.datasets.numerical3d.numerical3d_dataset_builder import Builder
from spatial_jax.datasets.numerical3d.part import SPLITS, BuildSettings, write_part
from spatial_jax.datasets.numerical3d.parts import (
  build_parts,
  open_parts,
  part_path,
  parts_folder,
)
from spatial_jax.errors import DataError
from spatial_jax.reward.parse import check_truth
from spatial_jax.tools.numerical3d import build_dataset, build_numerical3d

META = pathlib.Path(__file__).parents[2] / "shared" / "data" / "vsibench_meta"
needs_meta = pytest.mark.skipif(
  not META.is_dir(), reason=f"the room metadata of VSI-Bench is not at {META}"
)

SETTINGS = BuildSettings(source="rooms", seed=0, tasks=40, rooms_per_part=4)
FOLDER = "numerical3d/1.0.0"
PROGRAM = (
  "import pathlib, sys\n"
  "from spatial_jax.datasets.numerical3d.part import BuildSettings\n"
  "from spatial_jax.tools.numerical3d import build_dataset\n"
  "settings = BuildSettings('rooms', 0, int(sys.argv[2]), int(sys.argv[3]))\n"
  "build_dataset(pathlib.Path(sys.argv[1]), settings, 2)\n"
)


def contents(folder):
  """Name -> bytes of all files of a folder."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


def messages_of(out):
  """What `build_and_kill` and its workers write to stderr."""
  return out.parent / f"{out.name}.stderr"


def build_and_kill(out, settings, files):
  """Starts a build and kills it when it has written this number of parts."""
  arguments = [str(out), str(settings.tasks), str(settings.rooms_per_part)]
  with messages_of(out).open("w") as stderr:
    build = subprocess.Popen(
      [sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.DEVNULL, stderr=stderr
    )
  while len(list(parts_folder(out).glob("*.zip"))) < files:
    assert build.poll() is None, "the build ended before it was killed"
    time.sleep(0.02)
  build.send_signal(signal.SIGKILL)
  build.wait()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """A data set that one worker has built."""
  out = tmp_path_factory.mktemp("numerical3d")
  build_numerical3d(out, SETTINGS, 1, "python -m ...")
  return out


@pytest.fixture(scope="module")
def rows(built):
  """All rows, by split."""
  builder = tfds.builder_from_directory(built / FOLDER)
  return {split: [decode_row(x) for x in builder.as_data_source(split)] for split in SPLITS}


@pytest.mark.slow
def test_four_workers_write_the_same_bytes(built, tmp_path):
  build_dataset(tmp_path, SETTINGS, 4)
  assert contents(tmp_path / FOLDER) == contents(built / FOLDER)


@pytest.mark.slow(always=True)
def test_a_killed_build_goes_on_and_writes_the_same_bytes(built, tmp_path):
  build_and_kill(tmp_path, SETTINGS, 2)
  assert not (tmp_path / FOLDER).exists()
  (parts_folder(tmp_path) / "train-00099.zip.1.partial").write_bytes(b"half of a par")
  (tmp_path / "numerical3d" / "incomplete.ABC_1.0.0").mkdir(parents=True)
  build_dataset(tmp_path, SETTINGS, 4)
  assert contents(tmp_path / FOLDER) == contents(built / FOLDER)
  assert {path.name for path in tmp_path.iterdir()} == {"numerical3d", "numerical3d.json"}
  assert [path.name for path in (tmp_path / "numerical3d").iterdir()] == ["1.0.0"]
  assert not messages_of(tmp_path).read_text(), "workers end without a message"


def test_parts_that_exist_are_not_made_again(tmp_path):
  folder = parts_folder(tmp_path)
  settings = BuildSettings("rooms", 0, 12, 4)
  open_parts(folder, settings)
  progress = []
  first = build_parts(folder, settings, 1, progress.append)
  assert sum(first.values()) == settings.tasks == progress[-1].tasks
  times = {path: path.stat().st_mtime_ns for path in folder.glob("*.zip")}
  (part,) = folder.glob("held_out-00000.zip")
  before = part.read_bytes()
  part.unlink()
  open_parts(folder, settings)
  assert build_parts(folder, settings, 2, progress.append) == first
  assert part.read_bytes() == before
  same = [path for path in times if path.stat().st_mtime_ns == times[path]]
  assert len(same) == len(times) - 1


def test_the_builder_alone_builds_the_same_data_set(built, tmp_path):
  open_parts(parts_folder(tmp_path), SETTINGS)
  Builder(data_dir=tmp_path).download_and_prepare(download_dir=tmp_path / "downloads")
  assert contents(tmp_path / FOLDER) == contents(built / FOLDER)
  assert not parts_folder(tmp_path).exists()


def test_a_large_data_set_needs_no_tensorflow(tmp_path, monkeypatch):
  monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
  build_dataset(tmp_path, BuildSettings("rooms", 0, 6, 4), 1)
  assert (tmp_path / FOLDER / "dataset_info.json").exists()


def test_a_data_set_larger_than_the_memory_is_refused(tmp_path):
  settings = dataclasses.replace(SETTINGS, tasks=10**9)
  with pytest.raises(ConfigError, match=r"--tasks=1000000000 needs about \d+ GB of memory"):
    build_dataset(tmp_path / "new", settings, 1)
  assert not (tmp_path / "new").exists()


def test_no_room_is_in_two_splits_and_none_has_many_tasks(rows):
  assert {split: len(found) for split, found in rows.items()} == {"train": 38, "held_out": 2}
  scenes = {split: {row["scene"] for row in found} for split, found in rows.items()}
  assert not scenes["train"] & scenes["held_out"]
  for split, names in scenes.items():
    held_out = {int(name.split("/")[1]) >= HELD_OUT_SEED for name in names}
    assert held_out == {split == "held_out"}
  counts = collections.Counter(row["scene"] for found in rows.values() for row in found)
  assert max(counts.values()) <= 10
  ids = [row["id"] for found in rows.values() for row in found]
  assert len(set(ids)) == len(ids) == SETTINGS.tasks


def test_every_answer_can_be_read_by_the_reward(built):
  tasks, _, bad = open_tfds(built / FOLDER, (), check=lambda _: None, with_media=True)
  assert not bad
  assert len(tasks) == SETTINGS.tasks
  for task in tasks:
    truth = check_truth(task)
    assert truth.parsed
    assert truth.value == float(task.answer) > 0


def test_rows_have_images_and_what_is_known_about_them(rows):
  frames = set()
  for row in (row for found in rows.values() for row in found):
    frames.add(len(row["images"]))
    for content in row["images"]:
      with Image.open(io.BytesIO(content)) as image:
        assert image.size == (224, 224)
        assert image.format == "JPEG"
    for box in row["extra"]["boxes"]:
      x1, y1, x2, y2 = box["box"]
      assert 0 <= box["image"] < len(row["images"])
      assert 0 <= x1 < x2 <= 224
      assert 0 <= y1 < y2 <= 224
    assert row["unit"] in ("m", "cm", "m^2", "count")
    assert row["kind"] == "number"
    assert row["options"] is None
    assert row["benchmark"] is None
    assert str(row["extra"]["room"]) == row["scene"].split("/")[1]
  assert min(frames) >= 1
  assert max(frames) <= 8
  assert len(frames) >= 4


def test_reading_needs_no_tensorflow_and_finds_the_data_set_by_its_name(built):
  program = (
    "import sys, tensorflow_datasets as tfds\n"
    f"source = tfds.data_source('numerical3d', split='train', data_dir={str(built)!r})\n"
    "print(len(source), type(source[0]['images'][0]).__name__, 'tensorflow' in sys.modules)\n"
    "print(*[source[i]['id'].decode() for i in range(3)])\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=True
  )
  first, ids = result.stdout.splitlines()[-2:]
  assert first == "38 bytes False"
  source = tfds.builder_from_directory(built / FOLDER).as_data_source("train")
  assert ids.split() == [source[i]["id"].decode() for i in range(3)]


def test_the_pages_name_every_type(built, rows):
  page = (built / "index.html").read_text()
  types = {row["type"] for found in rows.values() for row in found}
  assert "Numerical3D" in page
  assert "score of the" in page
  assert page.count('<th scope="row">') == len(types) + 1
  assert "http" not in page.replace("http://www.w3.org", "")
  examples = (built / "examples.html").read_text()
  shown = [row for found in rows.values() for row in found if row["id"] in examples]
  assert len(shown) >= 20
  assert examples.count("<img ") == sum(len(row["images"]) for row in shown)


def test_another_seed_gives_other_rooms(tmp_path, rows):
  path = tmp_path / "part.zip"
  assert write_part(path, BuildSettings("rooms", 1, 60, 2), "train", 0) >= 0
  first = path.read_bytes()
  write_part(path, BuildSettings("rooms", 1, 60, 2), "train", 0)
  assert path.read_bytes() == first
  assert b"numerical3d/1000001/" in first or b"numerical3d/1000000/" in first


def test_a_finished_data_set_is_not_built_again_nor_replaced(built):
  before = contents(built)
  build_numerical3d(built, SETTINGS, 2, "")
  assert contents(built) == before
  with pytest.raises(ConfigError, match="choose another --out"):
    build_numerical3d(built, BuildSettings("rooms", 1, 40, 4), 2, "")


def test_parts_of_another_build_are_refused(tmp_path):
  open_parts(tmp_path, SETTINGS)
  open_parts(tmp_path, BuildSettings("rooms", 0, 100, 4))  # more tasks of the same rooms
  with pytest.raises(ConfigError, match="seed is 0 there and 2 here"):
    open_parts(tmp_path, BuildSettings("rooms", 2, 60, 4))


def test_a_folder_in_use_is_refused(tmp_path):
  program = (
    "import fcntl, os, sys, time\n"
    "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)\n"
    "print('locked', flush=True)\n"
    "sys.stdin.read()\n"
  )
  with subprocess.Popen(
    [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  ) as other:
    assert other.stdout.readline() == b"locked\n"
    with pytest.raises(ConfigError, match="in use by another build"):
      build_numerical3d(tmp_path, SETTINGS, 1, "")
    other.stdin.close()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"source": "photos"}, "source is 'photos' and must be rooms or meta:PATH"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 1000}, "seed is 1000"),
    ({"tasks": 1}, "tasks is 1"),
    ({"rooms_per_part": 0}, "rooms_per_part is 0"),
  ],
)
def test_settings_out_of_range_are_named(changes, message):
  with pytest.raises(ConfigError, match=message):
    BuildSettings(**{**vars(SETTINGS), **changes})


def test_a_worker_that_cannot_write_is_named_with_its_reason(tmp_path):
  open_parts(tmp_path, SETTINGS)
  (tmp_path / "train-00000.zip").mkdir()  # where a part belongs
  with pytest.raises((DataError, OSError)):
    build_parts(tmp_path, SETTINGS, 1, lambda _: None)


def test_missing_metadata_is_one_line(tmp_path):
  settings = BuildSettings(f"meta:{tmp_path / 'none'}", 0, 60, 4)
  with pytest.raises(DataError, match="does not exist"):
    build_numerical3d(tmp_path / "out", settings, 1, "")


@needs_meta
def test_real_rooms_are_split_by_their_names(tmp_path):
  settings = BuildSettings(f"meta:{META}", 0, 40, 2)
  for split in SPLITS:
    path = part_path(tmp_path, split, 0)
    assert write_part(path, settings, split, 0) > 0
    with zipfile.ZipFile(path) as part:
      found = [json.loads(line) for line in part.read("tasks.jsonl").splitlines()]
    assert {is_held_out(row["scene"]) for row in found} == {split == "held_out"}
    assert {row["benchmark"] for row in found} == {"vsi-bench"}
    counts = collections.Counter(row["scene"] for row in found)
    assert max(counts.values()) <= 10
    assert len({(row["scene"], row["question"]) for row in found}) == len(found)


@pytest.mark.slow(always=True)
def test_two_thousand_tasks_are_the_same_bytes_after_kills(tmp_path):
  settings = BuildSettings("rooms", 0, 2000, 20)
  build_dataset(tmp_path / "one", settings, 1)
  for files in (1, 7, 19):
    build_and_kill(tmp_path / "four", settings, files)
  build_dataset(tmp_path / "four", settings, 4)
  one, four = (contents(tmp_path / name / FOLDER) for name in ("one", "four"))
  assert one == four
  assert sum(map(len, one.values())) < 2000 * 120_000  # 6 GB for 50,000 tasks
