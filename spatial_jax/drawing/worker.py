"""One drawing worker: reads requests on stdin, writes pixels to stdout, ends when stdin ends.

    python -m spatial_jax.drawing.worker MEMORY_MIB TIMEOUT_S

It imports NumPy and Pillow, never JAX. Before the first request it limits its address space. Each
request has an alarm, which the kernel delivers even if Python hangs: a worker ends by itself after
its parent has ended.
"""

import os
import resource
import signal
import sys
from typing import IO

from spatial_jax.drawing import wire
from spatial_jax.drawing.canvas import paint


def serve(requests: IO[bytes], results: IO[bytes], timeout_s: float) -> None:
  """Paints until the requests end; a request that fails returns a fault and ends the worker."""
  while True:
    try:
      header, payload = wire.receive(requests)
      signal.setitimer(signal.ITIMER_REAL, timeout_s)
      images, style = wire.read_request(header, payload)
      painted = [paint(image.pixels, image.operations, style) for image in images]
    except EOFError:
      return
    except Exception as error:
      # The process may be damaged (memory), so it ends; the executor starts a new one.
      wire.send(results, {"fault": f"{type(error).__name__}: {error}"}, [])
      return
    wire.send(results, {"shapes": [pixels.shape for pixels in painted]}, painted)
    signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
  """Sets the limits, reserves stdout for results, and serves."""
  memory_mib, timeout_s = int(sys.argv[1]), float(sys.argv[2])
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  allowed = memory_mib << 20 if hard == resource.RLIM_INFINITY else min(memory_mib << 20, hard)
  resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
  results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # printed text must not break a message
  serve(sys.stdin.buffer, results, timeout_s)


if __name__ == "__main__":
  main()
