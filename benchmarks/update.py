"""Seconds of one policy update: this repository and the same loss and optimizer in torch.

    python -m benchmarks.update [--shape=nano] [--case=image|frames|long] [--repeats=5]
        [--compared_steps=2] [--sides=...] [--out=update.json]

All parameters are trained, the vision tower too: clipped policy gradient, global clip, AdamW. The
cases are in `benchmarks.update_work`.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import torch
from absl import app, flags

from benchmarks import measure, peer, shapes
from benchmarks.measure import Benchmark, Timed
from benchmarks.update_work import CASES, LOSS, OPTIMIZER, make_batch, make_work
from spatial_jax import compiled, sharding
from spatial_jax.hf import weights
from spatial_jax.learn.gradient import NO_OTHERS
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.learn.train_batch import Microbatches
from spatial_jax.types import TrainBatch, TrainState

LOSS_TOLERANCE = 1e-4
NORM_TOLERANCE = 1e-3  # of the gradient's norm, relative to itself


class OursVariant(NamedTuple):
  """Settings of ours.

  Attributes:
    micro_rows: rows in a microbatch.
    remat: layers are recomputed in the backward pass.
    shared: the prefix runs once per group, else once per row.
  """

  micro_rows: int
  remat: bool
  shared: bool = True


class TorchVariant(NamedTuple):
  """Settings of torch; `share_image`: the vision tower runs once per prompt, not per row."""

  checkpointing: bool
  chunked_logits: bool
  share_image: bool


OURS = {
  "ours m32": OursVariant(32, False),
  "ours m8": OursVariant(8, False),
  "ours m8 remat": OursVariant(8, True),
  "ours m4 remat": OursVariant(4, True),
  "ours m4 remat unshared": OursVariant(4, True, shared=False),
}
TORCH = {
  "torch": TorchVariant(False, False, False),
  "torch chunked": TorchVariant(False, True, False),
  "torch remat": TorchVariant(True, False, False),
  "torch remat chunked": TorchVariant(True, True, False),
  "torch shared": TorchVariant(False, False, True),
  "torch remat chunked shared": TorchVariant(True, True, True),
}
LOGPROB_CHUNK = 64  # tokens per row of ours whose logits exist at once
CASE = flags.DEFINE_enum("case", "image", list(CASES), "sizes of the update")
MICRO_ROWS = flags.DEFINE_integer(
  "micro_rows", 8, "at most this number of rows in a microbatch of torch, of one prompt"
)
COMPARED_STEPS = flags.DEFINE_integer(
  "compared_steps",
  2,
  "steps from the checkpoint whose results are compared: the first shows loss and gradient, the "
  "next the optimizer",
  lower_bound=1,
)


class Step(NamedTuple):
  """The results of a step, of either side."""

  loss: float
  grad_norm: float


# --- ours --------------------------------------------------------------------------------------


class Ours:
  """The update program of training."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._cfg = weights.read_config(folder)
    self._work = make_work(self._cfg, CASES[CASE.value])
    self._policy = shapes.policy_of(self._cfg)
    self._mesh = compiled.train_mesh(self._policy)
    self._optimizer = make_optimizer(OPTIMIZER)
    self._state = self._initial()

  @functools.cache  # noqa: B019 - one object per process
  def _batch(self, shared: bool) -> TrainBatch:
    batch = make_batch(self._cfg, self._work, shared)
    return sharding.place_train_batch(batch, self._cfg.vision.window_patches, self._mesh)

  def _initial(self) -> TrainState:
    params = shapes.load(self._folder, self._policy)
    return compiled.init_state(self._policy, self._optimizer, params, self._mesh)

  def restart(self) -> None:
    """Loads the checkpoint again, with a new optimizer."""
    jax.tree.map(lambda x: x.delete(), self._state)  # before new ones are allocated
    self._state = self._initial()

  def step_of(self, variant: OursVariant) -> Callable[[], Step]:
    """Returns a function that makes one step."""
    policy = dataclasses.replace(self._policy, remat=variant.remat, logprob_chunk=LOGPROB_CHUNK)
    micro = Microbatches(variant.micro_rows, (self._work.case.row_tokens,))
    update = compiled.LearnPrograms(policy, self._optimizer, LOSS, micro).update
    batch = self._batch(variant.shared)

    def step() -> Step:
      state, metrics = update(self._state, batch, NO_OTHERS)
      self._state = jax.block_until_ready(state)
      return Step(float(metrics["loss"]), float(metrics["grad_norm"]))

    return step


# --- torch -------------------------------------------------------------------------------------


