"""Memory of the measured attention (the attention reward) of one layer and one row.

    python -m benchmarks.attention

The program is compiled at the sizes of released models; nothing runs. It exits with 1 if it takes
more than the bound of `policy.attention_mass`: four times MASS_BYTES, and copies of its inputs.
"""

import sys

import jax
import jax.numpy as jnp
from rich import box
from rich.table import Table

from spatial_jax.evaluate.console import make_console
from spatial_jax.hf.model_zoo import released
from spatial_jax.policy.attention_mass import MASS_BYTES, attention_mass
from spatial_jax.policy.cache import KV

MIB = 1 << 20
MODELS = ("Qwen2-VL-2B", "Qwen2.5-VL-7B", "Qwen2.5-VL-72B")
LENGTHS = ((2048, 1024), (5120, 4096), (5120, 13312))  # tokens of prefix and suffix


def sizes(model: str, prefix: int, suffix: int) -> tuple[int, int, int]:
  """Bytes of all weights [H, T, S] in float32, of the program, and the bound."""
  shape = released(model).decoder
  kv, each = shape.kv_heads, shape.heads // shape.kv_heads

  def array(*dims: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)

  def cache(length: int) -> KV:
    one = array(1, kv, length, shape.head_dim, dtype=jnp.dtype(jnp.bfloat16))
    return KV(one, one)

  inputs = (
    array(1, kv, each, suffix, shape.head_dim, dtype=jnp.dtype(jnp.bfloat16)),
    cache(prefix),
    array(1, dtype=jnp.dtype(jnp.int32)),
    cache(suffix),
    array(1, suffix, dtype=jnp.dtype(jnp.bool)),
  )
  compiled = jax.jit(attention_mass).lower(*inputs).compile()
  memory = compiled.memory_analysis()
  given = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(inputs))
  # XLA:CPU computes in float32: copies of bf16 inputs have twice their size, queries are split.
  bound = 4 * MASS_BYTES + 4 * given
  full = 4 * shape.heads * suffix * (prefix + suffix)
  return full, int(memory.temp_size_in_bytes), bound


def main() -> None:
  """Prints the table."""
  table = Table("model", "prefix", "suffix", box=box.SIMPLE_HEAD)
  for name in ("all weights, MiB", "program, MiB", "bound, MiB"):
    table.add_column(name, justify="right")
  worst = 0.0
  for model in MODELS:
    for prefix, suffix in LENGTHS:
      full, used, bound = sizes(model, prefix, suffix)
      worst = max(worst, used / bound)
      found = (f"{value / MIB:,.0f}" for value in (full, used, bound))
      table.add_row(model, f"{prefix:,}", f"{suffix:,}", *found)
  make_console().print(table)
  sys.exit(worst > 1)


if __name__ == "__main__":
  main()
