"""Two processes sample on their own, between programs that they run together."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests import step_fixtures, two_processes

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT_S = 300


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """What each of two processes wrote."""
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


def test_each_ran_as_many_programs_as_its_own_rollouts_took(found):
  one, other = (process["programs"] for process in found)
  assert other > one > 0


def test_both_are_still_together_behind_them(found):
  assert found[0]["total"] == found[1]["total"]


def test_what_they_say_is_what_one_process_says(found):
  with pytest.MonkeyPatch.context() as monkeypatch:
    step_fixtures.everybody_draws(monkeypatch)
    lab = step_fixtures.lab(1, two_processes.DEVICES, 1)
    for asked, process in zip(two_processes.ASKED, found, strict=True):
      said, _ = two_processes.rounds(lab, asked)
      assert said == process["said"]
