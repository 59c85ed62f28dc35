"""Rollouts in small: a tokenizer of the protocol, a policy of random weights, a scripted one."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax import programs
from spatial_jax.data.text import IM_END, TextConfig, train_tokenizer
from spatial_jax.data.vision import VisionBuckets
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.drawing.monitor import StopLimits
from spatial_jax.drawing.protocol import Limits
from spatial_jax.learn.batch import BatchConfig
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.qwen_vl import Policy, make_policy
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.engine import Engine, Mode, RolloutConfig, RolloutPrograms
from spatial_jax.rollout.sampler import SampleState
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
SAMPLED = Mode(temperature=1.0, top_p=1.0, greedy=False)
ROLLOUT = RolloutConfig(
  prompts=3,
  group=2,
  temperature=1.0,
  top_p=1.0,
  turn_tokens=8,
  chunk=3,
  narrow=(2, 6),
  stop=StopLimits(turns=3, images=4, tokens=112),
  limits=Limits(4, 2000, 8, 8, 40, 6),
  prompt_buckets=(48, 96),
  observation_buckets=(32, 64),
  own_buckets=(7, 60),
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
  return Engine(conversation(), run, Executor(ExecutorConfig(0, 20.0, 1024), STYLE), cfg)


def real_engine(policy: Policy, cfg: RolloutConfig) -> Engine:
  return make_engine(programs.rollout_programs(policy, cfg, STOP), cfg)


# --- a policy that says what it is told ----------------------------------------------------------

Script = Sequence[Sequence[int]]  # the turns of one rollout, as token ids


def say(text: str) -> list[int]:
  """A turn that ends of itself."""
  return [*TOKENIZER.encode(text), STOP]


def scripted(scripts: Sequence[Script], cfg: RolloutConfig) -> RolloutPrograms:
  """Programs without a policy: row r says the turns of `scripts[r]`, cut as real ones are."""
  rows = cfg.prompts * cfg.group
  turn_R, said_R = np.zeros(rows, int), np.zeros(rows, int)

  def start(params, features_MYD, prompts, active_B) -> SampleState:
    turn_R[:], said_R[:] = 0, 0
    active_R = np.repeat(active_B, cfg.group)
    own_R = np.arange(rows, dtype=np.int32)  # as positions: which script a row reads
    return SampleState(None, np.zeros((rows, 1)), own_R, np.zeros(rows, np.int32), active_R)

  def sample(params, state, sampling, greedy, truncate):
    count_R, active_R = state.count_R.copy(), state.active_R.copy()
    shape = (len(active_R), cfg.chunk)
    token_RK, logp_RK = np.full(shape, -1), np.zeros(shape, np.float32)
    for i in np.flatnonzero(active_R):
      r = state.position_R[i]
      turn = scripts[r][turn_R[r]]
      for k in range(cfg.chunk):
        token_RK[i, k], logp_RK[i, k] = turn[said_R[r]], -1.0
        said_R[r] += 1
        count_R[i] += 1
        if turn[said_R[r] - 1] == STOP or count_R[i] == sampling.limit_R[i]:
          active_R[i], said_R[r] = False, 0
          turn_R[r] += 1
          break
    return state._replace(count_R=count_R, active_R=active_R), token_RK, logp_RK

  def observe(params, state, features_MYD, observations) -> SampleState:
    active_R = state.active_R.copy()
    assert not active_R.any()
    active_R[observations.slot_R[observations.slot_R < rows]] = True
    return state._replace(active_R=active_R)

  def narrow(state, slot_R) -> SampleState:
    here_R = np.minimum(slot_R, rows - 1)
    few = jax.tree.map(lambda x: x[here_R], state._replace(cache=None))
    return few._replace(active_R=few.active_R & (slot_R < rows))

  def widen(state, few, slot_R) -> SampleState:
    def put(old, new):
      old = old.copy()
      old[slot_R[slot_R < rows]] = new[slot_R < rows]
      return old

    return jax.tree.map(put, state, few)

  width = policy_config().decoder.width
  return RolloutPrograms(
    encode=lambda params, vision: jnp.zeros((1, 1, width)),
    start=start,
    sample=sample,
    observe=observe,
    narrow=narrow,
    widen=widen,
  )


def flat(rollouts) -> list:
  return [trajectory for group in rollouts for trajectory in group]


def decode_params(policy: Policy, params: Params) -> Params:
  return jax.jit(policy.unstack)(params)
