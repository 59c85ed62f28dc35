"""Rows of a JSONL file: every field, every problem with its line and field, and fuzzed rows."""

import sys

import numpy as np
import pytest
from PIL import Image

from spatial_jax.data.files import open_files
from spatial_jax.data.jsonl import line_count, open_jsonl
from spatial_jax.data.media import MAX_PIXELS
from spatial_jax.data.rows import RowProblem, check_media, task_of_row
from spatial_jax.errors import DataError
from spatial_jax.reward.parse import check_truth
from spatial_jax.types import ImageRef, VideoRef
from tests.row_fixtures import FILES, rows, save_fuzzed_rows, save_images, save_rows

ROW = {"question": "How far is the chair, in meters?", "answer": 2.4, "images": ["a.jpg"]}
CHOICE = {"question": "Which?", "options": ["sofa", "lamp"], "answer": "B"}


def task(row, folder="/data"):
  import pathlib

  return task_of_row(row, "rows/1", "rows.jsonl", pathlib.Path(folder))


def test_the_fields_of_a_row():
  found = task(
    ROW
    | {"id": "x", "type": "distance", "scene": "s", "unit": "m", "benchmark": "b", "split": "train"}
  )
  assert (found.task_id, found.question_type, found.scene_id) == ("x", "distance", "s")
  assert (found.answer, found.answer_kind, found.unit) == ("2.4", "number", "m")
  assert found.benchmark == "b"
  (image,) = found.media
  assert isinstance(image, ImageRef)
  assert image.data == "/data/a.jpg"


def test_defaults_of_a_row():
  found = task(ROW)
  assert (found.task_id, found.question_type) == ("rows/1", "number")
  assert found.scene_id == "a.jpg", "rows about one image are about one scene"
  assert task(ROW | {"images": ["/x/a.jpg"]}).scene_id == "/x/a.jpg"
  assert found.unit is None


@pytest.mark.parametrize(
  ("answer", "kind"), [(3, "number"), ("3", "number"), ("-1.5e2", "number"), ("three", "words")]
)
def test_the_kind_follows_the_answer(answer, kind):
  assert task(ROW | {"answer": answer}).answer_kind == kind


@pytest.mark.parametrize(
  "options", [["sofa", "lamp"], ["A. sofa", "B. lamp"], ["(A) sofa", "b) lamp"]]
)
@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "lamp", "Lamp", "B. lamp"])
def test_options_get_letters_and_the_answer_is_one(options, answer):
  found = task(CHOICE | {"options": options, "answer": answer})
  assert found.options == ("A. sofa", "B. lamp")
  assert (found.answer, found.answer_kind) == ("B", "choice")


def test_media_are_in_the_order_of_their_marks():
  row = {
    "question": "<video> then <image> and <image>?", "answer": "yes",
    "images": ["a.jpg", "b.jpg"], "videos": ["v.mp4"],
  }  # fmt: skip
  video, first, second = task(row).media
  assert isinstance(video, VideoRef)
  assert (video.data, first.data, second.data) == ("/data/v.mp4", "/data/a.jpg", "/data/b.jpg")
  unmarked = task(row | {"question": "What?"}).media
  assert [type(one) for one in unmarked] == [ImageRef, ImageRef, VideoRef]


def test_marks_on_images_and_times_of_frames():
  marks = [{"shape": "box", "points": [1, 2, 3, 4], "color": "red"}]
  row = ROW | {
    "images": [{"path": "a.jpg", "marks": marks}],
    "videos": [{"frames": ["f.jpg", "g.jpg"], "fps": 4}],
  }
  image, video = task(row).media
  assert isinstance(image, ImageRef)
  assert image.marks[0].points == (1.0, 2.0, 3.0, 4.0)
  assert isinstance(video, VideoRef)
  assert video.times_s == (0.0, 0.25)


