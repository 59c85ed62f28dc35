"""One worker process of the build: reads numbers of parts from stdin and writes the parts.

python -m spatial_jax.datasets.numerical3d.worker FOLDER SETTINGS

    stdin   "train 3\n"  ...
    stdout  "187\n"      its number of tasks, when the file is complete

It ends when its stdin ends, so it always ends with its parent.
"""

import json
import os
import pathlib
import signal
import sys

from spatial_jax.datasets.numerical3d.part import SPLITS, BuildSettings, write_part
from spatial_jax.datasets.numerical3d.parts import part_path
from spatial_jax.errors import UserError


def main() -> None:
  """Serves until its parent ends."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent too, which closes stdin
  try:
    serve()
  except BrokenPipeError:  # the parent was killed
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the exit


def serve() -> None:
  """Writes parts until stdin ends; a mistake of the user is one line "error: ..." on stdout."""
  folder, settings = pathlib.Path(sys.argv[1]), BuildSettings(**json.loads(sys.argv[2]))
  for line in sys.stdin:
    name, index = line.split()
    split = SPLITS[0] if name == SPLITS[0] else SPLITS[1]
    try:
      tasks = write_part(part_path(folder, split, int(index)), settings, split, int(index))
    except (UserError, OSError) as error:
      print(f"error: {error}", flush=True)
      return
    print(tasks, flush=True)


if __name__ == "__main__":
  main()
