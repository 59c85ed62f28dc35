"""Sampled tokens per second: this repository beside `generate` of transformers.

    python -m benchmarks.rollout [--shape=nano] [--repeats=5] [--out=rollout.json]

8 prompts x 8 samples, 64 tokens of text and one image of 256 tokens each, 128 new tokens for every
row at temperature 1. Both sides encode each image once and both must fill every row.
"""

import pathlib
from collections.abc import Callable

import jax
import numpy as np
import torch
from absl import app

from benchmarks import measure, peer, shapes
from benchmarks.measure import Benchmark, Timed
from spatial_jax import programs
from spatial_jax.data.vision import plan_vision
from spatial_jax.drawing.monitor import StopLimits
from spatial_jax.drawing.protocol import Limits
from spatial_jax.policy import weights
from spatial_jax.rollout.engine import RolloutConfig
from spatial_jax.rollout.sampler import PromptBatch, Sampling

OURS, TORCH = "ours", "torch generate"
ROWS = shapes.PROMPTS * shapes.GROUP
CHUNK = 16  # tokens per device call, as in training
COMPARED = 2  # prompts whose samples torch scores again
TOLERANCE = 1e-3  # of a log-probability, float32


class Ours:
  """The rollout programs of training: prompts prefilled once per group, then chunks of tokens."""

  def __init__(self, folder: pathlib.Path):
    policy = shapes.policy_of(weights.read_config(folder))
    questions = shapes.questions(policy.cfg)
    size = len(questions[0].token_ids_T)
    config = RolloutConfig(
      prompts=shapes.PROMPTS,
      group=shapes.GROUP,
      temperature=1.0,
      top_p=1.0,
      turn_tokens=shapes.RESPONSE,
      chunk=CHUNK,
      narrow=(),
      stop=StopLimits(turns=1, images=1, tokens=shapes.RESPONSE),
      limits=Limits(1, 1, 1, 1, 1, 1),
      prompt_buckets=(size,),
      observation_buckets=(1,),
      own_buckets=(shapes.RESPONSE // 2,),
      vision=shapes.VISION_BUCKETS,
    )
    self._programs = programs.rollout_programs(policy, config, shapes.stop_id(policy.cfg))
    unstack = programs.decode_params(policy, programs.train_mesh(policy))
    self._weights = unstack(shapes.load(folder, policy))
    images = [question.image for question in questions]
    blocks = policy.cfg.vision.window_blocks
    self._vision, index = plan_vision(images, blocks, shapes.VISION_BUCKETS)
    self._prompts = _prompt_batch(questions, index)
    self._forbidden_V = np.zeros(policy.cfg.decoder.vocabulary, bool)
    self._forbidden_V[list(shapes.forbidden_ids(policy.cfg))] = True
    self._calls = 0

  def __call__(self) -> tuple[np.ndarray, np.ndarray]:
    """Samples; tokens int32 and log-probabilities float32, both [R, 128]."""
    self._calls += 1
    run = self._programs
    sampling = Sampling(
      key_R=jax.random.split(jax.random.key(self._calls), ROWS),
      temperature=np.asarray(1.0, np.float32),
      top_p=np.asarray(1.0, np.float32),
      limit_R=np.full(ROWS, shapes.RESPONSE, np.int32),
      forbidden_V=self._forbidden_V,
    )
    features_MYD = run.encode(self._weights, self._vision)
    active_B = np.ones(shapes.PROMPTS, bool)
    state = run.start(self._weights, features_MYD, self._prompts, active_B)
    tokens, logps = [], []
    while np.asarray(state.active_R).any():
      state, token_RK, logp_RK = run.sample(self._weights, state, sampling, False, False)
      tokens.append(np.asarray(token_RK))
      logps.append(np.asarray(logp_RK))
    return _full(np.concatenate(tokens, axis=1)), np.concatenate(logps, axis=1)


class Torch:
  """`generate` with one prompt expanded to its samples: each image is encoded once."""

  def __init__(self, folder: pathlib.Path):
    cfg = weights.read_config(folder)
    self.model = peer.load(folder).eval()
    self._inputs = peer.prompt_tensors(cfg, shapes.questions(cfg))
    self._forbidden_ids = list(shapes.forbidden_ids(cfg))

  def __call__(self) -> np.ndarray:
    """Samples; tokens int64 [R, 128]."""
    with torch.no_grad():
      out_RT = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **self._inputs,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=shapes.GROUP,
        min_new_tokens=shapes.RESPONSE,
        max_new_tokens=shapes.RESPONSE,
        suppress_tokens=self._forbidden_ids,
      )
    return _full(out_RT[:, self._inputs["input_ids"].shape[1] :].numpy())


