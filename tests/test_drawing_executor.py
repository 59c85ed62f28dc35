"""Worker processes: they draw as the canvas does, break alone, and leave nothing behind."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from spatial_jax.config import ConfigError
from spatial_jax.drawing import wire
from spatial_jax.drawing.canvas import Picture, Style, draw
from spatial_jax.drawing.executor import Executor, ExecutorConfig, Fault
from spatial_jax.types import Operation

STYLE = Style(line_px=2, dot_px=2, font_px=8, label_offset_px=(4, 3))
RANDOM = np.random.default_rng(0)
IMAGES = [
  Picture(RANDOM.integers(0, 256, shape, dtype=np.uint8), ())
  for shape in ((84, 112, 3), (56, 56, 3))
]
IMAGES.append(Picture(IMAGES[0].pixels, (Operation("box", 1, (1, 1, 9, 9), "old"),)))
CONFIG = ExecutorConfig(workers=1, timeout_s=20.0, memory_mib=1024)


def _operations(number: int) -> list[Operation]:
  box = Operation("box", 1 + number % 3, (3.0 + number, 4.0, 40.5, 50.0), f"caf\u00e9 {number}")
  return [box, Operation("line", 2, (1.0, 2.0, 3.0 + number, 9.0), "way")]


def _equal(drawn, expected) -> None:
  assert not isinstance(drawn, Fault), drawn
  assert [picture.drawn for picture in drawn] == [picture.drawn for picture in expected]
  for one, other in zip(drawn, expected, strict=True):
    np.testing.assert_array_equal(one.pixels, other.pixels)


def _draws(executor: Executor, number: int) -> None:
  """The executor does its work."""
  drawing = executor.submit(IMAGES, _operations(number))
  _equal(drawing.result(), draw(IMAGES, _operations(number), STYLE))


def _children() -> list[int]:
  """Process ids of the drawing workers of this process (Linux)."""
  pids = []
  for name in filter(str.isdigit, os.listdir("/proc")):
    try:
      with open(f"/proc/{name}/stat") as stat, open(f"/proc/{name}/cmdline") as command:
        parent = int(stat.read().rpartition(")")[2].split()[1])
        if parent == os.getpid() and "spatial_jax.drawing.worker" in command.read():
          pids.append(int(name))
    except OSError:
      continue  # it ended while we looked
  return pids


def _until(condition, seconds: float = 20.0) -> bool:
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.02)
  return condition()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_draws_as_the_canvas_does_and_each_handle_is_its_own(workers):
  with Executor(ExecutorConfig(workers, 20.0, 1024), STYLE) as executor:
    handles = [executor.submit(IMAGES, _operations(number)) for number in range(12)]
    for number in (*range(1, 12, 2), *range(0, 12, 2)):
      _equal(handles[number].result(), draw(IMAGES, _operations(number), STYLE))
    assert executor.submit(IMAGES, []).result() == ()
  assert _children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_impossible_drawing_is_a_fault_and_the_next_one_is_drawn(workers):
  with Executor(ExecutorConfig(workers, 20.0, 1024), STYLE) as executor:
    nowhere = executor.submit(IMAGES, [Operation("box", 9, (1, 2, 3, 4), "a")])
    fine = executor.submit(IMAGES, _operations(1))
    assert isinstance(nowhere.result(), Fault)
    _equal(fine.result(), draw(IMAGES, _operations(1), STYLE))


def test_a_killed_worker_is_a_fault_of_its_drawing_alone():
  with Executor(CONFIG, STYLE) as executor:
    _draws(executor, 0)
    (worker,) = _children()
    os.kill(worker, signal.SIGSTOP)  # so that it dies while it has something to do
    broken, waiting = (executor.submit(IMAGES, _operations(number)) for number in (1, 2))
    time.sleep(0.2)
    os.kill(worker, signal.SIGKILL)
    fault = broken.result()
    assert isinstance(fault, Fault)
    assert "died" in fault.detail
    _equal(waiting.result(), draw(IMAGES, _operations(2), STYLE))
    assert worker not in _children()


def test_a_worker_killed_while_idle_costs_nothing():
  with Executor(CONFIG, STYLE) as executor:
    executor.submit(IMAGES, _operations(0)).result()
    (worker,) = _children()
    os.kill(worker, signal.SIGKILL)
    assert _until(lambda: "(zombie)" in pathlib.Path(f"/proc/{worker}/status").read_text())
    _draws(executor, 1)


def test_a_hanging_worker_is_killed_and_replaced():
  with Executor(ExecutorConfig(1, 3.0, 1024), STYLE) as executor:
    executor.submit(IMAGES, _operations(0)).result()
    (worker,) = _children()
    os.kill(worker, signal.SIGSTOP)
    fault = executor.submit(IMAGES, _operations(1)).result()
    assert isinstance(fault, Fault)
    assert "hung" in fault.detail
    _draws(executor, 2)
    assert worker not in _children()


def test_too_much_memory_is_a_fault():
  with Executor(ExecutorConfig(1, 20.0, 400), STYLE) as executor:
    huge = [Picture(np.zeros((7000, 7000, 3), np.uint8), ())]
    fault = executor.submit(huge, _operations(0)[:1]).result()
    assert isinstance(fault, Fault)
    assert "MemoryError" in fault.detail
    _draws(executor, 1)


def test_leaving_early_ends_workers_and_answers_every_handle():
  with Executor(CONFIG, STYLE) as executor:
    handles = [executor.submit(IMAGES, _operations(number)) for number in range(50)]
  outcomes = [handle.result(timeout=0) for handle in handles]
  assert isinstance(outcomes[-1], Fault)
  assert _children() == []


WORKER = [sys.executable, "-m", "spatial_jax.drawing.worker", "1024", "20"]


def test_worker_never_imports_jax():
  """A real worker that has drawn: the interpreter lists on stderr all that it imported."""
  command = [sys.executable, "-X", "importtime", *WORKER[1:]]
  pipe = subprocess.PIPE
  with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as worker:
    wire.send(
      worker.stdin, *wire.request([Picture(IMAGES[0].pixels, tuple(_operations(0)))], STYLE)
    )
    worker.stdin.close()
    header, _ = wire.receive(worker.stdout)
    imported = {
      line.rpartition("|")[2].strip() for line in worker.stderr.read().decode().splitlines()
    }
  assert header == {"shapes": [[84, 112, 3]]}
  assert {"numpy", "PIL.ImageDraw", "spatial_jax.types"} <= imported
  roots = {name.partition(".")[0] for name in imported}
  assert not roots & {"jax", "jaxlib", "flax", "torch"}


def test_worker_ends_with_its_parent():
  """A parent that is killed outright has no time to say goodbye: the closed pipe says it."""
  script = (
    "import sys, time, numpy as np\n"
    "from spatial_jax.drawing.canvas import Picture, Style\n"
    "from spatial_jax.drawing.executor import Executor, ExecutorConfig\n"
    "from spatial_jax.types import Operation\n"
    "with Executor(ExecutorConfig(1, 20.0, 1024), Style(2, 2, 8, (4, 3))) as executor:\n"
    "  image = Picture(np.zeros((9, 9, 3), np.uint8), ())\n"
    "  executor.submit([image], [Operation('box', 1, (1, 1, 5, 5), '')]).result()\n"
    "  import os, pathlib\n"
    "  tasks = pathlib.Path(f'/proc/{os.getpid()}/task').glob('*/children')  # a thread's child\n"
    "  print(*(task.read_text() for task in tasks), flush=True)\n"
    "  time.sleep(60)\n"
  )
  with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
    line = parent.stdout.readline().split()
    parent.kill()
  assert line
  assert _until(lambda: not any(os.path.exists(f"/proc/{int(pid)}/exe") for pid in line))


def test_worker_ends_by_its_own_alarm():
  """Should nobody be there to kill it, a worker that hangs in a drawing ends itself."""
  script = (
    "import sys, time\n"
    "from spatial_jax.drawing import worker\n"
    "worker.paint = lambda *_: time.sleep(60)\n"
    "worker.main()\n"
  )
  command, pipe = [sys.executable, "-c", script, "1024", "0.5"], subprocess.PIPE
  with subprocess.Popen(command, stdin=pipe, stdout=pipe) as worker:
    wire.send(worker.stdin, *wire.request([IMAGES[0]], STYLE))
    assert worker.wait(timeout=30) == -signal.SIGALRM
    worker.stdin.close()


@pytest.mark.parametrize("wrong", [(-1, 20.0, 64), (1, 0.0, 64), (1, 20.0, 0)])
def test_an_executor_that_could_not_draw_is_refused(wrong):
  with pytest.raises(ConfigError, match=r"config\.executor: workers >= 0"):
    ExecutorConfig(*wrong)
