"""Prompts -> Rollouts: sample, draw, look, sample again, until every row answered or was stopped.

    start ─► sample a turn for all active rows ─► parse ─► draw ─► observe ─┐
                 ▲                                  │ done                  │
                 └──────────────────────────────────┼───────────────────────┘
                                                    ▼ Trajectory

Programs and shapes depend on tokens alone, never on the clock: all drawings of a turn are awaited
before the next turn begins.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from spatial_jax import rng
from spatial_jax.config import ConfigError
from spatial_jax.data.text import IM_END, opening_of
from spatial_jax.data.vision import VisionBuckets, bucket
from spatial_jax.drawing.canvas import Picture
from spatial_jax.drawing.executor import Executor, Fault
from spatial_jax.drawing.monitor import StopLimits, end_reason
from spatial_jax.drawing.protocol import Coordinates, Limits, Parsed, parse
from spatial_jax.rollout.conversation import Conversation, Episode, Piece
from spatial_jax.rollout.pictures import Known, check_room, encode
from spatial_jax.rollout.sampler import ObservationBatch, PromptBatch, SampleState, Sampling
from spatial_jax.types import Array, Params, PatchedImage, Prompt, Prompts, Rollouts, VisionBatch


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """Shapes and limits of rollouts.

  Attributes:
    prompts: B, prompts per call; fewer are padded.
    group: G, rollouts per prompt.
    temperature: of training rollouts, > 0.
    top_p: nucleus of training rollouts; 1 keeps the whole distribution.
    turn_tokens: most tokens the policy samples in one turn.
    chunk: most tokens per device call.
    narrow: where at most an n-th of the rows still sample, they are decoded by themselves, for each
      n given; () never.
    stop: when a rollout ends; `stop.tokens` is also the size of each row's own cache.
    limits: what one turn may draw.
    prompt_buckets, observation_buckets: padded lengths, tokens.
    own_buckets: how much of each row's own cache a chunk may read instead of all, ascending.
    vision: buckets of the vision tower.
  """

  prompts: int
  group: int
  temperature: float
  top_p: float
  turn_tokens: int
  chunk: int
  narrow: tuple[int, ...]
  stop: StopLimits
  limits: Limits
  prompt_buckets: tuple[int, ...]
  observation_buckets: tuple[int, ...]
  own_buckets: tuple[int, ...]
  vision: VisionBuckets

  def __post_init__(self):
    counts = (self.prompts, self.group, self.turn_tokens, self.chunk, self.stop.tokens)
    if min(*counts, *self.narrow) < 1 or self.temperature <= 0 or not 0 < self.top_p <= 1:
      raise ConfigError(
        "config.rollout needs temperature > 0, top_p in (0, 1], and prompts, group, turn_tokens, "
        "chunk, narrow and stop.tokens of at least 1"
      )


@dataclasses.dataclass(frozen=True)
class Mode:
  """How one call samples: training, or an evaluation at another temperature, or greedily."""

  temperature: float
  top_p: float
  greedy: bool


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutPrograms:
  """The jitted device side; static arguments bound (see `programs`).

  Attributes:
    encode: (params, VisionBatch) -> features_MYD.
    start: (params, features_MYD, PromptBatch, active_B) -> SampleState.
    sample: (params, SampleState donated, Sampling, greedy, truncate)
      -> (SampleState, token_RK, logp_RK).
    observe: (params, SampleState donated, features_MYD, ObservationBatch) -> SampleState.
    narrow: (SampleState, slot_R) -> SampleState of these rows.
    widen: (SampleState donated, SampleState, slot_R) -> SampleState with these rows put back.
  """

  encode: Callable[[Params, VisionBatch], Array]
  start: Callable[[Params, Array, PromptBatch, Array], SampleState]
  sample: Callable[[Params, SampleState, Sampling, bool, bool], tuple[SampleState, Array, Array]]
  observe: Callable[[Params, SampleState, Array, ObservationBatch], SampleState]
  narrow: Callable[[SampleState, Array], SampleState]
  widen: Callable[[SampleState, SampleState, Array], SampleState]


@dataclasses.dataclass(frozen=True, eq=False)
class Engine:
  """All that sampling needs besides parameters and prompts."""

  conversation: Conversation
  programs: RolloutPrograms
  executor: Executor
  cfg: RolloutConfig


@dataclasses.dataclass(eq=False)
class _Row:
  """Host side of one cache row while its rollout runs."""

  episode: Episode
  pictures: list[Picture]
  parsed: list[Parsed]
  reason: str | None

  @property
  def tokens(self) -> int:
    """Tokens behind the prompt."""
    return self.episode.length - len(self.episode.prompt.token_ids_T)


def read_prompts(
  engine: Engine, params: Params, prompts: Prompts, known: Known | None = None
) -> SampleState:
  """Encodes the prompts' pictures and prefills them: rows that are about to speak.

  Args:
    engine: programs, limits, drawing.
    params: decode parameters (unstacked), on the rollout mesh.
    prompts: at most `cfg.prompts`.
    known: filled with what the tower sees of each image, and asked before it is run. None: nothing
      is kept.

  Raises:
    DataError: on the host, for prompts that are longer, or show or let draw more, than every bucket
      holds; whatever the policy says then fits.
  """
  cfg, blocks = engine.cfg, engine.conversation.policy.vision.window_blocks
  check_room(prompts, cfg.group, cfg.stop, blocks, cfg.vision)
  features_MYD, prompt_batch, active_B = _prompt_batch(engine, params, prompts, known)
  return engine.programs.start(params, features_MYD, prompt_batch, active_B)


def run_episodes(
  engine: Engine,
  params: Params,
  prompts: Prompts,
  seed: int,
  step: int,
  mode: Mode,
  ready: SampleState | None = None,
  known: Known | None = None,
) -> Rollouts:
  """Samples G rollouts for each prompt.

  Args:
    engine, params, prompts: as in `read_prompts`.
    seed, step: of the run; with task, sample and position they fix every draw.
    mode: temperature, nucleus, greedy.
    ready: what `read_prompts` gave for the same arguments, where they are asked in several modes;
      it is left as it is. None: the prompts are read here.
    known: as in `read_prompts`.

  Returns:
    [len(prompts)][G] trajectories. Errors are those of `read_prompts`.
  """
  cfg = engine.cfg
  if ready is None:
    state = read_prompts(engine, params, prompts, known)
  else:
    state = jax.tree.map(jnp.copy, ready)
  rows = [_open(engine, p, g, seed, step, mode) for p in prompts for g in range(cfg.group)]
  key_R = _row_keys(prompts, cfg, seed, step)
  while any(row.reason is None for row in rows):
    state, heard = _sample_turn(engine, params, state, rows, key_R, mode)
    drawings = {}
    for r, (ids, logps) in heard.items():
      _hear(engine, rows[r], ids, logps, step)
      if rows[r].reason is None:
        drawings[r] = engine.executor.submit(rows[r].pictures, rows[r].parsed[-1].operations)
    observations = {}
    for r, drawing in drawings.items():
      observation = _look(engine, rows[r], engine.executor.result(drawing))
      if observation is not None:
        observations[r] = observation
    if observations:
      state = _observe(engine, params, state, rows, observations, known)
  finished = [row.episode.finish(row.reason or "fault") for row in rows]
  return [finished[i : i + cfg.group] for i in range(0, len(finished), cfg.group)]


def _open(engine: Engine, prompt: Prompt, sample: int, seed: int, step: int, mode: Mode) -> _Row:
  path = (seed, step, _number(prompt), sample)
  forbidden = engine.conversation.forbidden_ids
  episode = Episode(prompt, sample, path, 1.0 if mode.greedy else mode.temperature, forbidden)
  return _Row(episode, [Picture(image.pixels, ()) for image in prompt.images], [], None)


def _number(prompt: Prompt) -> int:
  """A task's own number for its sampling keys: the same wherever in a batch it stands."""
  return zlib.crc32(prompt.task.task_id.encode()) & 0x7FFFFFFF


