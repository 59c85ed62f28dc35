"""The numba decorators of the renderer, and a compilation cache that notices every change of a kernel."""

import pathlib
import zlib

import numba

_SOURCES = ("raycast.py", "shading.py")


def _cache_folder() -> str:
  """A folder named by the text of all kernels.

  Numba recompiles a function when its own file changed, not when a function that it inlined from another
  file did; with the text in the name a stale picture cannot come out of the cache.
  """
  here = pathlib.Path(__file__).parent
  digest = zlib.crc32(b"".join((here / name).read_bytes() for name in _SOURCES))
  base = pathlib.Path(numba.config.CACHE_DIR or here / "__pycache__")
  return str(base / f"numba-{digest:08x}")


numba.config.CACHE_DIR = _cache_folder()

kernel = numba.njit(cache=True, nogil=True, error_model="numpy")
# What runs per pixel is inlined: a call that passes arrays costs more than the arithmetic in it.
inlined = numba.njit(cache=True, nogil=True, error_model="numpy", inline="always")
