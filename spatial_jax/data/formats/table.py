"""All foreign formats."""

from collections.abc import Collection

from spatial_jax.config import suggestion
from spatial_jax.data.formats.base import Format
from spatial_jax.data.formats.benchmarks import MMSI, SAT, Blink, ViewSpatial
from spatial_jax.data.formats.easyr1 import EasyR1
from spatial_jax.data.formats.mindcube import MindCube
from spatial_jax.data.formats.phyx import PhyX
from spatial_jax.data.formats.r1v import R1V
from spatial_jax.data.formats.sharegpt import ShareGPT
from spatial_jax.data.formats.spacer import Spacer151k, VideoR1
from spatial_jax.data.formats.spar7m import Spar7m
from spatial_jax.data.formats.spatialladder import SpatialLadder26k, SPBench
from spatial_jax.data.formats.vilasr import ViLaSR
from spatial_jax.data.formats.vlm_r1 import VlmR1
from spatial_jax.data.formats.vsi import Vsi100k, Vsi590k, VsiBench
from spatial_jax.errors import DataError

FORMATS: tuple[Format, ...] = (
  EasyR1(), ShareGPT(), R1V(), VlmR1(), ViLaSR(), Vsi100k(), Vsi590k(), Spar7m(), Spacer151k(),
  VideoR1(), SpatialLadder26k(), MindCube(), PhyX(), VsiBench(), SAT(), Blink(), MMSI(), SPBench(),
  ViewSpatial(),
)  # fmt: skip


def find_format(name: str) -> Format:
  """The format of that name.

  Raises:
    DataError: naming the formats.
  """
  found = next((one for one in FORMATS if one.name == name), None)
  if found is None:
    advice = suggestion(name, [one.name for one in FORMATS]).replace("keys:", "formats:")
    raise DataError(f"--format={name} is unknown; {advice}")
  return found


def fitting_formats(columns: Collection[str]) -> list[Format]:
  """The formats that the columns fit, those with more columns first."""
  found = [one for one in FORMATS if one.fits(columns)]
  return sorted(found, key=lambda one: -one.fits(columns))
