"""Where the seconds of one pass go: the profiler's account of ours, by part of the policy.

    python -m benchmarks.profile [--shape=nano] [--what=forward|gradient] [--remat]

The pass is that of benchmarks.policy. Every operation of XLA is counted for the time that it alone
ran, on all threads, and named after the line of the model it was compiled from.
"""

import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from absl import flags

REMAT = flags.DEFINE_bool("remat", False, "layers are computed again in the backward pass")
# First match wins; op_name holds the modules and primitives an operation came from.
PARTS = (
  ("log-probabilities", r"logprobs|one_chunk|logsumexp"),
  ("tower: attention", r"VisionTower.*(_attend|attend|cond)"),
  ("tower: matrices", r"VisionTower.*dot_general"),
  ("tower: the rest", r"VisionTower"),
  ("decoder: attention", r"DecoderStack.*(attend|RKQ|softmax)"),
  ("decoder: matrices", r"DecoderStack.*dot_general"),
  ("decoder: the rest", r"DecoderStack"),
)


class Operation(NamedTuple):
  """One run of one operation: its thread, and nanoseconds."""

  name: str
  thread: str
  start_ns: float
  end_ns: float


def operations(call: Callable[[], object]) -> list[Operation]:
  """What XLA ran while `call` did."""
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      call()
    found = []
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
      found += _read(jax.profiler.ProfileData.from_file(str(path)))
  return found


def _read(data: jax.profiler.ProfileData) -> Iterator[Operation]:
  for plane in data.planes:
    for line in plane.lines:
      for event in line.events:
        names = {name for name, _ in event.stats}
        if "hlo_op" in names:
          yield Operation(event.name, line.name, event.start_ns, event.end_ns)
