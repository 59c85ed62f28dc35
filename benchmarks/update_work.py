"""The rollouts, the loss and the optimizer of `benchmarks.update`.

image    4 prompts x 8 rows: an image of 256 tokens and 64 of text, 256 trained tokens
frames   4 prompts x 8 rows: 4 such images and 64 of text, 128 trained tokens
long     1 prompt of 8,192 tokens x 4 rows, 256 trained tokens: the shared prefix
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from benchmarks import shapes
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.grammar import VILASR
from spatial_jax.learn.losses import EntropyConfig, ImportanceConfig, KlConfig, LossConfig
from spatial_jax.learn.optimizer import OptimizerConfig
from spatial_jax.learn.train_batch import BatchConfig, to_train_batch
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.types import Rollouts, TrainBatch, Trajectory

LONG_PROMPT = 8192  # tokens


class Case(NamedTuple):
  """Sizes of one update."""

  prompts: int
  group: int
  images: int  # of a prompt, 256 tokens each
  text_after: int  # tokens of text after the images
  response: int  # trained tokens of every row

  @property
  def rows(self) -> int:
    return self.prompts * self.group

  @property
  def trained(self) -> int:
    return self.rows * self.response

  @property
  def row_tokens(self) -> int:
    """A row begins with the last token of its prompt."""
    return self.response + 1


_LONG_TEXT = LONG_PROMPT - shapes.TEXT_BEFORE - 258
CASES = {
  "image": Case(4, 8, 1, shapes.TEXT_AFTER, 256),
  "frames": Case(4, 8, 4, shapes.TEXT_AFTER, 128),
  "long": Case(1, 4, 1, _LONG_TEXT, 256),
}
LOSS = LossConfig(
  kind="clip",
  clip_low=0.2,
  clip_high=0.3,
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


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
  """The rollouts of the update: a response, its log-probabilities and an advantage per row."""

  case: Case
  questions: list[shapes.Question]
  response_RT: np.ndarray
  old_logp_RT: np.ndarray
  advantage_R: np.ndarray


def make_work(cfg: QwenVLConfig, case: Case) -> Work:
  """Random responses with log-probabilities close to those of random weights: few are clipped."""
  random = np.random.default_rng(1)
  shape = (case.rows, case.response)
  noise_RT = random.normal(0.0, 0.2, shape)
  return Work(
    case=case,
    questions=shapes.questions(cfg, case.prompts, case.images, text_after=case.text_after),
    response_RT=shapes.words(cfg, case.trained, random).reshape(shape),
    old_logp_RT=(noise_RT - np.log(cfg.decoder.vocabulary)).astype(np.float32),
    advantage_R=random.normal(0.0, 1.0, case.rows).astype(np.float32),
  )


def make_batch(cfg: QwenVLConfig, work: Work, shared: bool) -> TrainBatch:
  """The TrainBatch; without `shared` every row has a prefix of its own."""
  case, question = work.case, work.questions[0]
  images = case.prompts * case.images
  batch_cfg = BatchConfig(
    prefix_buckets=(len(question.token_ids_T) - 1,),
    tokens=case.row_tokens,
    vision=VisionBuckets((images * shapes.WINDOWS,), (images,), (shapes.PATCHES,)),
    window_blocks=cfg.vision.window_blocks,
    vocabulary=cfg.decoder.vocabulary,
  )
  rows, size = _trajectories(cfg, work), case.group if shared else 1
  groups: Rollouts = [rows[i : i + size] for i in range(0, case.rows, size)]
  batch, _ = to_train_batch(groups, work.advantage_R.reshape(-1, size), batch_cfg)
  return batch


def _trajectories(cfg: QwenVLConfig, work: Work) -> list[Trajectory]:
  """The work as trajectories, the input of `to_train_batch`."""
  case = work.case

  def trajectory(number: int) -> Trajectory:
    question = work.questions[number // case.group]
    prompt = len(question.token_ids_T)
    following_TA = question.next_position + np.arange(case.response)[:, None].repeat(3, axis=1)
    trained_T = np.arange(prompt + case.response) >= prompt
    untrained_T = np.zeros(prompt, np.float32)
    return Trajectory(
      task_id=f"question-{number // case.group}",
      sample=number % case.group,
      seed_path=(),
      temperature=1.0,
      forbidden_ids=shapes.forbidden_ids(cfg),
      token_ids_T=np.concatenate([question.token_ids_T, work.response_RT[number]]),
      position_TA=np.concatenate([question.position_TA, following_TA.astype(np.int32)]),
      trained_T=trained_T,
      logp_T=np.concatenate([untrained_T, work.old_logp_RT[number]]),
      policy_step_T=np.where(trained_T, 0, -1).astype(np.int32),
      images=question.images,
      image_start=question.image_starts,
      prompt_length=prompt,
      prompt_images=case.images,
      turns=(),
      end_reason="token_limit",
      grammar=VILASR,
    )

  return [trajectory(number) for number in range(case.rows)]