@pytest.mark.parametrize(
  ("change", "field", "reason"),
  [
    ({"question": None}, "question", "is missing; the row has"),
    ({"question": " "}, "question", "must be a text"),
    ({"answer": None}, "answer", "is missing"),
    ({"answer": [1]}, "answer", "must be a text or a number"),
    ({"answer": "about 3 m", "kind": "number"}, "answer", "must be a number"),
    ({"answer": "about 3 m"}, "answer", "a text with a number"),
    ({"answer": ""}, "answer", "is empty"),
    ({"answer": float("nan")}, "answer", "must be a finite number"),
    ({"answer": float("inf"), "kind": "number"}, "answer", "must be a number"),
    ({"answer": float("nan"), "kind": "words"}, "answer", "must be a finite number"),
    ({"qestion": "?"}, "qestion", "is an unknown field .did you mean question."),
    ({"kind": "letter"}, "kind", "must be number, choice or words"),
    ({"kind": "choice"}, "options", "is missing"),
    ({"options": ["sofa", "lamp"], "answer": "C"}, "answer", "none of the options"),
    ({"options": ["sofa", "sofa"], "answer": "sofa"}, "answer", "several options"),
    ({"options": ["sofa"]}, "options", "must be a list of 2 to 26 texts"),
    ({"options": ["sofa", 3]}, r"options\[1\]", "must be a text"),
    ({"options": ["a", "b"], "kind": "number"}, "kind", "but the row has options"),
    ({"unit": "m", "answer": "red"}, "unit", "but the answer is of kind words"),
    ({"images": "a.jpg"}, "images", "must be a list"),
    ({"images": [3]}, r"images\[0\]", "must be a path"),
    ({"images": [""]}, r"images\[0\]", "must be a path"),
    ({"images": ["a\0b"]}, r"images\[0\]", "must be a path"),
    ({"question": "<image> <image>?"}, "question", "has 2 marks"),
    ({"question": "<video>?"}, "question", "has 0 marks <image> for 1 images"),
    ({"videos": [{"frames": ["a.jpg"]}]}, r"videos\[0\]", "must be a path, or an object"),
    ({"videos": [{"frames": ["a", "b"], "times_s": [1, 0]}]}, "times_s", "ascending"),
    ({"videos": [{"frames": ["a", "b"], "times_s": [1]}]}, "times_s", "2 ascending times"),
    ({"split": "test"}, "split", "must be train or held_out"),
    ({"extra": 3}, "extra", "must be an object"),
    ({"id": ""}, "id", "must be a text"),
    (
      {"images": [{"path": "a", "marks": [{"shape": "box", "points": [1, 2], "color": "red"}]}]},
      "points", "a box has 4",
    ),
  ],
)  # fmt: skip
def test_every_problem_names_its_field(change, field, reason):
  with pytest.raises(RowProblem, match=f"{field}.*: .*{reason}") as caught:
    task(ROW | change)
  assert "\n" not in str(caught.value)


def test_media_are_checked_by_their_headers(tmp_path):
  save_images(tmp_path, 1)
  (tmp_path / "broken.jpg").write_bytes(b"no image")
  side = int(MAX_PIXELS**0.5) + 1
  Image.new("1", (side, side)).save(tmp_path / "huge.png")
  check_media(task(ROW | {"images": ["0.jpg"]}, tmp_path))
  for name, reason in (
    ("missing.jpg", "does not exist"),
    ("broken.jpg", "cannot be read as an image"),
    ("huge.png", "is larger than 80,000,000 pixels"),
    ("..", "is a folder"),
  ):
    with pytest.raises(RowProblem, match=rf"images\[1\]: .*{reason}"):
      check_media(task(ROW | {"images": ["0.jpg", name]}, tmp_path))
  with pytest.raises(RowProblem, match=r"videos\[0\]: .*does not exist"):
    check_media(task({"question": "?", "answer": 1, "videos": ["v.mp4"]}, tmp_path))
  frames = [{"frames": ["0.jpg", "1.jpg"]}]
  with pytest.raises(RowProblem, match=r"videos\[0\].frames\[1\]: .*does not exist"):
    check_media(task({"question": "?", "answer": 1, "videos": frames}, tmp_path))


