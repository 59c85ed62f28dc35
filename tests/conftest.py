"""Strict JAX for every test: 8 CPU devices, no implicit promotion, warnings are errors."""

import os
import pathlib
import zlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time of the tests is compilation, which takes half as long without LLVM's passes.
# Continuous integration runs the numeric tests with all passes as well.
os.environ["XLA_FLAGS"] = (
  "--xla_backend_optimization_level=0 "
  + os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
)

import jax
import pytest
from hypothesis import settings

# Without a deadline: the time of a test depends on the other work on the machine.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
  "jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".jax_cache")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(autouse=True, scope="module")
def few_maps():
  """Compiled programs are mapped memory; Linux gives a process 65,530 maps, then XLA crashes."""
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
    jax.clear_caches()


def pytest_collection_modifyitems(config, items):
  """Continuous integration runs a third of the slow tests: SPATIAL_JAX_SLOW_THIRD is 0, 1 or 2.

  Those with `slow(always=True)` run in every third.
  """
  third = os.environ.get("SPATIAL_JAX_SLOW_THIRD")
  if third is None:
    return
  skipped = [
    item
    for item in items
    if (slow := item.get_closest_marker("slow"))
    and not slow.kwargs.get("always")
    and zlib.crc32(item.nodeid.encode()) % 3 != int(third)
  ]
  config.hook.pytest_deselected(items=skipped)
  items[:] = [item for item in items if item not in skipped]
