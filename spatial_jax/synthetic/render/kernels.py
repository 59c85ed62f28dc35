"""The numba decorators of the renderer, with a cache keyed by the source of all kernels."""

import pathlib
import zlib

from numba import njit
from numba.core import config

_SOURCES = ("raycast.py", "shading.py")


def _cache_folder() -> str:
  """A folder named by a checksum of the source of all kernels.

  Numba recompiles a function if its own file changes, but not if the file of an inlined function
  changes. With the checksum in the name, the cache never returns a stale kernel.
  """
  here = pathlib.Path(__file__).parent
  digest = zlib.crc32(b"".join((here / name).read_bytes() for name in _SOURCES))
  base = pathlib.Path(config.CACHE_DIR or here / "__pycache__")  # pyright: ignore
  return str(base / f"numba-{digest:08x}")


config.CACHE_DIR = _cache_folder()  # pyright: ignore

kernel = njit(cache=True, nogil=True, error_model="numpy")
# Functions that run per pixel are inlined: a call with array arguments costs more than their
# arithmetic.
inlined = njit(cache=True, nogil=True, error_model="numpy", inline="always")
