"""Memory of the gradient of log-probabilities, at the vocabulary of released models.

    python -m benchmarks.logprobs

The program is compiled for rows of 1,024 tokens; nothing runs. Logits of a chunk of tokens exist at
once and are computed again in the backward pass. It exits with 1 if a program with chunks takes
more than three logits of a chunk and the gradient of the table.
"""

import sys

import jax
import jax.numpy as jnp
from rich import box
from rich.table import Table

from spatial_jax.evaluate.console import make_console
from spatial_jax.hf.model_zoo import released
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.types import Params

MIB = 1 << 20
MODELS = ("Qwen2-VL-2B", "Qwen2.5-VL-7B", "Qwen2.5-VL-72B")
ROWS, TOKENS = 8, 1024
CHUNKS = (TOKENS, 256, 64)


def program_bytes(model: str, chunk: int) -> int:
  """Temporary memory of the gradient of `Policy.logprobs`, float32.

  Args:
    model: name of a released model.
    chunk: tokens per row whose logits exist at once.
  """
  policy = make_policy(released(model), jnp.dtype("float32"), logprob_chunk=chunk)
  shape = policy.cfg.decoder
  table = {"embedding": _array(shape.vocabulary, shape.width)}
  params = {"decoder": {"embed" if shape.tied else "head": table}}

  def total(params: Params, hidden_RTD: jax.Array, *others: jax.Array) -> jax.Array:
    return jnp.sum(policy.logprobs(params, hidden_RTD, *others))

  inputs = (
    params,
    _array(ROWS, TOKENS, shape.width),
    _array(ROWS, TOKENS, dtype="int32"),  # targets
    _array(ROWS),  # temperatures
    _array(shape.vocabulary, dtype="bool"),  # forbidden tokens
  )
  compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*inputs).compile()
  return int(compiled.memory_analysis().temp_size_in_bytes)


def _array(*dims: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


def main() -> None:
  """Prints the table."""
  table = Table("model", box=box.SIMPLE_HEAD)
  for name in ("vocabulary", "tokens at once", "their logits, MiB", "program, MiB"):
    table.add_column(name, justify="right")
  within = True
  for model in MODELS:
    shape = released(model).decoder
    for chunk in CHUNKS:
      logits, used = 4 * ROWS * chunk * shape.vocabulary, program_bytes(model, chunk)
      within &= chunk == TOKENS or used <= 3 * logits + 4 * shape.vocabulary * shape.width
      found = (f"{value:,.0f}" for value in (shape.vocabulary, chunk, logits / MIB, used / MIB))
      table.add_row(model, *found)
  make_console().print(table)
  sys.exit(not within)


if __name__ == "__main__":
  main()
