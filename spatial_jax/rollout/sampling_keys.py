"""Sampling keys: which random numbers a rollout draws.

key of a token = fold_in(stream(seed, "sample"), step, task number, sample index, token index)

A key does not depend on where the task is in the batch, nor on slots, rows or chunks.
"""

import zlib
from collections.abc import Sequence

import jax
import numpy as np

from spatial_jax import rng
from spatial_jax.rollout.config import SamplingParams
from spatial_jax.types import Prompt, Prompts


def sample_indices(sampling_params: Sequence[SamplingParams]) -> list[int]:
  """Returns the sample index of each rollout of a group, for its key.

  Rollouts with equal parameters are numbered 0, 1, ... and draw different numbers. Rollouts with
  other parameters draw the same numbers again, so that they can be compared.
  """
  params = list(sampling_params)
  return [params[:g].count(one) for g, one in enumerate(params)]


def task_number(prompt: Prompt) -> int:
  """Returns the number of a task in [0, 2^31), a hash of its id."""
  return zlib.crc32(prompt.task.task_id.encode()) & 0x7FFFFFFF


def sampling_keys(
  seed: int, step: int, prompts: Prompts, sample_index: Sequence[int]
) -> np.ndarray:
  """Returns the key data of all rollouts, uint32 [B, G, 2].

  Args:
    seed, step: of the run.
    prompts: B prompts.
    sample_index: G indices, from `sample_indices`.
  """
  root = rng.fold(rng.stream(seed, "sample"), step)
  number_B = np.zeros(1 << (len(prompts) - 1).bit_length(), np.int32)  # few sizes, few traces
  number_B[: len(prompts)] = [task_number(prompt) for prompt in prompts]
  return np.asarray(_fold_all(root, number_B, np.asarray(sample_index, np.int32)))[: len(prompts)]


@jax.jit
def _fold_all(root: jax.Array, number_B: jax.Array, sample_index_G: jax.Array) -> jax.Array:
  def one(number: jax.Array, sample_index: jax.Array) -> jax.Array:
    return jax.random.key_data(rng.fold(root, number, sample_index))

  return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(number_B, sample_index_G)
