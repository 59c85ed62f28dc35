"""Numerical3D as a TFDS data set in array_record files, without TensorFlow.

    tfds build --data_dir=DIR           50,000 tasks about procedural rooms, seed 0
    builder = Builder(data_dir=DIR); builder.download_and_prepare()
    tfds.data_source("numerical3d", split="train", data_dir=DIR)

If `parts_folder(DIR)` has settings, they are used: see `spatial_jax.tools.numerical3d`.
"""

import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import shuffle

from spatial_jax.data.tfds_features import FILE_FORMAT, StableWriter, encode_row, task_features
from spatial_jax.datasets.numerical3d.part import PROCEDURAL, SPLITS, BuildSettings, Split
from spatial_jax.datasets.numerical3d.parts import (
  SETTINGS,
  Progress,
  build_parts,
  open_parts,
  parts_folder,
  read_settings,
  read_tasks,
)

NAME, RELEASE = "numerical3d", "1.0.0"
_DESCRIPTION = (
  "Questions about rendered 3D rooms with a number as the answer: counts, distances, sizes. Each"
  " has one to eight images of one room. The answers of each type are spread over a wide range."
)
_DEFAULT = BuildSettings(source=PROCEDURAL, seed=0, tasks=50_000, rooms_per_part=50)


class Builder(tfds.core.GeneratorBasedBuilder):
  """Builds the parts that are missing and writes them as one data set."""

  name = NAME
  VERSION = tfds.core.Version(RELEASE)
  RELEASE_NOTES = {RELEASE: "First version."}  # noqa: RUF012

  def __init__(
    self,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    config: None = None,
    version: str | None = None,
    file_format: str | None = None,
  ):
    super().__init__(
      data_dir=data_dir, config=config, version=version, file_format=file_format or FILE_FORMAT
    )

  def download_and_prepare(  # pyright: ignore
    self,
    *,
    download_dir: epath.PathLike | None = None,
    download_config: tfds.download.DownloadConfig | None = None,
    file_format: str | None = None,
  ) -> None:
    """Builds the data set, then removes the parts. Nothing is downloaded."""
    # TFDS moves the examples of a split to disk above this size, with TensorFlow's file functions.
    shuffle.MAX_MEM_BUFFER_SIZE = sys.maxsize
    super().download_and_prepare(
      download_dir=download_dir, download_config=download_config, file_format=file_format
    )
    shutil.rmtree(self._parts_folder(), ignore_errors=True)

  def _parts_folder(self) -> pathlib.Path:
    return parts_folder(pathlib.Path(self.data_dir).parents[1])

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(builder=self, description=_DESCRIPTION, features=task_features())

  def _split_generators(self, dl_manager: object) -> dict[str, Any]:
    folder = self._parts_folder()
    settings = read_settings(folder) if (folder / SETTINGS).exists() else _DEFAULT
    open_parts(folder, settings)
    build_parts(folder, settings, os.cpu_count() or 1, _ignore)
    return {split: self._generate_examples(folder, settings, split) for split in SPLITS}

  def _generate_examples(
    self, folder: pathlib.Path, settings: BuildSettings, split: Split
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    for row, images in read_tasks(folder, settings, split):
      yield row["id"], encode_row(row, images)

  def _example_writer(self) -> StableWriter:
    return StableWriter()


def _ignore(progress: Progress) -> None:
  """`tfds build` prints its own progress."""
