"""Files of foreign rows: read piece by piece, converted as a whole, reported row by row."""

import json
import pathlib
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.data.formats import readers
from spatial_jax.data.formats.readers import find_files, read_columns, read_rows
from spatial_jax.data.formats.table import find_format
from spatial_jax.data.media import read_pixels
from spatial_jax.data.rows import RowProblem, task_of_row
from spatial_jax.errors import DataError
from spatial_jax.tools import build
from spatial_jax.tools.convert import convert_files, summary_of
from tests.format_fixtures import png, write_images, write_parquet, write_sample

GOOD = {"problem": "How many?", "solution": "<answer>3</answer>", "image": "a.png"}


def lines(*rows) -> str:
  return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def convert(path: pathlib.Path, out: pathlib.Path, name="r1v", media=None, limit=None, split=None):
  """The result and the rows."""
  found = convert_files(find_format(name), path, out, media, limit, split)
  return found, [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def source(tmp_path):
  """Writes rows.jsonl, beside the image that its rows name."""
  write_images(tmp_path, "a.png")

  def write(*rows) -> pathlib.Path:
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(*rows))
    return path

  return write


# --- readers -------------------------------------------------------------------------------------

VALUES = st.recursive(
  st.none() | st.integers() | st.text(alphabet='a"\\ ,[]{}é', max_size=4),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
  ),
  max_leaves=8,
)


@settings(max_examples=60)
@given(st.lists(VALUES, max_size=6), st.integers(1, 40), st.sampled_from([None, 1]))
def test_a_json_list_is_read_in_pieces_of_any_size(tmp_path_factory, rows, chunk, indent):
  path = tmp_path_factory.mktemp("json") / "rows.json"
  path.write_text(json.dumps(rows, indent=indent), encoding="utf-8")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(readers, "_CHUNK", chunk)
    assert [row.value for row in read_rows(path)] == rows


def test_a_json_list_that_is_cut_off_gives_its_rows_and_one_problem(tmp_path):
  path = tmp_path / "rows.json"
  path.write_text(json.dumps([GOOD, GOOD])[:-20])
  first, second = read_rows(path)
  assert first.value == GOOD
  assert isinstance(second.value, RowProblem)
  assert (first.number, second.number) == (1, 2)


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
  path = tmp_path / "rows.json"
  path.write_text(lines(GOOD, "", GOOD))
  assert [(row.number, row.value) for row in read_rows(path)] == [(1, GOOD), (3, GOOD)]


@pytest.mark.parametrize("damage", ["{", "not json", '{"a": NaN}', "\ufffe", "[" * 100_000])
def test_a_damaged_line_is_one_problem(tmp_path, damage):
  path = tmp_path / "rows.jsonl"
  path.write_text(lines(GOOD, damage, GOOD))
  values = [row.value for row in read_rows(path)]
  assert values[0] == values[2] == GOOD
  assert isinstance(values[1], RowProblem)


