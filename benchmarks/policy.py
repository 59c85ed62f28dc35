"""Time of one forward or gradient pass: this policy and transformers, from one checkpoint.

    python -m benchmarks.policy [--shape=nano] [--what=forward|gradient] [--repeats=5] [--sides=...]

8 prompts of 64 text tokens and one image of 256 tokens: vision tower, decoder, and the
log-probability of every next token; with `gradient`, also the derivative by every parameter.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from torch.utils.checkpoint import checkpoint

from benchmarks import measure, peer, shapes
from benchmarks.measure import Benchmark, Timed
from spatial_jax.data.vision_packing import plan_vision
from spatial_jax.hf import weights
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.types import Params, TokenArrays, VisionBatch

WHAT = flags.DEFINE_enum(
  "what", "forward", ["forward", "gradient"], "forward pass alone, or with gradient"
)
LOGIT_CHUNK = 32  # tokens per row whose logits exist at once in the chunked variants
TOLERANCE = 1e-4


class Variant(NamedTuple):
  """`remat`: the backward pass computes layers again; `chunked`: logits are computed in chunks."""

  remat: bool
  chunked: bool


FORWARD = {
  "ours": Variant(False, True),
  "torch": Variant(False, False),
  "torch chunked": Variant(False, True),
}
GRADIENT = {
  "ours": Variant(False, True),
  "ours remat": Variant(True, True),
  "torch": Variant(False, False),
  "torch chunked": Variant(False, True),
  "torch remat chunked": Variant(True, True),
}


def variants() -> dict[str, Variant]:
  """The variants of this run, by name."""
  return measure.chosen(FORWARD if WHAT.value == "forward" else GRADIENT)


class Result(NamedTuple):
  """The result of one pass; the norm is 0 without a gradient."""

  mean_logp: float
  grad_norm: float


class Batch(NamedTuple):
  """The prompts as rows, and their images."""

  token_RT: np.ndarray
  position_RTA: np.ndarray
  feature_RT: np.ndarray
  vision: VisionBatch


# --- ours --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def forward(policy: Policy, params: Params, batch: Batch) -> jax.Array:
  """Mean log-probability of the next token."""
  features_MYD = policy.encode(params, batch.vision)
  valid_RT = jnp.ones(batch.token_RT.shape, bool)
  tokens = TokenArrays(batch.token_RT, batch.position_RTA, valid_RT, batch.feature_RT)
  hidden_RTD = policy.hidden(params, tokens, features_MYD)
  forbidden_V = jnp.zeros(policy.cfg.decoder.vocabulary, bool)
  temperature_R = jnp.ones(len(batch.token_RT), jnp.float32)
  target_RT = batch.token_RT[:, 1:]
  inputs = (hidden_RTD[:, :-1], target_RT, temperature_R, forbidden_V)
  logp_RT = policy.logprobs(params, *inputs).logp_RT
  return jnp.mean(logp_RT)


@functools.partial(jax.jit, static_argnums=0)
def gradient(policy: Policy, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, Params]:
  """The mean log-probability, the norm of its gradient, and the gradient."""
  value, grads = jax.value_and_grad(functools.partial(forward, policy))(params, batch)
  squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(grads)]
  return value, jnp.sqrt(jnp.sum(jnp.stack(squares))), grads


class Ours:
  """The functions of the policy, jitted as in training."""

  def __init__(self, folder: pathlib.Path):
    cfg = weights.read_config(folder)
    questions = shapes.questions(cfg)
    images = [question.image for question in questions]
    vision, index = plan_vision(images, cfg.vision.window_blocks, shapes.VISION_BUCKETS)
    feature_RT = np.full((len(questions), len(questions[0].token_ids_T)), -1, np.int32)
    for row, (question, tokens) in enumerate(zip(questions, index, strict=True)):
      feature_RT[row, question.image_start : question.image_start + len(tokens)] = tokens
    self._batch = jax.device_put(
      Batch(
        np.stack([question.token_ids_T for question in questions]),
        np.stack([question.position_TA for question in questions]),
        feature_RT,
        vision,
      )
    )
    self._policy = shapes.policy_of(cfg)
    self._params = shapes.load(folder, self._policy)

  def call_of(self, variant: Variant) -> Callable[[], Result]:
    """A function that makes one pass."""
    policy = dataclasses.replace(self._policy, remat=variant.remat, logprob_chunk=LOGIT_CHUNK)

    def call() -> Result:
      if WHAT.value == "forward":
        return Result(float(forward(policy, self._params, self._batch)), 0.0)
      value, norm, grads = gradient(policy, self._params, self._batch)
      jax.block_until_ready(grads)
      return Result(float(value), float(norm))

    return call


# --- torch -------------------------------------------------------------------------------------


class Torch:
  """The same rows as one batch of transformers."""

  def __init__(self, folder: pathlib.Path):
    cfg = weights.read_config(folder)
    questions = shapes.questions(cfg)
    self._model = peer.load(folder)
    self._inputs = peer.prompt_tensors(cfg, questions)
    positions = np.stack([question.position_TA for question in questions])
    self._position_ids = torch.tensor(positions.transpose(2, 0, 1)).long()

  def call_of(self, variant: Variant) -> Callable[[], Result]:
    """A function that makes one pass."""

    def call() -> Result:
      # Layers are checkpointed in training mode only; the model has no dropout.
      self._model.train(variant.remat)
      if variant.remat:
        self._model.activation_checkpointing_enable({"use_reentrant": False})
      else:
        self._model.activation_checkpointing_disable()
      if WHAT.value == "forward":
        with torch.no_grad():
          return Result(self._mean(variant).item(), 0.0)
      self._model.zero_grad(set_to_none=True)
      value = self._mean(variant)
      value.backward()
      norms = [p.grad.norm() for p in self._model.parameters() if p.grad is not None]
      return Result(value.item(), torch.stack(norms).norm().item())

    return call

  def _mean(self, variant: Variant) -> torch.Tensor:
    out = self._model.model(**self._inputs, position_ids=self._position_ids, use_cache=False)
    hidden_RTD, target_RT = out.last_hidden_state[:, :-1], self._inputs["input_ids"][:, 1:]
    table_VD = self._model.lm_head.weight
    if not variant.chunked:
      return _score(table_VD, hidden_RTD, target_RT).mean()
    pairs = zip(hidden_RTD.split(LOGIT_CHUNK, 1), target_RT.split(LOGIT_CHUNK, 1), strict=True)
    parts = [checkpoint(_score, table_VD, *pair, use_reentrant=False) for pair in pairs]
    return torch.cat(parts, dim=1).mean()


def _score(
  table_VD: torch.Tensor, hidden_RTD: torch.Tensor, target_RT: torch.Tensor
) -> torch.Tensor:
  logits = torch.nn.functional.linear(hidden_RTD, table_VD)
  return logits.gather(-1, target_RT[..., None])[..., 0] - logits.logsumexp(-1)


# --- both --------------------------------------------------------------------------------------


def time(folder: pathlib.Path) -> Timed:
  """Times of all variants, after their results were compared."""
  ours, theirs = Ours(folder), Torch(folder)
  calls = {
    side: (ours if side.startswith("ours") else theirs).call_of(variant)
    for side, variant in variants().items()
  }
  results = {side: call() for side, call in calls.items()}
  base, differences = next(iter(results.values())), {}
  for number, name in enumerate(base._fields):
    most = max(abs(result[number] - base[number]) for result in results.values())
    relative = most / max(abs(base[number]), 1e-30)
    measure.require_close(name, relative, TOLERANCE)
    differences[f"{name} ({base[number]:.4f}), relatively,"] = relative
  return Timed(measure.alternate(calls, measure.REPEATS.value), differences)


def load(side: str, folder: pathlib.Path) -> Callable[[], Result]:
  """The pass of one variant alone."""
  kind = Ours if side.startswith("ours") else Torch
  return kind(folder).call_of(variants()[side])


def main(argv: list[str]) -> None:
  """Measures and prints."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  length = shapes.TEXT_BEFORE + shapes.TEXT_AFTER + 2 + (shapes.IMAGE_PX // 28) ** 2
  measure.run(
    Benchmark(
      title=f"Policy, {WHAT.value}: {shapes.PROMPTS} prompts of 64 text tokens, an image of 256",
      unit="tokens",
      tokens=shapes.PROMPTS * length,
      sides=tuple(variants()),
      time=time,
      load=load,
      notes=(
        "Both include vision tower, decoder and the log-probability of every next token; with "
        "gradient, the derivative by all parameters. Both exclude preprocessing and optimizer.",
        f"Ours computes logits of {LOGIT_CHUNK} tokens at once, torch of all unless chunked. "
        "remat: the backward pass computes layers again.",
      ),
    )
  )


if __name__ == "__main__":
  app.run(main)