def test_a_video_without_pyav_is_a_bad_row_that_names_the_extra(tmp_path, monkeypatch):
  (tmp_path / "v.mp4").write_bytes(b"a video")
  video = {"question": "?", "answer": 1, "videos": ["v.mp4"]}
  check_media(task(video, tmp_path))
  monkeypatch.setitem(sys.modules, "av", None)
  for found in (task(video, tmp_path), task(video | {"videos": [b"a video"]})):
    with pytest.raises(RowProblem, match=r"^videos\[0\]: .*pip install 'spatial_jax\[video\]'$"):
      check_media(found)
  save_images(tmp_path, 2)
  check_media(task(video | {"videos": [{"frames": ["0.jpg", "1.jpg"]}]}, tmp_path))
  path = save_rows(tmp_path / "r.jsonl", [video])
  with pytest.raises(DataError, match=r"r\.jsonl:1: videos\[0\]: .*spatial_jax\[video\]"):
    open_files([path], FILES, check_truth)


def test_lines_are_counted(tmp_path):
  for content, count in ((b"{}\n{}\n", 2), (b"{}\n\n{}", 3), (b"\n" * 3_000_000, 3_000_000)):
    (tmp_path / "r.jsonl").write_bytes(content)
    assert line_count(tmp_path / "r.jsonl") == count


def test_a_file_is_read_by_random_access(tmp_path):
  made = rows(save_images(tmp_path, 3), 12)
  path = save_rows(tmp_path / "rows.jsonl", [*made[:5], b"", *made[5:]])
  source, infos, bad = open_jsonl(path, check_truth, with_media=True)
  assert not bad
  assert len(source) == len(infos) == 12
  assert [source[i].task_id for i in (7, 0)] == ["rows/9", "rows/1"]
  assert source[7].question == made[7]["question"]
  assert infos[7].scene == "room-7"


def test_bad_rows_name_line_and_field(tmp_path):
  save_images(tmp_path, 1)
  good = ROW | {"images": ["0.jpg"]}
  lines = [
    good | {"id": "one"},
    b"{broken",
    good | {"answer": "about 3 m"},
    good | {"answer": "about 3 m", "kind": "number"},
    good | {"id": "one"},
    good | {"images": ["none.jpg"]},
    b"\xff\xfe",
    [1, 2],
    good | {"answer": float("nan")},
    b"[" * 100_000,
    good | {"scene": "a \ud83d"},
    good | {"scene": "a \ud83d\ude00"},
  ]
  source, _, bad = open_jsonl(save_rows(tmp_path / "r.jsonl", lines), check_truth, True)
  assert [row.where for row in bad] == [f"r.jsonl:{n}" for n in range(2, 12)]
  assert [row.field for row in bad] == [
    "row",
    "answer",
    "answer",
    "id",
    "images[0]",
    *["row"] * 4,
    "scene",
  ]
  assert "as in line 1" in bad[3].reason
  assert bad[-1].reason == r"has half of a character, \ud83d"
  assert len(source) == 2
  assert source[1].scene_id == "a \N{GRINNING FACE}"


def test_a_thousand_fuzzed_rows_are_used_or_named(tmp_path):
  """Each row is a task whose truth can be scored, or a bad row with line, field and reason."""
  path = save_fuzzed_rows(tmp_path / "r.jsonl", 1000)
  source, infos, bad = open_jsonl(path, check_truth, True)
  assert len(source) + len(bad) == 1000
  assert len(source) == len(infos)
  assert 300 < len(bad) < 800
  for row in bad:
    assert row.where.startswith("r.jsonl:")
    assert row.field
    assert row.reason
    assert "\n" not in str(row)
  for index in np.random.default_rng(0).permutation(len(source))[:100]:
    check_truth(source[int(index)])
