"""One drawing worker: reads requests on stdin, answers with pixels on stdout, ends when stdin does.

    python -m spatial_jax.drawing.worker MEMORY_MIB TIMEOUT_S

It loads NumPy and Pillow, never JAX, and limits itself before it reads anything: its address space,
and for each request an alarm that the kernel delivers even when Python hangs, so that no worker
outlives a parent that is gone.
"""

import os
import resource
import signal
import sys
from typing import IO

from spatial_jax.drawing import wire
from spatial_jax.drawing.canvas import paint


def serve(requests: IO[bytes], answers: IO[bytes], timeout_s: float) -> None:
  """Paints until the requests end; one that fails is answered with its fault, and is the last."""
  while True:
    try:
      header, payload = wire.receive(requests)
      signal.setitimer(signal.ITIMER_REAL, timeout_s)
      pictures, style = wire.read_request(header, payload)
      painted = [paint(picture.pixels, picture.drawn, style) for picture in pictures]
    except EOFError:
      return
    except Exception as error:
      # What is left of this process is not to be trusted: say why and go, the executor starts anew.
      wire.send(answers, {"fault": f"{type(error).__name__}: {error}"}, [])
      return
    wire.send(answers, {"shapes": [pixels.shape for pixels in painted]}, painted)
    signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
  """Sets the limits, keeps stdout for answers alone, and serves."""
  memory_mib, timeout_s = int(sys.argv[1]), float(sys.argv[2])
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  allowed = memory_mib << 20 if hard == resource.RLIM_INFINITY else min(memory_mib << 20, hard)
  resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
  answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing that prints can break a message
  serve(sys.stdin.buffer, answers, timeout_s)


if __name__ == "__main__":
  main()
