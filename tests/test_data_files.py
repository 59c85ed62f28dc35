"""Files of tasks: mixtures, splits, order, and the prompts that worker processes make of them."""

import collections
import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest
from absl import flags

from spatial_jax.config import ConfigError
from spatial_jax.data import pipeline
from spatial_jax.data.files import is_scene_held_out, open_files
from spatial_jax.data.pipeline import PipelineConfig
from spatial_jax.errors import DataError
from tests import rollout_fixtures
from tests.row_fixtures import FILES, jpeg, rows, save_images, save_rows, save_tfds


def accept(_):
  """All tasks can be scored."""


def numbers(folder: pathlib.Path, count: int, name: str = "a", **more: object) -> pathlib.Path:
  """A file with `count` questions about one image, each in a scene of its own."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "0.jpg").write_bytes(jpeg(0))
  made = [
    {"question": "How far, in meters?", "answer": i + 1, "images": ["0.jpg"], "scene": f"{name}{i}"}
    | more
    for i in range(count)
  ]
  return save_rows(folder / f"{name}.jsonl", made)


def opened(*paths: pathlib.Path, **changes: object):
  return open_files(paths, dataclasses.replace(FILES, **changes), accept)


def ids(tasks) -> list[str]:
  return [task.task_id for task in tasks]


def test_the_order_is_a_function_of_seed_and_position(tmp_path):
  source = opened(numbers(tmp_path, 40), held_out_fraction=0.0)
  assert ids(source.batch(3, 7, 4)) == ids(source.batch(3, 7, 4))
  assert ids(source.batch(3, 7, 4)) != ids(source.batch(4, 7, 4))
  assert ids(source.batch(3, 7, 4, refill=1)) != ids(source.batch(3, 7, 4))
  one_pass = [task for step in range(10) for task in ids(source.batch(0, step, 4))]
  assert len(set(one_pass)) == 40, "every task once in a pass"
  following = [task for step in range(10, 20) for task in ids(source.batch(0, step, 4))]
  assert set(following) == set(one_pass)
  assert following != one_pass, "each pass has another order"


def test_easy_tasks_come_first_in_the_first_pass(tmp_path):
  save_images(tmp_path, 1)
  made = [
    {"question": "Far?", "answer": i + 1, "images": ["0.jpg"], "extra": {"difficulty": -i}}
    for i in range(20)
  ]
  path = save_rows(tmp_path / "a.jsonl", made)
  source = opened(path, order="easy_first", held_out_fraction=0.0)
  first = [task.answer for step in range(5) for task in source.batch(0, step, 4)]
  assert first == [str(i) for i in range(20, 0, -1)]
  later = [task.answer for step in range(5, 10) for task in source.batch(0, step, 4)]
  assert sorted(later) == sorted(first)
  assert later != first


@pytest.mark.parametrize(("weights", "share"), [((), 10 / 40), ((3.0, 1.0), 0.75)])
def test_files_are_mixed_by_weight(tmp_path, weights, share):
  paths = numbers(tmp_path, 10, "a"), numbers(tmp_path, 30, "b")
  source = opened(*paths, weights=weights, held_out_fraction=0.0)
  counts = collections.Counter(t.source for step in range(100) for t in source.batch(0, step, 4))
  assert counts["a.jsonl"] / 400 == pytest.approx(share, abs=0.02)


def test_scenes_are_held_out_by_name(tmp_path):
  source = opened(numbers(tmp_path, 200), held_out_fraction=0.25)
  held_out = source.held_out(1000)
  learned = {t.scene_id for step in range(50) for t in source.batch(0, step, 4)}
  assert 30 < len(held_out) < 70
  assert not learned & {task.scene_id for task in held_out}
  assert all(is_scene_held_out(task.scene_id, 0.25) for task in held_out)
  assert len(list(source.examples(0, 1000))) == source.train_count == 200 - len(held_out)
  assert ids(source.held_out(5)) == ids(held_out)[:5], "more tasks begin with the same ones"


def test_rows_or_another_file_say_what_is_held_out(tmp_path):
  train, test = numbers(tmp_path, 8, "a"), numbers(tmp_path, 4, "b", split="held_out")
  for source in (
    opened(save_rows(tmp_path / "both.jsonl", [train.read_bytes().strip(), test.read_bytes()])),
    opened(train, held_out=str(test)),
    opened(train, held_out=str(numbers(tmp_path, 4, "c"))),
  ):
    assert source.train_count == 8
    assert len(source.held_out(99)) == 4


def test_held_out_types_come_in_turn(tmp_path):
  made = rows(save_images(tmp_path, 2), 12)
  source = opened(save_rows(tmp_path / "all.jsonl", made), held_out_fraction=0.75)
  kinds = [task.question_type for task in source.held_out(3)]
  assert len(set(kinds)) == 3


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"weights": (1.0, 2.0, 3.0)}, "weights has 3 values for 2 files"),
    ({"weights": (1.0, 0.0)}, "weights is .* must be above 0"),
    ({"held_out_fraction": 1.0}, "must be at least 0 and below 1"),
  ],
)
def test_a_wrong_mixture_is_one_line(tmp_path, changes, message):
  paths = numbers(tmp_path, 4, "a"), numbers(tmp_path, 4, "b")
  with pytest.raises(ConfigError, match=message) as caught:
    opened(*paths, **changes)
  assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used_are_one_line(tmp_path):
  (tmp_path / "folder").mkdir()
  (tmp_path / "a.parquet").write_bytes(b"PAR1")
  (tmp_path / "empty.jsonl").write_bytes(b"")
  for path, message in (
    (tmp_path / "folder", "is a folder without dataset_info.json"),
    (tmp_path / "a.parquet", "convert it first: python -m spatial_jax.tools.build"),
    (tmp_path / "empty.jsonl", "is empty"),
    (tmp_path / "none.jsonl", "does not exist"),
  ):
    with pytest.raises(DataError, match=message) as caught:
      opened(path)
    assert "\n" not in str(caught.value)


def test_a_benchmark_alone_can_be_evaluated_and_not_trained_on(tmp_path):
  held = numbers(tmp_path, 3, "held", split="held_out")
  source = opened(held)
  assert len(source.held_out(9)) == len(list(source.examples(0, 9))) == 3
  with pytest.raises(DataError, match=r"config\.source\.path has no training task"):
    source.batch(0, 0, 1)
  good = numbers(tmp_path, 4)
  both = opened(good, held, held_out_fraction=0.0)
  assert (len(both.held_out(9)), both.train_count) == (3, 4)
  assert len(both.batch(0, 0, 8)) == 8
  with pytest.raises(DataError, match=r"held\.jsonl has a weight and no training task"):
    opened(good, held, weights=(1.0, 1.0))


def test_too_many_bad_rows_refuse_the_run_with_a_list(tmp_path, capsys):
  good = numbers(tmp_path, 30).read_bytes().strip()
  path = save_rows(tmp_path / "b.jsonl", [good, b"{", b'{"question": "?"}'])
  assert opened(path, max_bad_fraction=0.1).bad_rows == 2
  assert "2 of 32 rows cannot be used (row 1, answer 1)" in capsys.readouterr().out
  with pytest.raises(DataError, match=r"b\.jsonl:32: answer: is missing") as caught:
    opened(path, max_bad_fraction=0.05)
  assert "max_bad_fraction = 0.05" in str(caught.value)


# --- prompts -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Encode:
  """The conversation of the fixtures, which a worker process can import."""

  def __call__(self, task):
    return rollout_fixtures.conversation().prompt(task)


def stream(source, first, workers, count=4, **share):
  cfg = PipelineConfig(workers, 2)
  tasks = source.dataset(0)
  return pipeline.prompt_batches(tasks, Encode(), 0, first, count, cfg, **share)


def names(batches, count: int) -> list[list[str]]:
  taken = itertools.islice(batches, count)
  return [[prompt.task.task_id for prompt in batch.prompts] for batch in taken]


def test_a_run_that_resumes_gets_the_same_prompts(tmp_path):
  source = opened(numbers(tmp_path, 10), held_out_fraction=0.0)
  whole = names(stream(source, 0, 0), 8)
  assert whole == [ids(source.batch(0, step, 4)) for step in range(8)]
  for first in (1, 5):
    assert names(stream(source, first, 0), 3) == whole[first : first + 3]


@pytest.mark.slow
def test_worker_processes_change_nothing(tmp_path):
  flags.FLAGS.mark_as_parsed()  # grain reads absl flags
  source = opened(numbers(tmp_path, 10), held_out_fraction=0.0)
  assert names(stream(source, 2, 2), 4) == names(stream(source, 2, 0), 4)


def test_processes_share_the_positions_of_a_step(tmp_path):
  source = opened(numbers(tmp_path, 40), held_out_fraction=0.0)
  whole = names(stream(source, 1, 0, count=4), 3)
  halves = [names(stream(source, 1, 0, 2, process=p, processes=2), 3) for p in (0, 1)]
  assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_a_task_that_cannot_be_read_is_replaced_and_counted(tmp_path):
  source = opened(numbers(tmp_path, 10), held_out_fraction=0.0, check_media=False)
  lines = source.parts[0].source.path.read_bytes().splitlines()
  lines[3] = lines[3].replace(b"0.jpg", b"9.jpg")
  save_rows(source.parts[0].source.path, lines)
  batches = list(itertools.islice(stream(source, 0, 0, count=10), 1))
  assert len(batches[0].prompts) == 10
  (reason,) = batches[0].replaced
  assert "task a/4" in reason
  assert "9.jpg does not exist" in reason
  again = list(itertools.islice(stream(source, 0, 0, count=10), 1))
  assert names(again, 1) == names(batches, 1)


def test_data_that_disappeared_is_one_line(tmp_path):
  source = opened(numbers(tmp_path, 10), held_out_fraction=0.0)
  (tmp_path / "0.jpg").unlink()
  with pytest.raises(DataError, match="16 tasks in a row cannot be used; the last one: task a/"):
    next(stream(source, 0, 0))


def test_prompts_of_an_evaluation_come_in_order_with_their_errors(tmp_path):
  source = opened(numbers(tmp_path, 6), held_out_fraction=0.0)
  tasks = source.batch(0, 0, 6)
  tasks[2] = dataclasses.replace(tasks[2], question="<image> <image>?")
  found = list(pipeline.encode_in_order(tasks, Encode(), PipelineConfig(0, 1)))
  assert isinstance(found.pop(2), DataError)
  assert ids(prompt.task for prompt in found) == ids([*tasks[:2], *tasks[3:]])
  assert np.array_equal(found[0].token_ids_T, Encode()(tasks[0]).token_ids_T)


def test_any_error_of_media_is_an_error_of_its_task(tmp_path):
  def broken(_):
    raise OSError("broken data stream")

  (task,) = opened(numbers(tmp_path, 4), held_out_fraction=0.0).batch(0, 0, 1)
  (found,) = pipeline.encode_in_order([task], broken, PipelineConfig(0, 1))
  assert isinstance(found, DataError)
  assert str(found) == f"task {task.task_id}: broken data stream"


def test_the_same_rows_are_held_out_wherever_the_file_lies(tmp_path, monkeypatch):
  made = [{"question": "How far?", "answer": 1, "images": [f"{i}.jpg"]} for i in range(60)]
  paths = [save_rows(tmp_path / folder / "rows.jsonl", made) for folder in ("one", "two")]
  monkeypatch.chdir(tmp_path / "one")
  found = [
    opened(path, held_out_fraction=0.3, check_media=False).parts[0].held_out_N.tolist()
    for path in (*paths, pathlib.Path("rows.jsonl"))
  ]
  assert 5 < len(found[0]) < 35
  assert found[0] == found[1] == found[2]


def test_rows_without_media_are_refused(tmp_path):
  path = numbers(tmp_path, 30)
  save_rows(path, [*path.read_bytes().splitlines(), {"question": "2 + 2?", "answer": 4}])
  assert opened(path).bad_rows == 1


def test_all_benchmarks_of_training_tasks_are_recorded(tmp_path):
  rows = [json.loads(line) for line in numbers(tmp_path, 4).read_bytes().splitlines()]
  rows[1]["benchmark"], rows[3]["benchmark"] = "vsi-bench", "mmsi"
  path = save_rows(tmp_path / "a.jsonl", rows)
  assert opened(path, held_out_fraction=0.0).benchmark == "mmsi, vsi-bench"


def test_scenes_of_a_tfds_folder_with_one_split_are_held_out(tmp_path):
  made = [{"problem": "How far?", "answer": "1", "images": [jpeg(i)]} for i in range(20)]
  columns = {"columns": ("question=problem",), "held_out_fraction": 0.3}
  one = opened(save_tfds(tmp_path / "one", {"train": made}), **columns)
  assert 0 < one.held_out_count < 20
  two = opened(save_tfds(tmp_path / "two", {"train": made[:15], "test": made[15:]}), **columns)
  assert (two.train_count, two.held_out_count) == (15, 5)


def test_contents_change_with_the_rows_and_not_with_the_folder(tmp_path):
  paths = [numbers(tmp_path / folder, 20) for folder in ("one", "two")]
  assert opened(paths[0]).contents == opened(paths[1]).contents
  lines = paths[1].read_bytes().splitlines()
  save_rows(paths[1], lines[1:])
  assert opened(paths[0]).contents != opened(paths[1]).contents
  save_rows(paths[1], [lines[0].replace(b'"a0"', b'"b0"'), *lines[1:]])
  assert opened(paths[0]).contents != opened(paths[1]).contents


def test_an_id_of_two_files_is_refused(tmp_path):
  paths = [save_rows(tmp_path / name / "rows.jsonl", [rows(["0.jpg"], 1)[0]]) for name in "ab"]
  with pytest.raises(DataError, match=r"a/rows\.jsonl and .*b/rows\.jsonl both have the id rows/1"):
    opened(*paths, check_media=False, held_out_fraction=0.0)
