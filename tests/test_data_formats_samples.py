"""Each foreign format: the exact rows of a sample, columns of other formats, broken rows."""

import hashlib
import json
import math
import pathlib
import random
import re
from typing import Any

import pytest

from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.fields import Fields
from spatial_jax.data.formats.readers import read_columns
from spatial_jax.data.formats.table import FORMATS, find_format, fitting_formats
from spatial_jax.data.rows import RowProblem, task_of_row
from spatial_jax.errors import DataError
from spatial_jax.tools.convert import convert_files
from tests.format_fixtures import FILES, SAMPLES, png, sample_rows, write_images, write_sample

SPAR_IMAGES = ("scene0261_00/image_color/543.png", "scene0261_00/image_color/544.png")
KINDS = ("number", "choice", "words")


def expected_rows(name: str) -> list[dict[str, Any]]:
  """The written-down rows; "MEDIA/" is the folder of --media, "png:1" a file of that image."""
  path = SAMPLES / "expected" / f"{name.rsplit('.', 1)[0]}.jsonl"
  return [json.loads(line) for line in path.read_text().splitlines()]


def named(value: Any, media: str) -> Any:
  """A converted row with the names of `expected_rows`."""
  text = json.dumps(value).replace(f"{media}/", "MEDIA/")
  for number in (1, 2):
    digest = hashlib.sha256(png(number)).hexdigest()[:16]
    text = text.replace(f"media/{digest}.png", f"png:{number}")
  return json.loads(text)


@pytest.mark.parametrize("name", FILES)
def test_the_rows_of_each_sample_are_exactly_these(tmp_path, name):
  media, out = tmp_path / "media_folder", tmp_path / "out"
  write_images(media, *SPAR_IMAGES)
  found = convert_files(
    find_format(FILES[name]), write_sample(name, tmp_path), out, media, None, None
  )
  rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
  assert [named(row, str(media)) for row in rows] == expected_rows(name)
  assert found.rows == len(rows)
  assert not found.bad
  for row in rows:
    for image in row.get("images", ()):
      if isinstance(image, str) and image.startswith("media/"):
        assert (out / image).read_bytes() in (png(1), png(2))


def test_all_formats_have_a_sample_and_different_names():
  names = [one.name for one in FORMATS]
  assert sorted(names) == sorted(set(FILES.values()))
  assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", FILES)
def test_the_columns_of_each_sample_fit_its_format(tmp_path, name):
  columns = read_columns(write_sample(name, tmp_path))
  fitting = fitting_formats(columns)
  own = find_format(FILES[name])
  assert own in fitting
  assert own.fits(columns) == fitting[0].fits(columns) or own.general


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_file_of_another_schema_is_refused_in_one_line(tmp_path, fmt):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"alpha": 1, "beta": 2}\n')
  with pytest.raises(DataError) as error:
    convert_files(fmt, path, tmp_path / "out", None, None, None)
  text = str(error.value)
  assert text.startswith(f"rows.jsonl has the columns alpha, beta; {fmt.name} needs {fmt.needed()}")
  assert "\n" not in text
  assert not (tmp_path / "out").exists()


def test_the_refusal_names_the_format_that_fits(tmp_path):
  path = write_sample("mindcube_train.jsonl", tmp_path)
  with pytest.raises(DataError, match="they fit --format=mindcube"):
    convert_files(find_format("sat"), path, tmp_path / "out", None, None, None)


def test_an_unknown_format_is_refused_with_a_suggestion():
  with pytest.raises(DataError, match="--format=vsibench is unknown; did you mean vsi_bench"):
    find_format("vsibench")


# --- broken rows ---------------------------------------------------------------------------------