SIDES: dict[str, Callable[[pathlib.Path], Ours | Torch]] = {OURS: Ours, TORCH: Torch}


def time(folder: pathlib.Path) -> Timed:
  """Both sides in turn; torch scores what ours sampled, and must agree on its log-probabilities."""
  ours, theirs = Ours(folder), Torch(folder)
  token_RT, logp_RT = ours()
  theirs()
  scored_RT = _scored(folder, theirs, token_RT)
  difference = float(np.abs(scored_RT - logp_RT[: len(scored_RT)]).max())
  name = "log-probabilities of our samples, as recorded and as torch scores them,"
  measure.require_close(name, difference, TOLERANCE)
  return Timed(
    measure.alternate({OURS: ours, TORCH: theirs}, measure.REPEATS.value), {name: difference}
  )


def _scored(folder: pathlib.Path, theirs: Torch, token_RT: np.ndarray) -> np.ndarray:
  """Torch's log-probabilities of the responses of the first prompts, float32 [rows, 128]."""
  cfg = weights.read_config(folder)
  found = []
  with torch.no_grad():
    for number, question in enumerate(shapes.questions(cfg)[:COMPARED]):
      responses_RT = token_RT[number * shapes.GROUP : (number + 1) * shapes.GROUP]
      rows = peer.rows(cfg, question, responses_RT)
      found.append(peer.logprobs(theirs.model, rows, chunked=True, share_image=True))
  return torch.cat(found).numpy()


def _prompt_batch(questions: list[shapes.Question], index: tuple[np.ndarray, ...]) -> PromptBatch:
  """The prompts as the engine hands them to `start`; `index` are the features of each image."""
  token_BT = np.stack([question.token_ids_T for question in questions])
  feature_BT = np.full(token_BT.shape, -1, np.int32)
  for feature_T, question, features in zip(feature_BT, questions, index, strict=True):
    feature_T[question.image_start : question.image_start + len(features)] = features
  return PromptBatch(
    token_BT=token_BT,
    position_BTA=np.stack([question.position_TA for question in questions]),
    valid_BT=np.ones(token_BT.shape, bool),
    feature_BT=feature_BT,
    next_position_B=np.asarray([question.next_position for question in questions], np.int32),
  )


def _full(token_RT: np.ndarray) -> np.ndarray:
  """The tokens, once it is certain that every row has all of them."""
  if token_RT.shape != (ROWS, shapes.RESPONSE) or (token_RT < 0).any():
    raise ValueError(f"rows ended early: {token_RT.shape}, {(token_RT < 0).sum()} empty places")
  return token_RT


def main(argv: list[str]) -> None:
  """Measures and prints."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  measure.run(
    Benchmark(
      title=(
        f"Rollout: {shapes.PROMPTS} prompts x {shapes.GROUP} samples, 64 tokens of text and an "
        f"image of 256, {shapes.RESPONSE} new tokens for every row, temperature 1"
      ),
      unit="tokens",
      tokens=ROWS * shapes.RESPONSE,
      sides=tuple(SIDES),
      time=time,
      load=lambda side, folder: SIDES[side](folder),
      notes=(
        "Included on both sides: vision tower (each image once), prefill, sampling. Left out on "
        "both: pixels to patches, loading (ours: parameters unstacked, which training does once "
        "per step).",
        "Ours records the log-probability of each token, generate does not. Ours prefills a prompt "
        "once per group; generate (num_return_sequences) once per row.",
      ),
    )
  )


if __name__ == "__main__":
  app.run(main)
