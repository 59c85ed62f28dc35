"""Rollouts in small: a tokenizer of the protocol, a policy of random weights, a scripted one."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax import compiled
from spatial_jax.data.prompt_text import TextConfig
from spatial_jax.data.tokenizer import IM_END, train_tokenizer
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.drawing.parser import Limits
from spatial_jax.drawing.termination import StopLimits
from spatial_jax.learn.train_batch import BatchConfig
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.rollout.config import RolloutConfig, SamplingParams
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.engine import Engine, RolloutPrograms, stop_ids
from spatial_jax.types import ObjectBox, Params, Task
from tests.policy_fixtures import PREPROCESS, hashed_params, picture, small_config, with_ids

VOCABULARY = 384  # the last rows of the embedding belong to no token
BOX_TURN = (
  "<think> I mark the chair. </think> Action: Object Mapper\n"
  '```json\n[{"index": 1, "bbox_2d": [2, 3, 15, 17], "label": "chair"}]\n```'
)
ANSWER_TURN = "<think> chair 2.1 m. </think> Action: Answer\n<answer> 2.1 </answer>"
TOKENIZER = train_tokenizer([BOX_TURN, ANSWER_TURN, "How far is the chair?"] * 4, VOCABULARY - 8)
STOP = TOKENIZER.id(IM_END)
WORDS = TextConfig("", "{index}\n", "{question}", " N", " L", "{index}\n", "more", "final", "", 0.0)
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
  stop=StopLimits(max_turns=3, max_images=4, max_image_tokens=256, max_response_tokens=112),
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
  """The small policy with the tokenizer's ids."""
  cfg = small_config(tied=False)
  decoder = dataclasses.replace(cfg.decoder, vocabulary=VOCABULARY, layers=2)
  return with_ids(dataclasses.replace(cfg.vision, layers=2), decoder, TOKENIZER)


def random_policy() -> tuple[Policy, Params]:
  """Weights under which every third turn or so ends by its end token."""
  cfg = policy_config()
  params = hashed_params(cfg, 3)
  head_VD = params["decoder"]["head"]["embedding"] * 1.5
  params["decoder"]["head"] = {"embedding": head_VD.at[STOP].multiply(2.2)}
  return make_policy(cfg, jnp.dtype("float32"), remat=False), params


def task(name: str, sizes: Sequence[tuple[int, int]] = ((24, 24),), question: str = "") -> Task:
  """A question about noise: (height, width) of each picture, no larger than the policy sees."""
  images = tuple(picture(len(name) + 7 * i, h, w) for i, (h, w) in enumerate(sizes))
  return Task(
    task_id=name,
    question_type="object_abs_distance",
    question=question or "How far is the chair?",
    options=None,
    answer="2.1",
    answer_kind="number",
    images=images,
    source="procedural",
    scene_id="room",
    benchmark=None,
    boxes=(ObjectBox("chair", 0, (2.0, 3.0, 15.0, 17.0), 2.1),),
  )


def conversation(cfg: QwenVLConfig | None = None) -> Conversation:
  return Conversation(TOKENIZER, WORDS, PREPROCESS, cfg or policy_config())


def shapes() -> BatchConfig:
  blocks = policy_config().vision.window_blocks
  return BatchConfig((96, 256), 256, ROLLOUT.vision, blocks, VOCABULARY)


def make_engine(run: RolloutPrograms, cfg: RolloutConfig) -> Engine:
  reads, executor = conversation(), Executor(ExecutorConfig(0, 20.0, 1024), STYLE)
  return Engine(reads, run, executor, cfg, stop_ids(reads, cfg))


def real_engine(policy: Policy, cfg: RolloutConfig) -> Engine:
  reads = conversation()
  run = compiled.rollout_programs(policy, cfg, reads.forbidden_ids, stop_ids(reads, cfg))
  return make_engine(run, cfg)


# --- a policy that says what it is told ----------------------------------------------------------

Script = Sequence[Sequence[int]]  # the turns of one rollout, as token ids


def say(text: str) -> list[int]:
  """A turn that ends of itself."""
  return [*TOKENIZER.encode(text), STOP]


@dataclasses.dataclass(eq=False)
class ScriptedState:
  """Of each slot: its first script. Of each row: its script, the turn it is at, what was said."""

  first_B: np.ndarray
  script_R: np.ndarray
  turn_R: np.ndarray
  said_R: np.ndarray
  count_R: np.ndarray
  limit_R: np.ndarray
  active_R: np.ndarray


def scripted(scripts: Sequence[Script], cfg: RolloutConfig) -> RolloutPrograms:
  """Programs without a policy: rollout i, in the order of prompts, says `scripts[i]`."""
  rows = cfg.row_count
  admitted = [0]

  def empty(size) -> ScriptedState:
    admitted[0] = 0
    first_B, of_rows = np.zeros(cfg.slots, int), (np.zeros(rows, int) for _ in range(5))
    return ScriptedState(first_B, *of_rows, np.zeros(rows, bool))

  def admit(params, state, feature_buffer_MYD, prompts):
    for slot in prompts.slot_B:
      if slot < cfg.slots:
        state.first_B[slot] = admitted[0]
        admitted[0] += cfg.group
    return state, 0

  def begin(state, begins_R, rollout_R, row_BG, sampling):
    assert not state.active_R[begins_R].any(), "the row is not free"
    slot_R, sample_R = np.divmod(rollout_R[begins_R], cfg.group)
    state.script_R[begins_R] = state.first_B[slot_R] + sample_R
    state.turn_R[begins_R] = state.said_R[begins_R] = state.count_R[begins_R] = 0
    state.limit_R[begins_R] = sampling.limit_R[begins_R]
    state.active_R[begins_R] = True
    return state

  def sample(params, state, halt_R, row_R, truncate):
    state.active_R &= ~halt_R
    here = np.arange(rows) if row_R is None else row_R
    shape = (len(here), cfg.decode_steps)
    token_RT, logp_RT = np.full(shape, -1), np.zeros(shape, np.float32)
    for i, r in enumerate(here):
      if r >= rows or not state.active_R[r]:
        continue
      turn = scripts[state.script_R[r]][state.turn_R[r]]
      for k in range(cfg.decode_steps):
        token_RT[i, k], logp_RT[i, k] = turn[state.said_R[r]], -1.0
        state.said_R[r] += 1
        state.count_R[r] += 1
        if token_RT[i, k] == STOP or state.count_R[r] == state.limit_R[r]:
          state.active_R[r], state.said_R[r] = False, 0
          state.turn_R[r] += 1
          break
    return state, token_RT, logp_RT

  def observe(params, state, feature_buffer_MYD, observations):
    for i, r in enumerate(observations.row_R):
      if r < rows:
        assert not state.active_R[r], "nobody looks while it samples"
        assert state.count_R[r] == observations.count_R[i]
        state.active_R[r], state.limit_R[r] = True, observations.limit_R[i]
    return state, 0

  cfg_D = policy_config().decoder.width
  return RolloutPrograms(
    empty=empty,
    feature_buffer=lambda: np.zeros((cfg.feature_buffer_tokens, 1, cfg_D), np.float32),
    encode_images=lambda params, feature_buffer_MYD, vision, place_M: (feature_buffer_MYD, 0),
    prefill=admit,
    start_rows=begin,
    sample=sample,
    append=observe,
  )


def flat(rollouts) -> list:
  return [trajectory for group in rollouts for trajectory in group]


def decode_params(policy: Policy, params: Params) -> Params:
  return jax.jit(policy.unstack)(params)