def test_bytes_that_are_not_utf_8_are_one_problem(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_bytes(lines(GOOD).encode() + b'{"problem": "\xff"}\n')
  assert isinstance(list(read_rows(path))[1].value, RowProblem)


def test_a_table_row_with_too_many_cells_is_a_problem_and_missing_cells_are_missing(tmp_path):
  path = tmp_path / "rows.tsv"
  path.write_text("a\tb\n1\n1\t2\t3\n\n4\t5\n")
  values = [row.value for row in read_rows(path)]
  assert values[0] == {"a": "1"}
  assert isinstance(values[1], RowProblem)
  assert values[2] == {"a": "4", "b": "5"}
  assert read_columns(path) == ["a", "b"]


def test_cells_longer_than_the_default_limit_are_read(tmp_path):
  path = tmp_path / "rows.tsv"
  path.write_text(f"a\n{'x' * 300_000}\n")
  assert len(next(read_rows(path)).value["a"]) == 300_000


def test_a_damaged_parquet_file_is_one_line(tmp_path):
  path = tmp_path / "rows.parquet"
  write_parquet(path, [GOOD] * 3)
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(DataError, match=r"rows\.parquet is not a readable parquet file"):
    convert(path, tmp_path / "out")


def test_parquet_needs_an_extra_that_the_error_names(tmp_path, monkeypatch):
  path = write_sample("r1v.parquet", tmp_path)
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(DataError, match=r"needs the extra data: pip install 'spatial_jax\[data\]'"):
    convert(path, tmp_path / "out")


def test_the_files_of_a_folder_are_found_in_order(tmp_path):
  for name in ("b.jsonl", "a/c.json", "a/x.txt", "d.parquet"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
  names = [p.relative_to(tmp_path).as_posix() for p in find_files(tmp_path)]
  assert names == ["a/c.json", "b.jsonl", "d.parquet"]


@pytest.mark.parametrize(
  ("name", "message"), [("x.txt", "must be a folder or one of"), ("no.jsonl", "no.jsonl")]
)
def test_an_input_that_cannot_be_read_is_one_line(tmp_path, name, message):
  (tmp_path / "x.txt").write_text("")
  with pytest.raises(DataError, match=message):
    convert(tmp_path / name, tmp_path / "out")


# --- rows ----------------------------------------------------------------------------------------


def test_bad_rows_are_counted_and_the_first_are_listed(source, tmp_path):
  bad = [GOOD | {"solution": ""} for _ in range(21)]
  found, rows = convert(source(GOOD, "{", *bad, GOOD), tmp_path / "out")
  assert len(rows) == found.rows == 2
  text = summary_of(found).splitlines()
  assert text[0] == "22 of 24 rows could not be converted (solution 21, row 1)"
  assert text[1].startswith("  rows.jsonl:2: row: is not JSON")
  assert text[2].startswith("  rows.jsonl:3: solution: is missing; the row has problem, image")
  assert len(text) == 22
  assert text[-1] == "  and 2 more"


def test_if_no_row_can_be_converted_nothing_is_written(source, tmp_path):
  with pytest.raises(DataError, match=r"no row of .* could be converted\n1 of 1 rows"):
    convert(source(GOOD | {"solution": [1]}), tmp_path / "out")
  assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
  ("rows", "message"), [((), "is empty$"), (("", ""), "no row of .* could be converted$")]
)
def test_a_file_without_rows_is_one_line(source, tmp_path, rows, message):
  with pytest.raises(DataError, match=message):
    convert(source(*rows), tmp_path / "out")


def test_rows_with_the_id_of_another_row_are_reported(tmp_path):
  path = write_sample("mindcube_train.jsonl", tmp_path)
  path.write_text(path.read_text() * 2)
  found, rows = convert(path, tmp_path / "out", "mindcube")
  assert len(rows) == 1
  assert found.bad[0].reason == ("is 'mindcube/among_group693_q2_5_2' as in mindcube_train.jsonl:1")


def test_files_of_a_folder_that_do_not_fit_are_left_out_with_a_note(tmp_path):
  folder = tmp_path / "set"
  folder.mkdir()
  write_sample("spacer151k.jsonl", folder)
  (folder / "cognitive_map.jsonl").write_text(lines({"video_id": "x", "cognitive_map": {}}))
  found, rows = convert(folder, tmp_path / "out", "spacer151k")
  assert len(rows) == 2
  assert found.notes[0].startswith(
    "left out: cognitive_map.jsonl has the columns video_id, cognitive_map; spacer151k needs"
  )


def test_a_general_format_says_that_a_special_one_reads_more(tmp_path):
  found, _ = convert(write_sample("spar7m.jsonl", tmp_path), tmp_path / "out", "vlm_r1")
  assert "spar7m.jsonl has the columns of --format=spar7m, which reads more" in found.notes


def test_the_limit_counts_written_rows(source, tmp_path):
  found, rows = convert(source("{", GOOD, GOOD, GOOD), tmp_path / "out", limit=2)
  assert (found.rows, len(rows), found.bad_fields.total()) == (2, 2, 1)


@pytest.mark.parametrize("split", [None, "train", "held_out"])
def test_the_split_is_that_of_the_command(source, tmp_path, split):
  _, rows = convert(source(GOOD), tmp_path / "out", split=split)
  assert rows[0].get("split") == split


def test_a_benchmark_is_never_a_training_split(tmp_path):
  path = write_sample("vsi_bench.parquet", tmp_path)
  with pytest.raises(DataError, match="vsi_bench is a benchmark"):
    convert(path, tmp_path / "out", "vsi_bench", split="train")


def test_an_id_that_was_made_is_not_one_of_the_source(tmp_path):
  row = {
    "dataset": "scannet", "scene_name": "scene0000_00", "question_type": "object_counting",
    "question": "How many chairs are there?", "ground_truth": "3",
  }  # fmt: skip
  path = tmp_path / "rows.jsonl"
  path.write_text(lines({"id": 2} | row, row))
  found, rows = convert(path, tmp_path / "vsi-bench", "vsi_bench", tmp_path)
  assert [row["id"] for row in rows] == ["vsi-bench/2"]
  assert [bad.field for bad in found.bad] == ["id"]


def test_an_answer_that_no_reward_can_score_is_reported(source, tmp_path):
  zero = GOOD | {"solution": "<answer>0</answer>"}
  found, written = convert(source(GOOD, zero), tmp_path / "out")
  assert len(written) == 1
  (bad,) = found.bad
  assert str(bad).startswith("rows.jsonl:2: answer: the truth is 0")


def test_out_is_a_folder(source, tmp_path):
  with pytest.raises(DataError, match=r"rows\.jsonl is the folder to write"):
    convert(source(GOOD), tmp_path / "rows.jsonl")


def test_rows_that_exist_are_not_overwritten(source, tmp_path):
  path = source(GOOD)
  convert(path, tmp_path / "out")
  with pytest.raises(DataError, match=r"rows\.jsonl exists; choose another --out"):
    convert(path, tmp_path / "out")


def test_an_interrupted_conversion_leaves_no_rows(source, tmp_path):
  def stop(fraction):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    convert_files(find_format("r1v"), source(GOOD), tmp_path / "out", None, None, None, stop)
  assert not list((tmp_path / "out").iterdir())


def test_the_progress_rises_to_the_end(source, tmp_path):
  fractions = []
  convert_files(
    find_format("r1v"), source(*[GOOD] * 5), tmp_path / "out", None, None, None, fractions.append
  )
  assert fractions == sorted(fractions)
  assert fractions[-1] == 1.0


# --- media ---------------------------------------------------------------------------------------


def test_an_embedded_image_is_written_once(tmp_path):
  path = tmp_path / "rows.parquet"
  write_parquet(path, [GOOD | {"image": {"bytes": png(n)}} for n in (1, 1, 2)])
  _, rows = convert(path, tmp_path / "out")
  names = [row["images"][0] for row in rows]
  assert names[0] == names[1] != names[2]
  assert re.fullmatch(r"media/[0-9a-f]{16}\.png", names[0])
  assert sorted(p.name for p in (tmp_path / "out" / "media").iterdir()) == sorted(
    name.removeprefix("media/") for name in set(names)
  )


def test_paths_are_absolute_outside_the_folder_and_relative_in_it(source, tmp_path):
  path, out = source(GOOD), tmp_path / "out"
  _, rows = convert(path, out)
  assert rows[0]["images"] == [str(tmp_path / "a.png")]
  _, rows = convert(path, tmp_path / "other", media=tmp_path)
  assert rows[0]["images"] == [str(tmp_path / "a.png")]
  inside = tmp_path / "inside"
  write_images(inside / "images", "a.png")
  (inside / "source.jsonl").write_text(lines(GOOD | {"image": "images/a.png"}))
  _, rows = convert(inside / "source.jsonl", inside)
  assert rows[0]["images"] == ["images/a.png"]


def test_media_that_do_not_exist_are_a_note(source, tmp_path):
  found, _ = convert(source(GOOD | {"image": "no.png"}, GOOD), tmp_path / "out")
  assert found.notes[0].startswith("1 media files of the first 2 rows do not exist, the first is ")


def test_a_media_folder_that_does_not_exist_is_refused(source, tmp_path):
  with pytest.raises(DataError, match=r"--media=.* is not a folder"):
    convert(source(GOOD), tmp_path / "out", media=tmp_path / "no")


def test_marks_are_drawn_where_the_source_says(tmp_path):
  write_images(tmp_path, *(f"scene0261_00/image_color/{n}.png" for n in (543, 544)))
  out = tmp_path / "out"
  _, rows = convert(write_sample("spar7m.jsonl", tmp_path), out, "spar7m")
  task = task_of_row(rows[0], "x", "x", out)
  pixels = read_pixels(task.media[0])
  assert pixels[5, 20].tolist() == [255, 0, 0]  # (500, 250) of 1000 in 40 x 20 pixels
  assert pixels[19, 30].tolist() == [0, 0, 255]


def test_marks_on_an_image_that_does_not_exist_are_reported(tmp_path):
  found, rows = convert(write_sample("spar7m.jsonl", tmp_path), tmp_path / "out", "spar7m")
  assert len(rows) == 1  # the row without marks
  assert all(bad.field.startswith("images[") for bad in found.bad)
  assert "its marks need its size; set --media" in found.bad[0].reason


# --- the command ---------------------------------------------------------------------------------


def run(**values) -> None:
  build.main([f"--{name}={value}" for name, value in values.items()])


def test_the_command_prints_counts_and_bad_rows(source, tmp_path, capsys):
  path, out = source(GOOD, GOOD | {"solution": "[bold]red"}, GOOD | {"image": 5}), tmp_path / "out"
  run(format="r1v", input=path, out=out)
  text = capsys.readouterr().out
  assert re.search(r"number +number +1\b", text)
  assert re.search(r"words +words +1\b", text)
  assert "1 of 3 rows could not be converted (image 1)" in text
  assert "rows.jsonl:3: image: must be a text, got 5" in text
  assert f"wrote 2 rows to {out}" in text.replace("\n", "")


def test_the_command_needs_a_format(tmp_path):
  with pytest.raises(ValueError, match="--format is missing: one of easyr1, sharegpt"):
    run(input=tmp_path, out=tmp_path)
