"""One of two processes: python -m tests.two_processes RANK PORT OUT, run by test_multiprocess."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from spatial_jax.rollout.scheduler import generate_rollouts
from tests import step_fixtures
from tests.rollout_fixtures import SAMPLED, flat

DEVICES = 2  # of each process
ASKED = ((0, 1), (2, 3, 4, 5, 6, 7, 8))  # questions of each process


def rounds(lab, numbers):
  """Two times: weights to where sampling runs, a global program, and the rollouts of this process.

  Returns:
    The tokens of every rollout, and how many programs of its own this process ran.
  """
  calls = []
  run = lab.engine.programs

  def watched(name):
    def call(*arguments):
      calls.append(name)
      return getattr(run, name)(*arguments)

    return call

  names = ("encode_images", "prefill", "sample", "append")
  programs = dataclasses.replace(run, **{name: watched(name) for name in names})
  engine = dataclasses.replace(lab.engine, programs=programs)
  asked = [step_fixtures.tasks(number)[0] for number in numbers]
  prompts = [engine.conversation.prompt(task) for task in asked]
  said = []
  for step in range(2):
    weights = lab.decode_params(lab.state.params)
    assert all(x.is_fully_addressable for x in jax.tree.leaves(weights))
    rollouts = generate_rollouts(engine, weights, prompts, 0, step, [SAMPLED] * engine.cfg.group)
    said.append([trajectory.token_ids_T.tolist() for trajectory in flat(rollouts)])
  return said, len(calls)


def main(rank: int, port: str, out: str) -> None:
  """Samples beside the other process and writes what was said."""
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
  with pytest.MonkeyPatch.context() as monkeypatch:
    step_fixtures.everybody_draws(monkeypatch)
    lab = step_fixtures.lab(1, 2 * DEVICES, 1)  # every matrix over both processes
    kernel = lab.state.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert not kernel.is_fully_addressable
    said, programs = rounds(lab, ASKED[rank])
  total = jax.jit(lambda x: x.sum())(kernel)  # global again, behind unequal numbers of programs
  with open(out, "w", encoding="utf-8") as file:
    json.dump({"said": said, "programs": programs, "total": float(np.asarray(total))}, file)


if __name__ == "__main__":
  main(int(sys.argv[1]), *sys.argv[2:])
