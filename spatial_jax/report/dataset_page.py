"""Two HTML files about a data set: statistics of its tasks, and examples with their images.

    tfds.data_source ──► one summary per task ──► index.html
                    └──► a few tasks of each type ──► examples.html

Both load nothing from outside and run no script.
"""

import base64
import dataclasses
import io
import math
import pathlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter
from PIL import Image

from spatial_jax.data.tfds_features import decode_row
from spatial_jax.report import svg, wording
from spatial_jax.report.dataset_statistics import (
  TaskSummary,
  TypeStatistics,
  summarise,
  type_statistics,
)
from spatial_jax.report.drawings import ImageView
from spatial_jax.workdir import write_text

INDEX, EXAMPLES = "index.html", "examples.html"

_HERE = pathlib.Path(__file__).parent
_BINS = 24
_PANEL_IN = (3.1, 1.7)
_UNITS = {"m^2": "m²"}


class Examples(Protocol):
  """A split, as `tfds.data_source` returns it."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Mapping[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class DatasetAbout:
  """The head of the page."""

  title: str
  summary: str
  facts: tuple[tuple[str, str], ...]  # ("command", "python -m ..."), ...


class _Example(NamedTuple):
  """A task with its images."""

  split: str
  row: Mapping[str, Any]
  images: list[ImageView]
  unit: str


def write_pages(
  out: pathlib.Path, splits: Mapping[str, Examples], about: DatasetAbout, examples: int
) -> None:
  """Writes `index.html` and `examples.html`.

  Args:
    out: folder of the pages.
    splits: name -> examples with `tfds_features.task_features`.
    about: head of the pages.
    examples: number of tasks on the second page, in equal parts of each type.
  """
  tasks = [
    summarise(name, i, decode_row(split[i]))
    for name, split in splits.items()
    for i in range(len(split))
  ]
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_HERE),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {"type_name": wording.type_name}
  css = Markup((_HERE / "report.css").read_text(encoding="utf-8"))
  shown = [_example(task, splits) for task in choose_examples(tasks, examples)]
  page = environment.get_template("dataset_examples.html.jinja")
  write_text(out / EXAMPLES, page.render(about=about, examples=shown, css=css, index=INDEX))
  types = type_statistics(tasks)
  page = environment.get_template("dataset.html.jinja").render(
    about=about,
    figures=_key_figures(tasks),
    splits={name: len(split) for name, split in splits.items()},
    types=types,
    units=_UNITS,
    histograms=[(one, _histogram(one)) for one in types],
    images_figure=_images_figure(tasks),
    css=css,
    examples_file=EXAMPLES,
  )
  write_text(out / INDEX, page)


def choose_examples(tasks: Sequence[TaskSummary], count: int) -> list[TaskSummary]:
  """About `count` tasks: equally many of each type, with few and with many images, large answers
  and small ones.
  """
  groups: dict[str, list[TaskSummary]] = defaultdict(list)
  for task in tasks:
    groups[task.question_type].append(task)
  chosen = []
  for name in sorted(groups):
    group = groups[name]
    wanted = min(len(group), math.ceil(count / len(groups)))
    by_images = sorted(group, key=lambda task: task.images)  # stable: equal data, equal page
    chosen += [by_images[int((i + 0.5) * len(group) / wanted)] for i in range(wanted)]
  return chosen


def _example(task: TaskSummary, splits: Mapping[str, Examples]) -> _Example:
  row = decode_row(splits[task.split][task.number])
  boxes: dict[int, list[tuple[float, float, float, float]]] = defaultdict(list)
  for box in row["extra"].get("boxes", ()):
    x1, y1, x2, y2 = box["box"]
    boxes[box["image"]].append((x1, y1, x2 - x1, y2 - y1))
  images = [_image_view(content, i + 1, boxes[i]) for i, content in enumerate(row["images"])]
  return _Example(task.split, row, images, _UNITS.get(task.unit, task.unit))


def _image_view(
  content: bytes, number: int, boxes: list[tuple[float, float, float, float]]
) -> ImageView:
  with Image.open(io.BytesIO(content)) as image:
    kind, (width, height) = (image.format or "jpeg").lower(), image.size
  uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
  return ImageView(number, uri, width, height, boxes)


def _key_figures(tasks: Sequence[TaskSummary]) -> list[tuple[str, str, str]]:
  """(name, value, remark) of the numbers at the head of the page."""
  rooms = Counter(task.scene for task in tasks)
  split_of = {task.scene: task.split for task in tasks}
  shared = len({(task.scene, task.split) for task in tasks}) - len(rooms)
  held_out = sum(split != "train" for split in split_of.values())
  images = [task.images for task in tasks]
  size = sum(task.image_bytes for task in tasks)
  apart = f"{held_out:,} held out, {shared or 'none'} in both splits"
  return [
    ("tasks", f"{len(tasks):,}", f"{len({task.question_type for task in tasks})} types"),
    ("rooms", f"{len(rooms):,}", apart),
    ("tasks per room", f"{len(tasks) / len(rooms):.1f}", f"at most {max(rooms.values())}"),
    ("images per task", f"{np.mean(images):.1f}", f"{min(images)} to {max(images)}"),
    ("images", f"{size / 1e9:.2f} GB", f"{size / sum(images) / 1e3:.1f} kB each"),
  ]


def _histogram(statistics: TypeStatistics) -> Markup:
  """The true answers on a logarithmic axis; whole numbers get one bar each."""
  truth_Z = statistics.truth_Z
  low, high = float(truth_Z.min()), float(truth_Z.max())
  if statistics.unit == "count":
    edges = np.arange(low, high + 2) - 0.5
  else:
    edges = np.geomspace(low, max(high, low * 1.01), _BINS + 1)

  def draw(axes: Axes) -> None:
    axes.hist(truth_Z, bins=edges.tolist(), color=svg.WASH, edgecolor="white", linewidth=0.5)
    axes.axvline(statistics.best.value, color=svg.ACCENT, linewidth=1.2)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    ticks = _ticks(low, high)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel(_UNITS.get(statistics.unit, statistics.unit))
    axes.grid(axis="x", visible=False)

  return svg.axes_svg(draw, *_PANEL_IN, f"true answers of {statistics.name}")


def _ticks(low: float, high: float) -> list[float]:
  """1, 2, 5, 10, ... within the range."""
  decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
  ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
  return [tick for tick in ticks if low <= tick <= high]


def _images_figure(tasks: Sequence[TaskSummary]) -> Markup:
  counts = Counter(task.images for task in tasks)

  def draw(axes: Axes) -> None:
    axes.bar(list(counts), list(counts.values()), color=svg.WASH, width=0.8)
    axes.set_xticks(sorted(counts))
    axes.set_xlabel("images")
    axes.set_ylabel("tasks")
    axes.grid(axis="x", visible=False)

  return svg.axes_svg(draw, 4.6, 2.0, "tasks per number of images")