BROKEN: tuple[Any, ...] = (
  None, "", "  ", 0, -1, 3.5, 10**40, float("nan"), float("inf"), True, [], {}, [None], [[]],
  [1, "a"], {"a": None}, {"bytes": b""}, {"bytes": "x", "path": None}, b"\xff\xfe", "\ud800", "\0",
  "A", "Z", "(B)", "1e999", "9" * 100, "<image>", "<video><video>", "<answer></answer>",
  "https://x.org/a.jpg", "not base64!", "data:image/png;base64,@@", "A" * 5000, "\u0661\u0662",
  [{"from": "human"}], [{"role": "user", "content": [{"type": "image"}]}], [[1001, 2]], [[1, 2]],
  [[math.nan, 1]], [[0, 99]], {"ground_truth": []}, "[", "['a', 'b'", "[\"a\", 5]", "A. x\nB.",
)  # fmt: skip


def is_row(row: Any, tmp_path) -> bool:
  """Whether the fields of a converted row have our types and our reader accepts it."""
  plain = {name: value for name, value in row.items() if value not in (None, [], {})}
  plain["images"] = [
    image["path"] if isinstance(image, dict) else image for image in row.get("images", ())
  ]
  task_of_row(plain, "row", "test", tmp_path)
  assert isinstance(row["question"], str)
  assert row["question"].strip()
  assert row["kind"] in KINDS
  assert isinstance(row["answer"], str | int | float)
  assert not isinstance(row["answer"], bool)
  if row["kind"] == "number":
    assert math.isfinite(row["answer"])
  if row["kind"] == "choice":
    letters = [option[:2] for option in row["options"]]
    assert letters == [f"{chr(ord('A') + i)}." for i in range(len(letters))]
    assert f"{row['answer']}." in letters
  json.dumps(row.get("extra", {}), allow_nan=False).encode()
  json.dumps(row, default=str, ensure_ascii=False).encode()
  return True


def mutated(row: Any, generator: random.Random) -> Any:
  """The row with one value, at any depth, replaced or removed."""
  if isinstance(row, dict) and row and generator.random() < 0.9:
    name = generator.choice(sorted(row))
    if generator.random() < 0.15:
      return {key: value for key, value in row.items() if key != name}
    return row | {name: mutated(row[name], generator)}
  if isinstance(row, list) and row and generator.random() < 0.7:
    place = generator.randrange(len(row))
    return [*row[:place], mutated(row[place], generator), *row[place + 1 :]]
  if isinstance(row, str) and row and generator.random() < 0.3:
    cut = generator.randrange(len(row))
    return (
      row[:cut] + generator.choice(["", "\n", "A. ", "\ud800", "<image>", "1"]) + row[cut + 1 :]
    )
  return generator.choice(BROKEN)


def converted_or_problem(fmt: Format, row: Any, name: str) -> dict[str, Any] | RowProblem:
  try:
    return fmt.convert(Fields(row, name))
  except RowProblem as problem:
    return problem


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith(".tsv")])
def test_a_mutated_row_converts_or_is_reported(tmp_path, name):
  fmt, generator = find_format(FILES[name]), random.Random(name)
  originals, outcomes = sample_rows(name), {True: 0, False: 0}
  for _ in range(400):
    row = generator.choice(originals)
    for _ in range(generator.choice((1, 1, 2, 4))):
      row = mutated(row, generator)
    converted = converted_or_problem(fmt, row, name)
    if isinstance(converted, RowProblem):
      assert converted.field
      assert converted.reason
      outcomes[False] += 1
      continue
    try:
      outcomes[is_row(converted, tmp_path)] += 1
    except RowProblem:  # the reader refuses it, and the conversion reports that
      outcomes[False] += 1
  assert min(outcomes.values()) > 20


@pytest.mark.parametrize("name", FILES)
def test_each_missing_column_is_reported_with_its_name_or_is_optional(name):
  if name.endswith(".tsv"):
    return
  fmt = find_format(FILES[name])
  for row in sample_rows(name):
    for column in row:
      rest = {key: value for key, value in row.items() if key != column}
      converted = converted_or_problem(fmt, rest, name)
      if isinstance(converted, RowProblem):
        known = {"image", *row, *re.findall(r"\w+", fmt.needed())}
        assert converted.field.partition("[")[0] in known


def test_the_documentation_lists_all_formats():
  text = (pathlib.Path(__file__).parent.parent / "docs" / "formats.md").read_text()
  listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
  assert sorted(listed) == sorted(one.name for one in FORMATS)
