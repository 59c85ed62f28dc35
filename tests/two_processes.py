"""One of two processes: python -m tests.two_processes RANK PORT OUT, run by test_multiprocess."""

import json
import sys

import jax
import numpy as np
import pytest

from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from tests import rollout_fixtures, step_fixtures
from tests.rollout_fixtures import SAMPLED, flat

DEVICES = 2  # per process
TASK_NUMBERS = ((0, 1), (2, 3, 4, 5, 6, 7, 8))  # of each process


def sample_twice(lab, numbers):
  """Twice: reshards the weights by a global program, then samples the tasks of this process.

  Returns:
    The tokens of every rollout, and the number of local programs that this process ran.
  """
  calls = []

  def around(name, program, *arguments):
    calls.append(name)
    return program(*arguments)

  engine = rollout_fixtures.watch(lab.engine, around)
  tasks = [step_fixtures.tasks(number)[0] for number in numbers]
  prompts = [engine.conversation.prompt(task) for task in tasks]
  token_ids = []
  for step in range(2):
    weights = lab.decode_params(lab.state.params)
    assert all(x.is_fully_addressable for x in jax.tree.leaves(weights))
    job = RolloutJob(prompts, 0, step, [SAMPLED] * engine.cfg.group)
    rollouts = generate_rollouts(engine, weights, job)
    token_ids.append([trajectory.token_ids_T.tolist() for trajectory in flat(rollouts)])
  return token_ids, len(calls)


def main(rank: int, port: str, out: str) -> None:
  """Samples at the same time as the other process and writes the tokens."""
  jax.config.update("jax_numpy_dtype_promotion", "strict")
  jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
  with pytest.MonkeyPatch.context() as monkeypatch:
    step_fixtures.make_rollouts_draw(monkeypatch)
    lab = step_fixtures.step_setup(1, 2 * DEVICES, 1)  # every matrix is sharded over both processes
    kernel = lab.state.params["decoder"]["layers"]["mlp"]["up"]["kernel"]
    assert not kernel.is_fully_addressable
    token_ids, programs = sample_twice(lab, TASK_NUMBERS[rank])
  total = jax.jit(lambda x: x.sum())(
    kernel
  )  # a global program, after unequal numbers of local ones
  with open(out, "w", encoding="utf-8") as file:
    result = {"token_ids": token_ids, "programs": programs, "total": float(np.asarray(total))}
    json.dump(result, file)


if __name__ == "__main__":
  main(int(sys.argv[1]), *sys.argv[2:])
