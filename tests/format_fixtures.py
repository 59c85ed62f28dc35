"""Samples of foreign data sets: the published schemas with made-up rows."""

import base64
import io
import json
import pathlib
from typing import Any

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

SAMPLES = pathlib.Path(__file__).parent / "data" / "formats"
SIZE = (40, 20)  # width and height of all images

# Each sample file, without ".json" of a parquet file that the test builds, and its format.
FILES = {
  "easyr1.parquet": "easyr1",
  "easyr1_verl.parquet": "easyr1",
  "sharegpt.json": "sharegpt",
  "r1v.parquet": "r1v",
  "vlm_r1.jsonl": "vlm_r1",
  "vilasr_sft.json": "vilasr",
  "vilasr_rl.jsonl": "vilasr",
  "vilasr_eval.json": "vilasr",
  "vsi100k.jsonl": "vsi100k",
  "vsi590k.jsonl": "vsi590k",
  "spar7m.jsonl": "spar7m",
  "spacer151k.jsonl": "spacer151k",
  "video_r1.json": "video_r1",
  "spatialladder26k.jsonl": "spatialladder26k",
  "spbench.parquet": "spbench",
  "mindcube_train.jsonl": "mindcube",
  "mindcube_tinybench.jsonl": "mindcube",
  "phyx.parquet": "phyx",
  "phyx_mc.parquet": "phyx",
  "phyx_mini.tsv": "phyx",
  "vsi_bench.parquet": "vsi_bench",
  "vsi_bench_debiased.tsv": "vsi_bench",
  "sat.parquet": "sat",
  "blink.parquet": "blink",
  "mmsi.parquet": "mmsi",
  "viewspatial.json": "viewspatial",
}


def png(number: int) -> bytes:
  """A small image; numbers give different ones."""
  pixels = np.full((SIZE[1], SIZE[0], 3), 40 * number, np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "png")
  return file.getvalue()


def with_images(value: Any) -> Any:
  """The sample with images: "png:1" is the contents of a file, "base64:1" the same in base64."""
  if isinstance(value, list):
    return [with_images(item) for item in value]
  if isinstance(value, dict):
    return {name: with_images(item) for name, item in value.items()}
  kind, _, number = value.partition(":") if isinstance(value, str) else ("", "", "")
  if kind == "png":
    return png(int(number))
  return base64.b64encode(png(int(number))).decode() if kind == "base64" else value


def sample_rows(name: str) -> list[Any]:
  """The rows of a sample that is JSON or a parquet table."""
  if name.endswith(".jsonl"):
    return [json.loads(line) for line in (SAMPLES / name).read_text().splitlines()]
  text = (SAMPLES / (f"{name}.json" if name.endswith(".parquet") else name)).read_text()
  return with_images(json.loads(text))


def write_sample(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Writes a sample into a folder in the form in which it is published."""
  path = folder / name
  if name.endswith(".parquet"):
    write_parquet(path, sample_rows(name))
  elif name.endswith(".tsv"):
    text = (SAMPLES / name).read_text()
    for number in (1, 2):
      text = text.replace(f"base64:{number}", with_images(f"base64:{number}"))
    path.write_text(text)
  else:
    path.write_bytes((SAMPLES / name).read_bytes())
  return path


def write_parquet(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """Writes rows as a parquet table."""
  parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_images(folder: pathlib.Path, *names: str) -> None:
  """Writes an image under each of the names."""
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(png(1))