def _row_keys(prompts: Prompts, cfg: RolloutConfig, seed: int, step: int) -> jax.Array:
  numbers_R = np.zeros(cfg.prompts * cfg.group, np.int32)
  numbers_R[: len(prompts) * cfg.group] = np.repeat([_number(p) for p in prompts], cfg.group)
  samples_R = np.tile(np.arange(cfg.group, dtype=np.int32), cfg.prompts)
  root = rng.fold(rng.stream(seed, "sample"), step)
  return jax.vmap(lambda number, sample: rng.fold(root, number, sample))(numbers_R, samples_R)


def _prompt_batch(
  engine: Engine, params: Params, prompts: Prompts, known: Known | None
) -> tuple[Array, PromptBatch, np.ndarray]:
  """Features of the prompts' images, the padded prompts, and which of them are real."""
  cfg = engine.cfg
  longest = max(prompts, key=lambda prompt: len(prompt.token_ids_T))
  name = f"tokens in the prompt of {longest.task.task_id}"
  size = bucket(len(longest.token_ids_T), cfg.prompt_buckets, name)
  features_MYD, feature_of = _encode(engine, params, [p.images for p in prompts], known)
  batch = PromptBatch(
    token_BT=np.zeros((cfg.prompts, size), np.int32),
    position_BTA=np.zeros((cfg.prompts, size, 3), np.int32),
    valid_BT=np.zeros((cfg.prompts, size), bool),
    feature_BT=np.full((cfg.prompts, size), -1, np.int32),
    next_position_B=np.zeros(cfg.prompts, np.int32),
  )
  batch.valid_BT[:, 0] = True
  for b, prompt in enumerate(prompts):
    t = len(prompt.token_ids_T)
    batch.token_BT[b, :t] = prompt.token_ids_T
    batch.position_BTA[b, :t] = prompt.position_TA
    batch.valid_BT[b, :t] = True
    batch.next_position_B[b] = prompt.next_position
    for image, start in zip(prompt.images, prompt.image_start, strict=True):
      batch.feature_BT[b, start : start + image.tokens] = feature_of[image.content_hash]
  return features_MYD, batch, np.arange(cfg.prompts) < len(prompts)


