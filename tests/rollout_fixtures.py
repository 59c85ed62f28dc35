"""Small rollouts: a trained tokenizer, a policy of random weights, and a scripted policy."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiny.tokenizer import train_tokenizer
from spatial_jax import compiled
from spatial_jax.data.chat_template import CHATML
from spatial_jax.data.prompt_form import PromptForm
from spatial_jax.data.prompt_text import TextConfig
from spatial_jax.data.tokenizer import IM_END, IMAGE_PAD
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.drawing.parser import Limits, Parsed, parse
from spatial_jax.drawing.termination import StopLimits
from spatial_jax.grammar import VILASR
from spatial_jax.learn.gradient import batch_logprobs
from spatial_jax.learn.train_batch import BatchConfig, Microbatches, to_train_batch
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.rollout import request as request_lib
from spatial_jax.rollout.config import RolloutConfig, SamplingParams
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.engine import Engine, RolloutPrograms, forbidden_ids, stop_ids
from spatial_jax.types import ImageRef, ObjectBox, Operation, Params, Rollouts, Task, Trajectory
from tests.policy_fixtures import (
  PREPROCESS,
  VIDEO_CONFIG,
  hashed_params,
  pixels,
  small_config,
  with_ids,
)

VOCABULARY = 384  # the last rows of the embedding belong to no token
BOX_TURN = (
  "<think> I mark the chair. </think> Action: Object Mapper\n"
  '```json\n[{"index": 1, "bbox_2d": [2, 3, 15, 17], "label": "chair"}]\n```'
)
ANSWER_TURN = "<think> chair 2.1 m. </think> Action: Answer\n<answer> 2.1 </answer>"
TOKENIZER = train_tokenizer([BOX_TURN, ANSWER_TURN, "How far is the chair?"] * 4, VOCABULARY - 8)
STOP = TOKENIZER.id(IM_END)
PADS = (TOKENIZER.id(IMAGE_PAD),)
WORDS = TextConfig(
  "", "{index}\n", "{question}", "", " N", " L", " W", "{index}\n", "more", "final"
)
FORM = PromptForm(WORDS, VILASR)
STYLE = Style(line_px=1, dot_px=1, font_px=6, label_offset_px=(1, 1))
SAMPLED = SamplingParams(
  temperature=1.0, greedy=False, top_k=0, top_p=1.0, min_p=0.0, max_tokens_per_turn=0
)
GREEDY = dataclasses.replace(SAMPLED, greedy=True)
ROLLOUT = RolloutConfig(
  prompts=3,
  group=2,
  slots=3,
  rows=0,
  prefill=(1, 2),
  append=(1, 4),
  decode_steps=3,
  gather_fractions=(0.5, 0.16),
  schedule="logical",
  drawing_delay=1,
  weights="compute",
  sampling=SAMPLED,
  max_tokens_per_turn=8,
  stop=StopLimits(
    max_turns=3, max_images=4, max_image_tokens=256, max_response_tokens=112, near_duplicate_px=0.0
  ),
  stop_tokens=(IM_END,),
  stop_strings=(),
  limits=Limits(4, 2000, 8, 8, 40, 6),
  prompt_buckets=(48, 96),
  observation_buckets=(32, 64),
  suffix_block_edges=(7, 60),
  feature_buffer_tokens=256,
  vision=VisionBuckets((8, 32, 128), (2, 8, 32), (64,)),
)


def policy_config() -> QwenVLConfig:
  """The small policy with the ids of the tokenizer."""
  cfg = small_config(tied=False)
  decoder = dataclasses.replace(cfg.decoder, vocabulary=VOCABULARY, layers=2)
  return with_ids(dataclasses.replace(cfg.vision, layers=2), decoder, TOKENIZER)


def random_policy() -> tuple[Policy, Params]:
  """Weights with which about every third turn ends by its stop token."""
  cfg = policy_config()
  params = hashed_params(cfg, 3)
  head_VD = params["decoder"]["head"]["embedding"] * 1.5
  params["decoder"]["head"] = {"embedding": head_VD.at[STOP].multiply(2.2)}
  return make_policy(cfg, jnp.dtype("float32"), remat=False), params


def task(name: str, sizes: Sequence[tuple[int, int]] = ((24, 24),), question: str = "") -> Task:
  """A question about noise images of the given (height, width), which are not resized."""
  media = tuple(ImageRef(pixels(len(name) + 7 * i, h, w)) for i, (h, w) in enumerate(sizes))
  return Task(
    task_id=name,
    question_type="object_abs_distance",
    question=question or "How far is the chair?",
    options=None,
    answer="2.1",
    answer_kind="number",
    unit=None,
    media=media,
    source="procedural",
    scene_id="room",
    benchmark=None,
    boxes=(ObjectBox("chair", 0, (2.0, 3.0, 15.0, 17.0), 2.1),),
  )


def conversation(cfg: QwenVLConfig | None = None) -> Conversation:
  return Conversation(TOKENIZER, FORM, CHATML, PREPROCESS, VIDEO_CONFIG, cfg or policy_config())


def shapes() -> BatchConfig:
  blocks = policy_config().vision.window_blocks
  return BatchConfig((96, 256), 256, ROLLOUT.vision, blocks, VOCABULARY)


def make_engine(programs: RolloutPrograms, cfg: RolloutConfig) -> Engine:
  encodes, executor = conversation(), Executor(ExecutorConfig(0, 20.0, 1024), STYLE)
  return Engine(encodes, programs, executor, cfg, stop_ids(encodes, cfg))


def real_engine(policy: Policy, cfg: RolloutConfig) -> Engine:
  encodes = conversation()
  stops = stop_ids(encodes, cfg)
  programs = compiled.rollout_programs(policy, cfg, forbidden_ids(encodes, stops), stops)
  return make_engine(programs, cfg)


def flat(rollouts: Rollouts) -> list[Trajectory]:
  return [trajectory for group in rollouts for trajectory in group]


def sampled_ids(trajectory: Trajectory) -> list[int]:
  return trajectory.token_ids_T[trajectory.trained_T].tolist()


def decode_params(policy: Policy, params: Params) -> Params:
  return jax.jit(policy.unstack)(params)


# --- the random policy, made once ----------------------------------------------------------------


@functools.cache
def policy_and_params() -> tuple[Policy, Params, Params]:
  """The random policy, its train parameters and its decode parameters."""
  policy, params = random_policy()
  return policy, params, decode_params(policy, params)


@functools.cache
def engine_for(cfg: RolloutConfig) -> Engine:
  """The engine of the random policy; configs that differ only on the host share its programs."""
  shapes = {name: vars(cfg)[name] for name in ("slots", "group", "rows", "decode_steps", "stop")}
  shapes |= {name: vars(cfg)[name] for name in ("suffix_block_edges", "feature_buffer_tokens")}
  device = dataclasses.replace(ROLLOUT, stop_tokens=cfg.stop_tokens, **shapes)
  return make_engine(_programs_for(device), cfg)


@functools.cache
def _programs_for(cfg: RolloutConfig) -> RolloutPrograms:
  return real_engine(policy_and_params()[0], cfg).programs


def draw_in_all_turns(monkeypatch: pytest.MonkeyPatch) -> None:
  """Random weights write no protocol: a turn that ends by itself draws boxes, by its text."""

  def boxes(text, coordinates, limits, grammar) -> Parsed:
    parsed = parse(text, coordinates, limits, grammar)
    images = range(1, 1 + min(len(coordinates.sizes), 1 + len(text) % 2))
    box = (1.0, 2.0, 9.0, 3.0 + len(text.encode()) % 11)
    operations = tuple(Operation("box", i, box, text[:3]) for i in images)
    return dataclasses.replace(parsed, operations=operations, answer_text=None)

  monkeypatch.setattr(request_lib, "parse", boxes)


def largest_difference(rollouts: Rollouts) -> float:
  """Between the recorded log-probabilities and those of the trainer, nats."""
  policy, params, _ = policy_and_params()
  advantage_BG = np.zeros((len(rollouts), len(rollouts[0])))
  batch, _ = to_train_batch(rollouts, advantage_BG, shapes())
  micro = Microbatches(2, (64, batch.rows.tokens.token_RT.shape[1]))
  logp_RT = np.asarray(jax.jit(functools.partial(batch_logprobs, policy, micro))(params, batch))
  assert batch.rows.trained_RT.sum() == sum(t.trained_T.sum() for t in flat(rollouts))
  assert np.isfinite(logp_RT).all()
  assert (logp_RT[~batch.rows.trained_RT] == 0).all()
  return float(np.abs(logp_RT - batch.rows.old_logp_RT)[batch.rows.trained_RT].max())


# --- programs of tests ---------------------------------------------------------------------------

Around = Callable[..., Any]  # (name, program, *arguments) -> result of the program


class WatchedPrograms(RolloutPrograms):
  """Programs whose calls go through a function of the test."""

  def __init__(self, programs: RolloutPrograms, around: Around):
    self._programs, self._around = programs, around

  def empty_state(self, *arguments):
    return self._programs.empty_state(*arguments)

  def empty_feature_buffer(self):
    return self._programs.empty_feature_buffer()

  def encode_images(self, *arguments):
    return self._around("encode_images", self._programs.encode_images, *arguments)

  def prefill(self, *arguments):
    return self._around("prefill", self._programs.prefill, *arguments)

  def start_rows(self, *arguments):
    return self._around("start_rows", self._programs.start_rows, *arguments)

  def decode(self, *arguments):
    return self._around("decode", self._programs.decode, *arguments)

  def append(self, *arguments):
    return self._around("append", self._programs.append, *arguments)


def watch(engine: Engine, around: Around) -> Engine:
  """The engine with the calls of its programs going through `around`."""
  return dataclasses.replace(engine, programs=WatchedPrograms(engine.programs, around))


Script = Sequence[Sequence[int]]  # the turns of one rollout, as token ids


def turn_ids(text: str) -> list[int]:
  """A turn that ends by its stop token."""
  return [*TOKENIZER.encode(text), STOP]


@dataclasses.dataclass(eq=False)
class ScriptedState:
  """For each slot its first script; for each row its script, turn, and position in the turn."""

  first_B: np.ndarray
  script_R: np.ndarray
  turn_R: np.ndarray
  position_R: np.ndarray
  count_R: np.ndarray
  limit_R: np.ndarray
  active_R: np.ndarray


class ScriptedPrograms(RolloutPrograms):
  """Programs without a policy: rollout i, in the order of prompts, writes `scripts[i]`."""

  def __init__(self, scripts: Sequence[Script], cfg: RolloutConfig):
    self._scripts, self._cfg, self._prefilled = scripts, cfg, 0

  def empty_state(self, prefix_size) -> Any:
    self._prefilled, rows = 0, self._cfg.row_count
    first_B, of_rows = np.zeros(self._cfg.slots, int), (np.zeros(rows, int) for _ in range(5))
    return ScriptedState(first_B, *of_rows, np.zeros(rows, bool))

  def empty_feature_buffer(self):
    width = policy_config().decoder.width
    return np.zeros((self._cfg.feature_buffer_tokens, 1, width), np.float32)

  def encode_images(self, params, feature_buffer_MYD, vision, buffer_row_M) -> Any:
    return feature_buffer_MYD, 0

  def prefill(self, params, state: Any, feature_buffer_MYD, prompts) -> Any:
    for slot in prompts.slot_B:
      if slot < self._cfg.slots:
        state.first_B[slot] = self._prefilled
        self._prefilled += self._cfg.group
    return state, 0

  def start_rows(self, state: Any, starts_R, rollout_R, row_BG, sampling) -> Any:
    assert not state.active_R[starts_R].any(), "the row is not free"
    slot_R, sample_R = np.divmod(rollout_R[starts_R], self._cfg.group)
    state.script_R[starts_R] = state.first_B[slot_R] + sample_R
    state.turn_R[starts_R] = state.position_R[starts_R] = state.count_R[starts_R] = 0
    state.limit_R[starts_R] = sampling.limit_R[starts_R]
    state.active_R[starts_R] = True
    return state

  def decode(self, params, state: Any, halt_R, row_R, truncate) -> Any:
    state.active_R &= ~halt_R
    rows = np.arange(len(halt_R)) if row_R is None else row_R
    shape = (len(rows), self._cfg.decode_steps)
    token_RT, logp_RT = np.full(shape, -1), np.zeros(shape, np.float32)
    for i, r in enumerate(rows):
      if r >= len(halt_R) or not state.active_R[r]:
        continue
      turn = self._scripts[state.script_R[r]][state.turn_R[r]]
      for k in range(self._cfg.decode_steps):
        token_RT[i, k], logp_RT[i, k] = turn[state.position_R[r]], -1.0
        state.position_R[r] += 1
        state.count_R[r] += 1
        if token_RT[i, k] == STOP or state.count_R[r] == state.limit_R[r]:
          state.active_R[r], state.position_R[r] = False, 0
          state.turn_R[r] += 1
          break
    return state, token_RT, logp_RT

  def append(self, params, state: Any, feature_buffer_MYD, observations) -> Any:
    for i, r in enumerate(observations.row_R):
      if r < len(state.active_R):
        assert not state.active_R[r], "observations are appended to rows that do not sample"
        assert state.count_R[r] == observations.count_R[i]
        state.active_R[r], state.limit_R[r] = True, observations.limit_R[i]
    return state, 0


def scripted_engine(scripts: Sequence[Sequence[str]], cfg: RolloutConfig) -> Engine:
  """An engine in which rollout i writes the turns `scripts[i]`."""
  ids = [[turn_ids(turn) for turn in script] for script in scripts]
  return make_engine(ScriptedPrograms(ids, cfg), cfg)
