"""Memory of the gradient of log-probabilities, at the vocabulary of released models.

    python -m benchmarks.logprobs

Programs are compiled for rows of 1,024 tokens; nothing runs. Logits of a chunk of tokens exist at
once. Losses that are sums over tokens compute them once (`learn.token_loss`), the others again in
the backward pass (`Policy.logprobs`). It exits with 1 if a program with chunks takes more than
three logits of a chunk and the gradient of the table.
"""

import sys

import jax
import jax.numpy as jnp
from rich import box
from rich.table import Table

from spatial_jax.evaluate.console import make_console
from spatial_jax.hf.model_zoo import released
from spatial_jax.learn.losses import Metrics
from spatial_jax.learn.token_loss import Head, Targets, sum_of_token_losses
from spatial_jax.policy.logprobs import TokenScores
from spatial_jax.policy.qwen_vl import make_policy
from spatial_jax.types import Params

MIB = 1 << 20
MODELS = ("Qwen2-VL-2B", "Qwen2.5-VL-7B", "Qwen2.5-VL-72B")
ROWS, TOKENS = 8, 1024
CHUNKS = (TOKENS, 256, 64)


def program_bytes(model: str, chunk: int, once: bool) -> int:
  """Temporary memory of the gradient of a sum of log-probabilities, float32.

  Args:
    model: name of a released model.
    chunk: tokens per row whose logits exist at once.
    once: logits are computed once, as for a sum over tokens.
  """
  policy = make_policy(released(model), jnp.dtype("float32"), logprob_chunk=chunk)
  shape = policy.cfg.decoder
  table = {"embedding": _array(shape.vocabulary, shape.width)}
  params = {"decoder": {"embed" if shape.tied else "head": table}}

  def total(params: Params, hidden_RTD: jax.Array, token_RT: jax.Array, *others) -> jax.Array:
    if once:
      targets = Targets(token_RT, token_RT >= 0, *others)
      head = Head(policy, {}, params)
      return sum_of_token_losses(head, hidden_RTD, targets, None, _loss)[0]
    hidden_RTD, token_RT = hidden_RTD[:, :-1], token_RT[:, 1:]
    return jnp.sum(policy.logprobs(params, hidden_RTD, token_RT, *others).logp_RT)

  inputs = (
    params,
    _array(ROWS, TOKENS + 1, shape.width),
    _array(ROWS, TOKENS + 1, dtype="int32"),
    _array(ROWS),  # temperatures
    _array(shape.vocabulary, dtype="bool"),  # forbidden tokens
  )
  compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*inputs).compile()
  return int(compiled.memory_analysis().temp_size_in_bytes)


def _loss(scores: TokenScores, _: None) -> tuple[jax.Array, Metrics]:
  return jnp.sum(scores.logp_RT), {}


def _array(*dims: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))


def main() -> None:
  """Prints the table."""
  table = Table("model", box=box.SIMPLE_HEAD)
  for name in (
    "vocabulary",
    "tokens at once",
    "their logits, MiB",
    "computed again, MiB",
    "once, MiB",
  ):
    table.add_column(name, justify="right")
  within = True
  for model in MODELS:
    shape = released(model).decoder
    for chunk in CHUNKS:
      logits = 4 * ROWS * chunk * shape.vocabulary
      used = [program_bytes(model, chunk, once) for once in (False, True)]
      limit = 3 * logits + 4 * shape.vocabulary * shape.width
      within &= chunk == TOKENS or max(used) <= limit
      sizes = (f"{size / MIB:,.0f}" for size in (logits, *used))
      table.add_row(model, f"{shape.vocabulary:,}", f"{chunk:,}", *sizes)
  make_console().print(table)
  sys.exit(not within)


if __name__ == "__main__":
  main()
