"""Seconds of one policy update: this repository and the same loss and optimizer in torch.

    python -m benchmarks.update [--shape=nano] [--repeats=5] [--sides=...] [--out=update.json]

8 prompts x 8 rollouts, 64 tokens of text and one image of 256 tokens each, 128 trained tokens.
All parameters are trained, the vision tower too: clipped policy gradient, global clip, AdamW.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import torch
from absl import app, flags

from benchmarks import measure, peer, shapes
from benchmarks.measure import Benchmark, Timed
from spatial_jax import compiled, sharding
from spatial_jax.grammar import VILASR
from spatial_jax.hf import weights
from spatial_jax.learn.gradient import NO_OTHERS
from spatial_jax.learn.losses import EntropyConfig, ImportanceConfig, KlConfig, LossConfig
from spatial_jax.learn.optimizer import OptimizerConfig, make_optimizer
from spatial_jax.learn.train_batch import BatchConfig, Microbatches, to_train_batch
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.types import Rollouts, TrainState, Trajectory

ROWS = shapes.PROMPTS * shapes.GROUP
TOKENS = ROWS * shapes.RESPONSE
ROW_TOKENS = shapes.RESPONSE + 1  # a row begins with the last token of its prompt
CLIP_LOW, CLIP_HIGH = 0.2, 0.3
LOSS = LossConfig(
  kind="clip",
  clip_low=CLIP_LOW,
  clip_high=CLIP_HIGH,
  dual_clip=0.0,
  sapo_positive=1.0,
  sapo_negative=1.0,
  normalise="token",
  length_constant=0,
  kl=KlConfig(0.0, 0.0, 0, "k3", "loss", "start"),
  importance=ImportanceConfig("none", 2.0, 0.5),
  entropy=EntropyConfig(0.0, 1.0),
)
OPTIMIZER = OptimizerConfig(
  kind="adamw",
  learning_rate=1e-4,
  rates=(),
  schedule="constant",
  warmup_steps=0,
  total_steps=1000,
  decay_steps=0,
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  mu_dtype="float32",
  gradient_dtype="float32",
  weight_decay=0.01,
  max_grad_norm=1.0,
  scale_by_param_rms=False,
  frozen=(),
  ema_decay=0.0,
)
COMPARED_STEPS = 2  # from the checkpoint: the first shows loss and gradient, the next the optimizer
LOSS_TOLERANCE = 1e-4
NORM_TOLERANCE = 1e-3  # of the gradient's norm, relative to itself


class OursVariant(NamedTuple):
  """Settings of ours: rows in a microbatch, recomputation of layers, tokens with logits at once."""

  micro_rows: int
  remat: bool
  logprob_chunk: int


class TorchVariant(NamedTuple):
  """Settings of torch; `share_image`: the vision tower runs once per prompt, not per row."""

  checkpointing: bool
  chunked_logits: bool
  share_image: bool


OURS = {
  "ours m64": OursVariant(64, False, 32),
  "ours m16": OursVariant(16, False, 32),
  "ours m8": OursVariant(8, False, 32),
  "ours m8 remat": OursVariant(8, True, 32),
}
TORCH = {
  "torch": TorchVariant(False, False, False),
  "torch chunked": TorchVariant(False, True, False),
  "torch remat": TorchVariant(True, False, False),
  "torch remat chunked": TorchVariant(True, True, False),
  "torch shared": TorchVariant(False, False, True),
  "torch remat chunked shared": TorchVariant(True, True, True),
}
MICRO_ROWS = flags.DEFINE_integer("micro_rows", 8, "rows in a microbatch of torch, of one prompt")


class Step(NamedTuple):
  """The results of a step, of either side."""

  loss: float
  grad_norm: float


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
  """The rollouts of the update: a response, its log-probabilities and an advantage per row."""

  questions: list[shapes.Question]
  response_RT: np.ndarray
  old_logp_RT: np.ndarray
  advantage_R: np.ndarray


def make_work(cfg: QwenVLConfig) -> Work:
  """Random responses with log-probabilities close to those of random weights: few are clipped."""
  random = np.random.default_rng(1)
  shape = (ROWS, shapes.RESPONSE)
  noise_RT = random.normal(0.0, 0.2, shape)
  return Work(
    questions=shapes.questions(cfg),
    response_RT=shapes.words(cfg, TOKENS, random).reshape(shape),
    old_logp_RT=(noise_RT - np.log(cfg.decoder.vocabulary)).astype(np.float32),
    advantage_R=random.normal(0.0, 1.0, ROWS).astype(np.float32),
  )


# --- ours --------------------------------------------------------------------------------------


class Ours:
  """The update program of training."""

  def __init__(self, folder: pathlib.Path):
    cfg = weights.read_config(folder)
    work = make_work(cfg)
    batch_cfg = BatchConfig(
      prefix_buckets=(len(work.questions[0].token_ids_T) - 1,),
      tokens=ROW_TOKENS,
      vision=shapes.VISION_BUCKETS,
      window_blocks=cfg.vision.window_blocks,
      vocabulary=cfg.decoder.vocabulary,
    )
    advantage_BG = work.advantage_R.reshape(shapes.PROMPTS, shapes.GROUP)
    batch, _ = to_train_batch(_rollouts(cfg, work), advantage_BG, batch_cfg)
    self._folder = folder
    self._policy = shapes.policy_of(cfg)
    self._mesh = compiled.train_mesh(self._policy)
    window = cfg.vision.window_patches
    self._batch = sharding.place_train_batch(batch, window, self._mesh)
    self._optimizer = make_optimizer(OPTIMIZER)
    self._state = self._initial()

  def _initial(self) -> TrainState:
    params = shapes.load(self._folder, self._policy)
    return compiled.init_state(self._policy, self._optimizer, params, self._mesh)

  def restart(self) -> None:
    """Loads the checkpoint again, with a new optimizer."""
    jax.tree.map(lambda x: x.delete(), self._state)  # before new ones are allocated
    self._state = self._initial()

  def step_of(self, variant: OursVariant) -> Callable[[], Step]:
    """Returns a function that makes one step."""
    policy = dataclasses.replace(
      self._policy, remat=variant.remat, logprob_chunk=variant.logprob_chunk
    )
    micro = Microbatches(variant.micro_rows, (ROW_TOKENS,))
    update = compiled.LearnPrograms(policy, self._optimizer, LOSS, micro).update

    def step() -> Step:
      state, metrics = update(self._state, self._batch, NO_OTHERS)
      self._state = jax.block_until_ready(state)
      return Step(float(metrics["loss"]), float(metrics["grad_norm"]))

    return step


def _rollouts(cfg: QwenVLConfig, work: Work) -> Rollouts:
  """The work as trajectories, the input of `to_train_batch`."""

  def trajectory(number: int) -> Trajectory:
    question = work.questions[number // shapes.GROUP]
    prompt = len(question.token_ids_T)
    following_TA = question.next_position + np.arange(shapes.RESPONSE)[:, None].repeat(3, axis=1)
    trained_T = np.arange(prompt + shapes.RESPONSE) >= prompt
    untrained_T = np.zeros(prompt, np.float32)
    return Trajectory(
      task_id=f"question-{number // shapes.GROUP}",
      sample=number % shapes.GROUP,
      seed_path=(),
      temperature=1.0,
      forbidden_ids=shapes.forbidden_ids(cfg),
      token_ids_T=np.concatenate([question.token_ids_T, work.response_RT[number]]),
      position_TA=np.concatenate([question.position_TA, following_TA.astype(np.int32)]),
      trained_T=trained_T,
      logp_T=np.concatenate([untrained_T, work.old_logp_RT[number]]),
      policy_step_T=np.where(trained_T, 0, -1).astype(np.int32),
      images=(question.image,),
      image_start=(question.image_start,),
      prompt_length=prompt,
      prompt_images=1,
      turns=(),
      end_reason="token_limit",
      grammar=VILASR,
    )

  rows = [trajectory(number) for number in range(ROWS)]
  return [rows[i : i + shapes.GROUP] for i in range(0, ROWS, shapes.GROUP)]


# --- torch -------------------------------------------------------------------------------------


class Torch:
  """Rows as full sequences in microbatches, gradients accumulated, then the fused AdamW."""

  def __init__(self, folder: pathlib.Path):
    cfg = weights.read_config(folder)
    work, count = make_work(cfg), MICRO_ROWS.value
    self._folder = folder
    self._model = peer.load(folder).train()
    self._optimizer = _adamw(self._model)
    self._parts = []
    for first in range(0, ROWS, count):
      part = slice(first, first + count)
      question = work.questions[first // shapes.GROUP]
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
        loss = _policy_loss(logp_RT, old_logp_RT, advantage_R)
        loss.backward()
        total += loss.item()
      norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), OPTIMIZER.max_grad_norm)
      self._optimizer.step()
      return Step(total, norm.item())

    return step


def _policy_loss(
  logp_RT: torch.Tensor, old_logp_RT: torch.Tensor, advantage_R: torch.Tensor
) -> torch.Tensor:
  """`spatial_jax.learn.losses.policy_loss`: the part of a microbatch of the mean over tokens."""
  ratio_RT = torch.exp(logp_RT - old_logp_RT)
  clipped_RT = ratio_RT.clamp(1.0 - CLIP_LOW, 1.0 + CLIP_HIGH)
  surrogate_RT = torch.minimum(ratio_RT * advantage_R[:, None], clipped_RT * advantage_R[:, None])
  return -surrogate_RT.sum() / TOKENS


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
    first_steps[side] = [step() for _ in range(COMPARED_STEPS)]
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
  for number in range(COMPARED_STEPS):
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
  if shapes.GROUP % MICRO_ROWS.value:
    raise app.UsageError(f"--micro_rows divides {shapes.GROUP}; got {MICRO_ROWS.value}")
  measure.run(
    Benchmark(
      title=(
        f"Update: {shapes.PROMPTS} prompts x {shapes.GROUP} rollouts, 64 tokens of text and an "
        f"image of 256, {shapes.RESPONSE} trained tokens for every row"
      ),
      unit="trained tokens",
      tokens=TOKENS,
      sides=tuple(measure.chosen({**OURS, **TORCH})),
      time=time,
      load=load,
      notes=(
        "Included on both sides: vision tower, clipped policy gradient, global clip, AdamW on all "
        "parameters. Left out on both: making the batch, loading.",
        "Ours runs each image and each prompt once per group; m64, m16, m8: rows in a microbatch; "
        "logits of 32 tokens at once.",
        f"torch: full rows, {MICRO_ROWS.value} in a microbatch, logits of trained tokens only.",
        "remat: layers are recomputed in the backward pass. chunked: logits are recomputed, "
        f"{peer.LOGIT_CHUNK} tokens at once. shared: the image is encoded once for all rows of a "
        "microbatch; trainers encode it for each row.",
      ),
    )
  )


if __name__ == "__main__":
  app.run(main)