class Torch:
  """Rows as full sequences in microbatches, gradients accumulated, then the fused AdamW."""

  def __init__(self, folder: pathlib.Path):
    cfg = weights.read_config(folder)
    case = CASES[CASE.value]
    work, count = make_work(cfg, case), min(MICRO_ROWS.value, case.group)
    self._trained = case.trained
    self._folder = folder
    self._model = peer.load(folder).train()
    self._optimizer = _adamw(self._model)
    self._parts = []
    for first in range(0, case.rows, count):
      part = slice(first, first + count)
      question = work.questions[first // case.group]
      numbers = torch.tensor(work.old_logp_RT[part]), torch.tensor(work.advantage_R[part])
      self._parts.append((peer.rows(cfg, question, work.response_RT[part]), *numbers))

  def restart(self) -> None:
    """Loads the checkpoint again, with a new optimizer."""
    self._optimizer.zero_grad(set_to_none=True)
    self._optimizer.state.clear()  # before new ones are allocated
    self._model = peer.load(self._folder).train()
    self._optimizer = _adamw(self._model)

  def step_of(self, variant: TorchVariant) -> Callable[[], Step]:
    """Returns a function that makes one step."""

    def step() -> Step:
      if variant.checkpointing:
        self._model.activation_checkpointing_enable({"use_reentrant": False})
      else:
        self._model.activation_checkpointing_disable()
      self._optimizer.zero_grad(set_to_none=True)
      total = 0.0
      for rows, old_logp_RT, advantage_R in self._parts:
        logp_RT = peer.logprobs(self._model, rows, variant.chunked_logits, variant.share_image)
        loss = peer.policy_loss(logp_RT, old_logp_RT, advantage_R) / self._trained
        loss.backward()
        total += loss.item()
      norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), OPTIMIZER.max_grad_norm)
      self._optimizer.step()
      return Step(total, norm.item())

    return step


def _adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
  """As `make_optimizer`: no weight decay on norm scales, biases and embeddings."""
  decayed, plain = [], []
  for name, parameter in model.named_parameters():
    table = "embed_tokens" in name or "lm_head" in name
    (plain if table or parameter.ndim < 2 else decayed).append(parameter)
  return torch.optim.AdamW(
    [
      {"params": decayed, "weight_decay": OPTIMIZER.weight_decay},
      {"params": plain, "weight_decay": 0.0},
    ],
    lr=OPTIMIZER.learning_rate,
    betas=(OPTIMIZER.b1, OPTIMIZER.b2),
    eps=OPTIMIZER.eps,
    fused=True,
  )


# --- both --------------------------------------------------------------------------------------


def time(folder: pathlib.Path) -> Timed:
  """Times all sides in turn, after each made the same first steps from the checkpoint."""
  ours, theirs = Ours(folder), Torch(folder)
  calls = {side: ours.step_of(variant) for side, variant in OURS.items()}
  calls |= {side: theirs.step_of(variant) for side, variant in TORCH.items()}
  calls = measure.chosen(calls)
  first_steps = {}
  for side, step in calls.items():
    (ours if side in OURS else theirs).restart()
    first_steps[side] = [step() for _ in range(COMPARED_STEPS.value)]
  differences = _compare(first_steps)
  return Timed(measure.alternate(calls, measure.REPEATS.value), differences)


def load(side: str, folder: pathlib.Path) -> Callable[[], Step]:
  """Returns the step function of one side."""
  if side in OURS:
    return Ours(folder).step_of(OURS[side])
  return Torch(folder).step_of(TORCH[side])


def _compare(first_steps: dict[str, list[Step]]) -> dict[str, float]:
  """Returns the largest differences between the first side and any other, per step."""
  differences = {}
  base = next(iter(first_steps.values()))
  for number in range(COMPARED_STEPS.value):
    loss, norm = base[number]
    others = [steps[number] for steps in first_steps.values()]
    of_loss = max(abs(step.loss - loss) for step in others)
    of_norm = max(abs(step.grad_norm / norm - 1.0) for step in others)
    measure.require_close("loss", of_loss, LOSS_TOLERANCE)
    measure.require_close("gradient norm, relatively,", of_norm, NORM_TOLERANCE)
    differences[f"losses of step {number + 1} ({loss:.4f})"] = of_loss
    differences[f"gradient norms of step {number + 1} ({norm:.4f}), relatively,"] = of_norm
  return differences


def main(argv: list[str]) -> None:
  """Measures and prints."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  case = CASES[CASE.value]
  if case.group % min(MICRO_ROWS.value, case.group):
    raise app.UsageError(f"--micro_rows divides {case.group}; got {MICRO_ROWS.value}")
  prompt = shapes.TEXT_BEFORE + 258 * case.images + case.text_after
  measure.run(
    Benchmark(
      title=(
        f"Update, {CASE.value}: {case.prompts} prompts x {case.group} rollouts, prompts of "
        f"{prompt:,} tokens with {case.images} images, {case.response} trained tokens per row"
      ),
      unit="trained tokens",
      tokens=case.trained,
      sides=tuple(measure.chosen({**OURS, **TORCH})),
      time=time,
      load=load,
      notes=(
        "Included on both sides: vision tower, clipped policy gradient, global clip, AdamW on all "
        "parameters. Left out on both: making the batch, loading.",
        "Ours runs each image once, and each prompt once per group (unshared: once per row); m32, "
        f"m8, m4: rows in a microbatch; logits of {LOGPROB_CHUNK} tokens at once.",
        f"torch: full rows, {MICRO_ROWS.value} in a microbatch, logits of trained tokens only.",
        "remat: layers are recomputed in the backward pass. chunked: logits are recomputed, "
        f"{peer.LOGIT_CHUNK} tokens at once. shared: the image is encoded once for all rows of a "
        "microbatch; trainers encode it for each row.",
      ),
    )
  )


if __name__ == "__main__":
  app.run(main)
