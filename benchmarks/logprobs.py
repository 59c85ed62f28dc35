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
from spatial_jax.policy.logprobs import score_targets

MIB = 1 << 20
MODELS = ("Qwen2-VL-2B", "Qwen2.5-VL-7B", "Qwen2.5-VL-72B")
ROWS, TOKENS = 8, 1024
CHUNKS = (TOKENS, 256, 64)


def program_bytes(model: str, chunk: int) -> int:
  """Temporary memory of the gradient by hidden states and table, float32."""
  shape = released(model).decoder

  def array(*dims: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))

  def loss(hidden_RTD, table_VD, target_RT, temperature_R, forbidden_V):
    def logits_of(hidden):
      flat = hidden.reshape(-1, shape.width)
      return (flat @ table_VD.T).reshape(*hidden.shape[:-1], -1)

    arguments = (hidden_RTD, target_RT, temperature_R, forbidden_V, chunk)
    return jnp.sum(score_targets(logits_of, *arguments, with_entropy=False)[0])

  inputs = (
    array(ROWS, TOKENS, shape.width),
    array(shape.vocabulary, shape.width),
    array(ROWS, TOKENS, dtype="int32"),
    array(ROWS),
    array(shape.vocabulary, dtype="bool"),
  )
  compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*inputs).compile()
  return int(compiled.memory_analysis().temp_size_in_bytes)


def main() -> None:
  """Prints the table."""
  table = Table("model", box=box.SIMPLE_HEAD)
  names = ("vocabulary", "tokens at once", "their logits, MiB", "program, MiB")
  for name in names:
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
