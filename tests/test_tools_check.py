"""The check of a data file: exit codes, messages, tables, warnings and the page."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import common
from spatial_jax.data.rows import row_schema
from spatial_jax.report.data_examples import media_names, question_pieces
from spatial_jax.report.data_page import bin_edges, histogram, number_text
from spatial_jax.tools import check
from spatial_jax.types import ImageRef, VideoRef
from tests.row_fixtures import jpeg, rows, save_fuzzed_rows, save_images, save_rows, save_tfds
from tests.test_report import Page

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(autouse=True)
def keep_platform():
  """The command sets the platform of JAX."""
  platforms = jax.config.values["jax_platforms"]
  yield
  jax.config.update("jax_platforms", platforms)


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
  """Exit code, standard output and standard error of the command."""
  monkeypatch.setattr("sys.argv", ["check", *map(str, arguments)])
  code = 0
  try:
    check.main()
  except SystemExit as end:
    code = int(end.code or 0)
  return code, *capsys.readouterr()


def page_of(path: pathlib.Path) -> tuple[str, Page]:
  """The page as text and parsed; no tag comes from the data, nothing is loaded."""
  text = (path.parent / f"{path.stem}_check" / "check.html").read_text()
  page = Page(text)
  assert not {"script", "link", "iframe", "b1"} & set(page.tags)
  assert {url.split(":")[0] for url in page.loads if not url.startswith("#")} <= {"data"}
  return text, page


def numbers(folder: pathlib.Path, count: int, **more: object) -> list[dict]:
  """Questions about one image each, with different words."""
  save_images(folder, 1)
  return [
    {"question": f"How far is {i}, in meters?", "answer": i + 1, "images": ["0.jpg"]}
    | {"scene": f"s{i}", **more}
    for i in range(count)
  ]


def test_a_good_file(tmp_path, monkeypatch, capsys):
  made = rows(save_images(tmp_path, 3), 40)
  made = [row | {"type": "abcd"[i % 4]} for i, row in enumerate(made)]
  path = save_rows(tmp_path / "rows.jsonl", made)
  code, out, _ = run(monkeypatch, capsys, path)
  assert code == 0
  assert "40 of 40 rows can be used" in out
  assert "50 images, 0 video files, 10 lists of 40 frames (3 files, 0 missing)" in out
  held_out = sum(map(int, re.findall(r"(?:number|choice|words) +\d+ +(\d+) ", out)))
  assert f"{40 - held_out} training rows, {held_out} held-out rows" in out
  assert "of the answers are B" not in out, "10 rows are too few to judge"
  folder = tmp_path / "rows_check"
  assert [file.name for file in folder.iterdir()] == ["check.html"]
  text, page = page_of(path)
  assert "All 40 rows can be used." in page.words
  assert text.count("<article") == 24
  assert text.count("data:image/jpeg") == 6 * (1 + 2 + 2 + 4)
  assert "First image 1 then image 2: what moved?" in page.words
  assert '<li class="right">B. lamp</li>' in text


def test_every_bad_row_is_listed_and_counted(tmp_path, monkeypatch, capsys):
  good = numbers(tmp_path, 30)
  lines = [
    *good[:27],
    b"{broken",
    good[27] | {"images": ["none.jpg"]},
    good[28] | {"qestion\x1b[31m": "[/red]"},
    *[row | {"answer": "about 3 m"} for row in numbers(tmp_path, 20)],
  ]
  path, out_folder = save_rows(tmp_path / "rows.jsonl", lines), tmp_path / "new" / "folder"
  code, out, _ = run(monkeypatch, capsys, path, f"--out={out_folder}")
  assert code == 1
  assert "23 bad rows (answer 20, row 1, images 1, qestion" in out
  assert "rows.jsonl:29: images[0]: " in out
  assert "and 3 more" in out
  assert "warning: a run refuses the file: more than 5% of the rows are bad" in out
  assert "27 of 50 rows can be used" in out
  assert "(1 files, 1 missing)" in out
  assert "\x1b" not in out
  listed = (out_folder / "bad_rows.txt").read_text().splitlines()
  assert [line.split(": ")[0] for line in listed] == [f"rows.jsonl:{n}" for n in range(28, 51)]
  words = Page((out_folder / "check.html").read_text()).words
  assert "27 of 50 rows can be used; 23 are bad." in words
  assert words.count("about 3 m") == 20
  save_rows(path, good)
  assert run(monkeypatch, capsys, path, f"--out={out_folder}")[0] == 0
  assert not (out_folder / "bad_rows.txt").exists(), "of the earlier check"


def test_a_file_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, capsys):
  (tmp_path / "empty.jsonl").write_bytes(b"")
  (tmp_path / "a.parquet").write_bytes(b"PAR1")
  (tmp_path / "folder").mkdir()
  save_rows(tmp_path / "good.jsonl", numbers(tmp_path, 2))
  save_rows(tmp_path / "bad.jsonl", [b"{", b"{}"])
  (tmp_path / "file").write_bytes(b"x")
  for arguments, message in (
    (["none.jsonl"], "none.jsonl does not exist"),
    (["empty.jsonl"], "empty.jsonl is empty"),
    (["a.parquet"], "convert it first"),
    (["folder"], "without dataset_info.json"),
    (["bad.jsonl"], "no row can be used; all reasons are in"),
    (["good.jsonl", f"--out={tmp_path / 'file'}"], "file"),
    (["good.jsonl", "--examples=-1"], "--examples=-1 must be at least 0"),
  ):
    code, _, error = run(monkeypatch, capsys, tmp_path / arguments[0], *arguments[1:])
    assert code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
  assert len((tmp_path / "bad_check" / "bad_rows.txt").read_text().splitlines()) == 2
  assert run(monkeypatch, capsys)[0] == 2


def test_texts_of_the_data_are_escaped(tmp_path, monkeypatch, capsys):
  save_images(tmp_path, 2)
  evil = f"{SCRIPT}<b1>&[bold]\x1b[31m:smile:"
  common_fields = {"images": ["0.jpg", "1.jpg"], "id": evil, "type": evil, "scene": evil}
  made = [
    {"question": evil, "answer": evil, "kind": "words", "benchmark": evil} | common_fields,
    {"question": evil, "answer": "A", "options": [evil, "b"]} | common_fields | {"id": "2"},
    {"question": evil, "answer": 3, "unit": "<b1>"} | common_fields | {"id": "3"},
    {"question": evil, "answer": 3, "images": [f"{SCRIPT}.jpg"]},
  ]
  path = save_rows(tmp_path / "rows<b1>.jsonl", made)
  code, out, _ = run(monkeypatch, capsys, path)
  assert code == 1
  assert "\x1b" not in out
  assert "[bold]" in out
  text, page = page_of(path)
  assert "<script" not in text
  assert page.words.count(SCRIPT) >= 8


def test_warnings(tmp_path, monkeypatch, capsys):
  plain = numbers(tmp_path, 30)
  choices = [
    {"question": f"Which {i}?", "options": ["a", "b", "c"], "answer": "B", "type": "near"}
    | {"images": ["0.jpg"], "scene": f"s{i % 3}", "split": "held_out" if i < 2 else "train"}
    for i in range(24)
  ]
  same = [plain[3], plain[4] | {"answer": 77}]
  other = [{"question": "How long?", "answer": 2, "unit": "s", "images": ["0.jpg"]}]
  mixed = [
    {"question": f"{i}?", "answer": "x", "type": "number", "images": ["0.jpg"]} for i in range(24)
  ]
  path = save_rows(tmp_path / "rows.jsonl", [*plain, *choices, *same, *other, *mixed])
  code, out, _ = run(monkeypatch, capsys, path)
  assert code == 0, "warnings are no bad rows"
  _, page = page_of(path)
  for warning in (
    "2 scenes in both splits: s0, s1",
    "2 rows with the question and the media of an earlier row: rows/4 = rows/55, rows/5 = rows/56",
    "1 question with equal media but different answers: rows/5 = rows/56",
    "type number has answers of several kinds (number, words)",
    "type number has numbers of several units (meters, s)",
    "type near: 100% of the answers are B (chance 33%); the constant answer B scores 1.00",
    "type number: the constant answer x scores 1.00",
  ):
    assert f"warning: {warning}\n" in out
    assert warning in page.words
  assert out.count("warning: ") == 7


@pytest.mark.parametrize(
  ("split", "warning"), [("train", "no row is held out"), ("held_out", "all rows are held out")]
)
def test_a_missing_split_is_a_warning(tmp_path, monkeypatch, capsys, split, warning):
  path = save_rows(tmp_path / "rows.jsonl", numbers(tmp_path, 4, split=split))
  assert f"warning: {warning}" in run(monkeypatch, capsys, path)[1]


def test_rows_that_say_their_split_leave_no_scene_to_chance(tmp_path, monkeypatch, capsys):
  made = numbers(tmp_path, 60)
  made[0]["split"] = "held_out"
  path = save_rows(tmp_path / "rows.jsonl", made)
  assert "59 training rows, 1 held-out rows" in run(monkeypatch, capsys, path)[1]


def test_equal_questions_about_other_media_or_options_are_no_duplicates(
  tmp_path, monkeypatch, capsys
):
  names = save_images(tmp_path, 2)
  box = {"shape": "box", "points": [1, 2, 3, 4], "color": "red"}
  images = [names[0], names[1], {"path": names[0], "marks": [box]}]
  made = [{"question": "How far?", "answer": 1, "images": [image]} for image in images]
  made += [{"question": "How far?", "answer": 1, "videos": [{"frames": names}]}]
  made += [{"question": "How far?", "answer": 1, "videos": [{"frames": names[::-1]}]}]
  choice = {"question": "Which?", "answer": "A", "images": [names[0]]}
  made += [choice | {"options": list(letters)} for letters in ("xy", "xz")]
  path = save_rows(tmp_path / "rows.jsonl", made)
  assert "of an earlier row" not in run(monkeypatch, capsys, path)[1]
  save_rows(path, [*made, made[0] | {"images": [{"path": names[0]}]}])
  assert "rows/1 = rows/8" in run(monkeypatch, capsys, path)[1], "another form of the same image"
  save_rows(path, [*made, choice | {"options": ["y", "x"], "answer": "B"}])
  out = run(monkeypatch, capsys, path)[1]
  assert "rows/6 = rows/8" in out, "options in another order"
  assert "different answers" not in out, "B is now the text that A was"


def test_a_biased_choice_is_told_from_chance(tmp_path, monkeypatch, capsys):
  fair, _ = numbers(tmp_path, 2)
  made = [
    fair | {"question": f"{i}?", "options": ["x", "y"], "answer": "AB"[i % 2]} for i in range(40)
  ]
  path = save_rows(tmp_path / "rows.jsonl", made)
  assert "of the answers are" not in run(monkeypatch, capsys, path)[1]


def test_media_that_cannot_be_decoded_are_shown(tmp_path, monkeypatch, capsys):
  (row,) = numbers(tmp_path, 1)
  (tmp_path / "cut.jpg").write_bytes(jpeg(0)[:1200])
  (tmp_path / "v.mp4").write_bytes(b"no video")
  made = [row, row | {"images": ["cut.jpg"]}, row | {"images": [], "videos": ["v.mp4"]}]
  path = save_rows(tmp_path / "rows.jsonl", made)
  code, out, _ = run(monkeypatch, capsys, path)
  assert code == 0
  assert "the media of 2 of 3 examples cannot be read; rows/2: " in out
  assert "video 1: " in page_of(path)[1].words


def test_a_tfds_folder(tmp_path, monkeypatch, capsys):
  def example(number: int, answer: str) -> dict:
    question = f"How far is {number}, in meters?"
    return {"problem": question, "answer": answer, "images": [jpeg(number), jpeg(9)]}

  train = [example(i, str(i + 1)) for i in range(4)]
  damaged = example(6, "7") | {"images": [b"no image"]}
  test = [example(4, "5"), example(5, "far?3"), damaged]
  folder = save_tfds(tmp_path, {"train": train, "test": test})
  code, out, error = run(monkeypatch, capsys, folder)
  assert code == 2
  assert "--columns=question=FEATURE" in error
  out_folder = tmp_path / "out"
  options = ["--columns=question=problem", f"--out={out_folder}"]
  code, out, _ = run(monkeypatch, capsys, folder, *options)
  assert code == 1
  assert re.search(r"1\.0\.0/test:\d: answer: is 'far\?3'", out), "TFDS orders by a hash"
  assert "row: cannot be read (" in out
  assert "rooms/1.0.0: 5 of 7 rows can be used" in out
  assert "4 training rows, 1 held-out rows" in out
  assert (out_folder / "check.html").read_text().count("data:image/jpeg") == 10
  code, _, error = run(monkeypatch, capsys, folder, "--columns=question=prblem")
  assert (code, error.count("\n")) == (2, 1)


def test_fuzzed_rows_never_give_a_traceback(tmp_path, monkeypatch, capsys):
  path = save_fuzzed_rows(tmp_path / "rows.jsonl", 300)
  code, out, error = run(monkeypatch, capsys, path, "--examples=12")
  assert (code, error) == (1, "")
  listed = (tmp_path / "rows_check" / "bad_rows.txt").read_text().splitlines()
  assert f"{300 - len(listed)} of 300 rows can be used" in out
  page_of(path)


def test_the_schema_is_printed(monkeypatch, capsys):
  code, out, _ = run(monkeypatch, capsys, "--schema")
  assert code == 0
  assert json.loads(out) == row_schema()


def test_the_split_is_that_of_the_defaults():
  defaults = common.get_config().source.files.to_dict()
  ours = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(check.FILES).items()}
  defaults = {name: list(v) if isinstance(v, tuple) else v for name, v in defaults.items()}
  assert ours == defaults | {"check_media": False}, "the collector checks media itself"


def test_progress_is_a_bar_on_a_terminal(tmp_path, capsys):
  path = save_rows(tmp_path / "rows.jsonl", numbers(tmp_path, 3))
  console = Console(force_terminal=True, width=100)
  assert check.check_file(path, tmp_path / "out", 2, check.FILES, console) == 0
  assert "rows" in capsys.readouterr().out


# --- parts -------------------------------------------------------------------------------------


def test_places_of_media_are_in_the_question():
  names = media_names([VideoRef("v"), ImageRef("a"), ImageRef("b"), VideoRef("w")])
  assert names == ["video 1", "image 1", "image 2", "video 2"]
  assert question_pieces("Why?", ["image 1"]) == [("image 1", True), (" Why?", False)]
  found = question_pieces("<video> then <image><image>?", ["video 1", "image 1", "image 2"])
  places = [(name, True) for name in ("video 1", "image 1", "image 2")]
  assert found == [places[0], (" then ", False), *places[1:], ("?", False)]


@pytest.mark.parametrize(
  ("values", "bins", "is_log"),
  [
    ([1, 2, 2, 5], 5, False),
    ([0.5, 1.25, 3], 24, False),
    ([-170, 3, 170], 24, False),
    ([0.01, 1, 1000], 24, True),
    ([1e-38, 3e38], 24, True),
    ([-3e38, 3e38], 24, False),
  ],
)
def test_histograms_have_every_number_in_a_bin(values, bins, is_log):
  value_N = np.array(values, np.float64)
  edges, log = bin_edges(value_N)
  assert edges is not None
  assert (len(edges) - 1, log) == (bins, is_log)
  assert np.histogram(value_N, edges)[0].sum() == len(values)
  assert "<svg" in (histogram(value_N) or "")


@pytest.mark.parametrize("values", [[3.0], [2.5] * 4, [1e30, np.nextafter(1e30, 2e30)]])
def test_equal_numbers_have_no_histogram(values):
  assert histogram(np.array(values)) is None


def test_numbers_are_short():
  shown = [number_text(value) for value in (4.0, 1200.0, 2.345678, 3e20, -0.5)]
  assert shown == ["4", "1,200", "2.346", "3e+20", "-0.5"]
