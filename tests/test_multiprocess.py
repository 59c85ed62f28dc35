"""Two processes sample separately, between global programs that they run together."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests import step_fixtures, two_processes

pytestmark = pytest.mark.slow(always=True)
ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT_S = 300


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  """The results that each of two processes wrote."""
  folder, port = tmp_path_factory.mktemp("two"), str(free_port())
  flags = f"--xla_force_host_platform_device_count={two_processes.DEVICES}"
  files = [folder / f"{rank}.json" for rank in range(2)]
  workers = [
    subprocess.Popen(
      [sys.executable, "-m", "tests.two_processes", str(rank), port, str(file)],
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank, file in enumerate(files)
  ]
  try:
    errors = [worker.communicate(timeout=TIMEOUT_S)[1] for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  assert [worker.returncode for worker in workers] == [0, 0], errors
  return [json.loads(file.read_text()) for file in files]


def test_processes_run_different_numbers_of_local_programs(results):
  few, many = (process["programs"] for process in results)
  assert many > few > 0


def test_global_program_afterwards_gives_both_the_same(results):
  assert results[0]["total"] == results[1]["total"]


def test_processes_sample_what_one_process_samples(results):
  with pytest.MonkeyPatch.context() as monkeypatch:
    step_fixtures.make_rollouts_draw(monkeypatch)
    lab = step_fixtures.step_setup(1, two_processes.DEVICES, 1)
    for numbers, process in zip(two_processes.TASK_NUMBERS, results, strict=True):
      token_ids, _ = two_processes.sample_twice(lab, numbers)
      assert token_ids == process["token_ids"]