def _encode(
  engine: Engine,
  params: Params,
  images_by_row: Sequence[Sequence[PatchedImage]],
  known: Known | None,
) -> tuple[Array, dict[str, np.ndarray]]:
  blocks, buckets = engine.conversation.policy.vision.window_blocks, engine.cfg.vision
  return encode(engine.programs.encode, params, images_by_row, blocks, buckets, known)


def _sample_turn(
  engine: Engine,
  params: Params,
  state: SampleState,
  rows: Sequence[_Row],
  key_R: jax.Array,
  mode: Mode,
) -> tuple[SampleState, dict[int, tuple[list[int], list[float]]]]:
  """Samples until every active row ended its turn; returns ids and log-probabilities by row."""
  cfg = engine.cfg
  speaking = [r for r, row in enumerate(rows) if row.reason is None]
  heard: dict[int, tuple[list[int], list[float]]] = {r: ([], []) for r in speaking}
  limit_R = np.array(state.count_R)
  for r in speaking:
    limit_R[r] += min(cfg.turn_tokens, cfg.stop.tokens - rows[r].tokens)
  sampling = Sampling(
    key_R=key_R,
    temperature=np.asarray(1.0 if mode.greedy else mode.temperature, np.float32),
    top_p=np.asarray(mode.top_p, np.float32),
    limit_R=limit_R,
    forbidden_V=_forbidden(engine),
  )
  count = len(limit_R)
  widths = [max(count // n, 1) for n in cfg.narrow]
  active, slot_R, aside = np.asarray(speaking), np.arange(count), None
  while active.size:
    width = min((w for w in widths if active.size <= w), default=count)
    if width < len(slot_R):
      aside = state if aside is None else engine.programs.widen(aside, state, slot_R)
      slot_R = np.full(width, count, np.int32)
      slot_R[: active.size] = active
      state = engine.programs.narrow(aside, slot_R)
      here_R = np.minimum(slot_R, count - 1)
      sampling = sampling._replace(key_R=key_R[here_R], limit_R=limit_R[here_R])
    state, token_RK, logp_RK = engine.programs.sample(
      params, state, sampling, mode.greedy, mode.top_p < 1.0
    )
    _note(heard, slot_R, np.asarray(token_RK), np.asarray(logp_RK))
    active = slot_R[np.asarray(state.active_R)]
  if aside is not None:
    state = engine.programs.widen(aside, state, slot_R)
  return state, heard


def _note(
  heard: dict[int, tuple[list[int], list[float]]],
  slot_R: np.ndarray,
  token_RK: np.ndarray,
  logp_RK: np.ndarray,
) -> None:
  """Puts a chunk's tokens behind those of their rows."""
  for slot, token_K, logp_K in zip(slot_R, token_RK, logp_RK, strict=True):
    sampled_K = token_K >= 0
    if sampled_K.any():
      ids, logps = heard[int(slot)]
      ids += token_K[sampled_K].tolist()
      logps += logp_K[sampled_K].tolist()


def _forbidden(engine: Engine) -> np.ndarray:
  forbidden_V = np.zeros(engine.conversation.policy.decoder.vocabulary, bool)
  forbidden_V[list(engine.conversation.forbidden_ids)] = True
  return forbidden_V


def _hear(engine: Engine, row: _Row, ids: Sequence[int], logps: Sequence[float], step: int) -> None:
  """Takes down one sampled turn and decides whether the rollout ends with it."""
  tokenizer, unit = engine.conversation.tokenizer, engine.conversation.policy.coordinates
  words = "" if row.parsed else opening_of(row.episode.prompt.task, engine.conversation.text)
  text = words + tokenizer.decode(ids)
  sizes = tuple((p.pixels.shape[1], p.pixels.shape[0]) for p in row.pictures)
  parsed = parse(text, Coordinates(unit, sizes), engine.cfg.limits)
  row.parsed.append(parsed)
  truncated = ids[-1] != tokenizer.id(IM_END)
  tokens = row.tokens + len(ids)
  row.reason = end_reason(row.parsed, len(row.pictures), tokens, truncated, engine.cfg.stop)
  row.episode.add_turn(ids, logps, step, text, parsed.operations, parsed.errors)


def _look(engine: Engine, row: _Row, drawing: tuple[Picture, ...] | Fault) -> Piece | None:
  """Puts drawn pictures behind the turn; None when the rollout ends here instead."""
  if isinstance(drawing, Fault):
    row.reason = "fault"
    return None
  last = len(row.parsed) == engine.cfg.stop.turns - 1
  observation = engine.conversation.observation(
    len(row.pictures) + 1, [picture.pixels for picture in drawing], last
  )
  # Whole pictures or none: a drawing that does not fit the budget ends the rollout.
  room = min(engine.cfg.stop.tokens - row.tokens - 1, engine.cfg.observation_buckets[-1])
  if len(observation.token_ids_T) > room:
    row.reason = "token_limit"
    return None
  row.pictures += drawing
  row.episode.add_observation(observation)
  return observation


def _observe(
  engine: Engine,
  params: Params,
  state: SampleState,
  rows: Sequence[_Row],
  observations: dict[int, Piece],
  known: Known | None,
) -> SampleState:
  """Encodes the drawn pictures and reads the observations behind their rows."""
  longest = max(len(o.token_ids_T) for o in observations.values())
  size = bucket(longest, engine.cfg.observation_buckets, "tokens in an observation")
  # Few row counts, so few traces: a power of two of the rows that drew.
  count = min(1 << (len(observations) - 1).bit_length(), len(state.active_R))
  features_MYD, feature_of = _encode(
    engine, params, [o.images for o in observations.values()], known
  )
  batch = ObservationBatch(
    slot_R=np.full(count, len(state.active_R), np.int32),
    token_RT=np.zeros((count, size), np.int32),
    position_RTA=np.zeros((count, size, 3), np.int32),
    valid_RT=np.zeros((count, size), bool),
    feature_RT=np.full((count, size), -1, np.int32),
    next_position_R=np.zeros(count, np.int32),
  )
  for i, (r, observation) in enumerate(observations.items()):
    t = len(observation.token_ids_T)
    following = rows[r].episode.next_position
    batch.slot_R[i] = r
    batch.token_RT[i, :t] = observation.token_ids_T
    batch.position_RTA[i, :t] = observation.position_TA + (following - observation.next_position)
    batch.valid_RT[i, :t] = True
    batch.next_position_R[i] = following
    for image, start in zip(observation.images, observation.image_start, strict=True):
      batch.feature_RT[i, start : start + image.tokens] = feature_of[image.content_hash]
  return engine.programs.observe(params, state, features_MYD, batch)
