"""Worker processes: they draw as the canvas does, fail one by one, and end with the executor."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from spatial_jax.config import ConfigError, build
from spatial_jax.drawing import wire
from spatial_jax.drawing.canvas import DrawnImage, Style, draw
from spatial_jax.drawing.executor import Executor, ExecutorConfig, Fault
from spatial_jax.types import Operation

STYLE = Style(line_px=2, dot_px=2, font_px=8, label_offset_px=(4, 3))
RANDOM = np.random.default_rng(0)
IMAGES = [
  DrawnImage(RANDOM.integers(0, 256, shape, dtype=np.uint8), ())
  for shape in ((84, 112, 3), (56, 56, 3))
]
IMAGES.append(DrawnImage(IMAGES[0].pixels, (Operation("box", 1, (1, 1, 9, 9), "old"),)))
CONFIG = ExecutorConfig(workers=1, timeout_s=100.0, memory_mib=1024)  # far above its normal time


def _operations(number: int) -> list[Operation]:
  box = Operation("box", 1 + number % 3, (3.0 + number, 4.0, 40.5, 50.0), f"caf\u00e9 {number}")
  return [box, Operation("line", 2, (1.0, 2.0, 3.0 + number, 9.0), "way")]


def _equal(drawn, expected) -> None:
  assert not isinstance(drawn, Fault), drawn
  assert [image.operations for image in drawn] == [image.operations for image in expected]
  for one, other in zip(drawn, expected, strict=True):
    np.testing.assert_array_equal(one.pixels, other.pixels)


def _check_drawing(executor: Executor, number: int) -> None:
  """Draws once and compares the result with the canvas."""
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
      continue  # it ended meanwhile
  return pids


def _wait_for(condition, seconds: float = 20.0) -> bool:
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.02)
  return condition()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_each_future_has_its_own_drawing_equal_to_the_canvas(workers):
  with Executor(dataclasses.replace(CONFIG, workers=workers), STYLE) as executor:
    futures = [executor.submit(IMAGES, _operations(number)) for number in range(12)]
    for number in (*range(1, 12, 2), *range(0, 12, 2)):
      _equal(futures[number].result(), draw(IMAGES, _operations(number), STYLE))
    assert executor.submit(IMAGES, []).result() == ()
  assert _children() == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failed_drawing_is_a_fault_and_the_next_one_is_drawn(workers):
  with Executor(dataclasses.replace(CONFIG, workers=workers), STYLE) as executor:
    impossible = executor.submit(IMAGES, [Operation("box", 9, (1, 2, 3, 4), "a")])
    possible = executor.submit(IMAGES, _operations(1))
    assert isinstance(impossible.result(), Fault)
    _equal(possible.result(), draw(IMAGES, _operations(1), STYLE))


def test_a_killed_worker_is_a_fault_of_its_current_drawing_only():
  with Executor(CONFIG, STYLE) as executor:
    _check_drawing(executor, 0)
    (worker,) = _children()
    os.kill(worker, signal.SIGSTOP)  # so that it dies during a drawing
    broken, waiting = (executor.submit(IMAGES, _operations(number)) for number in (1, 2))
    time.sleep(0.2)
    os.kill(worker, signal.SIGKILL)
    fault = broken.result()
    assert isinstance(fault, Fault)
    assert "died" in fault.detail
    _equal(waiting.result(), draw(IMAGES, _operations(2), STYLE))
    assert worker not in _children()


def test_an_idle_worker_that_is_killed_causes_no_fault():
  with Executor(CONFIG, STYLE) as executor:
    executor.submit(IMAGES, _operations(0)).result()
    (worker,) = _children()
    os.kill(worker, signal.SIGKILL)
    assert _wait_for(lambda: "(zombie)" in pathlib.Path(f"/proc/{worker}/status").read_text())
    _check_drawing(executor, 1)


def test_a_hanging_worker_is_killed_and_replaced():
  with Executor(CONFIG, STYLE) as executor:
    executor.submit(IMAGES, _operations(0)).result()
    (worker,) = _children()
    os.kill(worker, signal.SIGSTOP)
    executor.config = dataclasses.replace(CONFIG, timeout_s=1.0)
    fault = executor.submit(IMAGES, _operations(1)).result()
    assert isinstance(fault, Fault)
    assert "hung" in fault.detail
    executor.config = CONFIG  # a new worker needs time to start
    _check_drawing(executor, 2)
    assert worker not in _children()


def test_too_much_memory_is_a_fault():
  with Executor(dataclasses.replace(CONFIG, memory_mib=400), STYLE) as executor:
    huge = [DrawnImage(np.zeros((7000, 7000, 3), np.uint8), ())]
    fault = executor.submit(huge, _operations(0)[:1]).result()
    assert isinstance(fault, Fault)
    assert "MemoryError" in fault.detail
    _check_drawing(executor, 1)


def test_closing_early_ends_workers_and_resolves_every_future():
  with Executor(CONFIG, STYLE) as executor:
    futures = [executor.submit(IMAGES, _operations(number)) for number in range(50)]
  outcomes = [future.result(timeout=0) for future in futures]
  assert isinstance(outcomes[-1], Fault)
  assert _children() == []


WORKER = [sys.executable, "-m", "spatial_jax.drawing.worker", "1024", "20"]


def test_a_worker_never_imports_jax():
  """The interpreter lists all imports of a real worker on stderr."""
  command = [sys.executable, "-X", "importtime", *WORKER[1:]]
  pipe = subprocess.PIPE
  with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as worker:
    wire.send(
      worker.stdin, *wire.request([DrawnImage(IMAGES[0].pixels, tuple(_operations(0)))], STYLE)
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


def test_a_worker_ends_with_its_parent():
  """A killed parent cannot end its workers; the closed pipe ends them."""
  script = (
    "import sys, time, numpy as np\n"
    "from spatial_jax.drawing.canvas import DrawnImage, Style\n"
    "from spatial_jax.drawing.executor import Executor, ExecutorConfig\n"
    "from spatial_jax.types import Operation\n"
    "with Executor(ExecutorConfig(1, 20.0, 1024), Style(2, 2, 8, (4, 3))) as executor:\n"
    "  image = DrawnImage(np.zeros((9, 9, 3), np.uint8), ())\n"
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
  assert _wait_for(lambda: not any(os.path.exists(f"/proc/{int(pid)}/exe") for pid in line))


def test_a_worker_ends_by_its_own_alarm():
  """A worker that hangs in a drawing ends itself, even without its executor."""
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


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("workers", -1), ("workers", 1.0), ("workers", True), ("workers", None), ("timeout_s", 0.0),
    ("timeout_s", -1.0), ("timeout_s", float("nan")), ("timeout_s", float("inf")),
    ("timeout_s", "20"), ("memory_mib", 0), ("memory_mib", 64), ("memory_mib", 512.0),
  ],
)  # fmt: skip
def test_an_executor_config_out_of_range_is_refused(field, value):
  with pytest.raises(ConfigError, match=f"^{field} is .* and must be "):
    dataclasses.replace(CONFIG, **{field: value})


def test_the_full_key_of_a_wrong_value_is_named():
  mapping = dataclasses.asdict(CONFIG) | {"memory_mib": 64}
  with pytest.raises(
    ConfigError,
    match=r"^config\.executor\.memory_mib is 64 and must be a whole number, at least 256",
  ):
    build(ExecutorConfig, mapping, "config.executor")
