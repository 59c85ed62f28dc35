"""The numba decorators of the renderer, and a cache that notices every change of a kernel."""

import pathlib
import zlib

from numba import njit
from numba.core import config

_SOURCES = ("raycast.py", "shading.py")


def _cache_folder() -> str:
  """A folder named by the text of all kernels.

  Numba recompiles a function when its own file changed, not when a function that it inlined from
  another file did; with the text in the name no stale kernel can come out of the cache.
  """
  here = pathlib.Path(__file__).parent
  digest = zlib.crc32(b"".join((here / name).read_bytes() for name in _SOURCES))
  base = pathlib.Path(config.CACHE_DIR or here / "__pycache__")  # pyright: ignore
  return str(base / f"numba-{digest:08x}")


config.CACHE_DIR = _cache_folder()  # pyright: ignore

kernel = njit(cache=True, nogil=True, error_model="numpy")
# What runs per pixel is inlined: a call that passes arrays costs more than the arithmetic in it.
inlined = njit(cache=True, nogil=True, error_model="numpy", inline="always")
