"""Prompts -> Rollouts: slots and rows that are refilled, drawing beside decoding.

    chunk n      decode ───────────────────────► decode ─────────────► decode       the device
    meanwhile    hear n - 1, parse ─► draw ...   admit, begin, look ─┘              the host
                                       ▲ workers  before chunk n + delay

In logical time what runs, and in which shapes, depends on tokens alone, never on the clock: chunks
are counted, and a drawing that is due is waited for.
"""

import collections
import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from spatial_jax import rng
from spatial_jax.data.vision_packing import bucket
from spatial_jax.drawing.executor import Drawing
from spatial_jax.rollout import request as rows_lib
from spatial_jax.rollout.config import SamplingParams
from spatial_jax.rollout.conversation import TokenSegment
from spatial_jax.rollout.device import SampleState
from spatial_jax.rollout.device_inputs import (
  RowSampling,
  observation_batch,
  prompt_batch,
  sampling_batch,
)
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.image_feature_cache import (
  ImageFeatureCache,
  ImageFeatures,
  check_room,
  fitting,
)
from spatial_jax.rollout.profiling import Frame, Span, Timeline
from spatial_jax.rollout.request import Row
from spatial_jax.types import Array, Params, Prompt, Prompts, Rollouts

Listener = Callable[[int, Row], None]


def generate_rollouts(
  engine: Engine,
  params: Params,
  prompts: Prompts,
  seed: int,
  step: int,
  sampling_params: Sequence[SamplingParams],
  image_features: ImageFeatures | None = None,
  token_listener: Listener | None = None,
  timeline: Timeline | None = None,
) -> Rollouts:
  """Samples a group of rollouts for each prompt.

  Args:
    engine: programs, limits, drawing.
    params: decode parameters (unstacked), on the rollout mesh.
    prompts: at least one; as many as there are slots are worked on at once.
    seed, step: of the run; with task, sample and position they fix every draw.
    modes: how each rollout of a group samples, at most `cfg.group`.
    known: filled with what the tower sees of each image. None: nothing is kept.
    listen: called with prompt number and row whenever tokens of it were heard.
    timeline: entered; told of every program that the policy runs in.

  Returns:
    [len(prompts)][len(modes)] trajectories.

  Raises:
    DataError: on the host, for a prompt that is longer, or shows or lets draw more, than there is
      room for; whatever the policy says then fits.
  """
  cfg = engine.cfg
  blocks = engine.conversation.policy.vision.window_blocks
  for prompt in prompts:
    check_room(prompt, cfg, blocks)
  timeline = timeline or Timeline()  # one that is not entered waits for nothing
  run = _Run(
    engine, params, prompts, seed, step, sampling_params, image_features, token_listener, timeline
  )
  before = None  # what the chunk before the next one gave: heard while that one runs
  while run.unfinished:
    run.fill_slots()
    run.fill_rows()
    run.append_observations()
    output = run.decode()
    if before is not None:
      run.on_tokens(before)
    if output is not None:
      run.record(output)
    before, run.chunk = output, run.chunk + 1
  run.pictures.finish()
  timeline.pictures_asked, timeline.pictures_seen = run.pictures.asked, run.pictures.seen
  return run.rollouts


class _Output(NamedTuple):
  """What a chunk gives, on the device: tokens and log-probabilities of the rows `row_R`."""

  chunk: int
  row_R: np.ndarray
  token_RT: Array
  logp_RT: Array
  span: Span


class _PendingDrawing(NamedTuple):
  """A drawing that was handed over, and the chunk before which it is taken up."""

  chunk: int
  row: int
  drawing: Drawing


class _Assignment(NamedTuple):
  """A rollout of the group in a slot."""

  slot: int
  sample: int


@dataclasses.dataclass(eq=False)
class _Group:
  """The rollouts of one prompt, in the slot they have."""

  number: int
  prompt: Prompt
  rows: list[Row]


class _Run:
  """Who is where: device state, slots, prompts that wait, drawings under way."""

  def __init__(
    self,
    engine: Engine,
    params: Params,
    prompts: Prompts,
    seed: int,
    step: int,
    sampling_params: Sequence[SamplingParams],
    image_features: ImageFeatures | None,
    token_listener: Listener | None,
    timeline: Timeline,
  ):
    cfg, conversation = engine.cfg, engine.conversation
    self.engine, self.params, self.seed, self.step, self.sampling_params = (
      engine,
      params,
      seed,
      step,
      sampling_params,
    )
    self.token_listener, self.timeline = token_listener, timeline
    # Rollouts of one mode draw for themselves; other modes draw the same numbers, to be compared.
    self.sample_index = [
      list(sampling_params[:g]).count(mode) for g, mode in enumerate(sampling_params)
    ]
    self.key_BG2 = _keys(seed, step, prompts, self.sample_index)
    self.waiting = collections.deque(enumerate(prompts))
    self.slots: list[_Group | None] = [None] * cfg.slots
    self.queued: collections.deque[_Assignment] = collections.deque()
    self.assignment: list[_Assignment | None] = [None] * cfg.row_count
    self.rollouts: Rollouts = [[] for _ in prompts]
    self.pending_drawings: list[_PendingDrawing] = []
    self.chunk = 0
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids_T))
    name = f"tokens in the prompt of {longest.task.task_id}"
    size = bucket(len(longest.token_ids_T), cfg.prompt_buckets, name)
    self.state: SampleState = engine.programs.empty(size)
    blocks, feature_buffer_MYD = (
      conversation.policy.vision.window_blocks,
      engine.programs.feature_buffer(),
    )
    self.pictures = ImageFeatureCache(
      engine.programs.encode_images,
      params,
      feature_buffer_MYD,
      blocks,
      cfg.vision,
      image_features,
      timeline,
    )

  @property
  def unfinished(self) -> bool:
    """Whether anybody waits or has a slot."""
    return bool(self.waiting) or any(self.slots)

  def row(self, r: int) -> Row | None:
    """The rollout in a row of the cache, None where there is none, or no such row."""
    member = self.assignment[r] if r < len(self.assignment) else None
    return None if member is None else self.group_of(member).rows[member.sample]

  def group_of(self, member: _Assignment) -> _Group:
    """The group that a rollout is of."""
    group = self.slots[member.slot]
    assert group is not None
    return group

  def active(self) -> list[int]:
    """Rows that sample, as far as was heard."""
    count = len(self.assignment)
    return [r for r in range(count) if (row := self.row(r)) is not None and row.active]

  # --- between chunks ----------------------------------------------------------------------------

  def fill_slots(self) -> None:
    """Gives free slots to prompts that wait."""
    cfg = self.engine.cfg
    if cfg.schedule == "barrier" and any(self.slots):
      return
    while self.waiting and not all(self.slots):
      free = [slot for slot, group in enumerate(self.slots) if group is None]
      count = min(len(free), len(self.waiting), cfg.prefill[-1])
      count = fitting([self.waiting[i][1].images for i in range(count)], cfg.feature_buffer_tokens)
      groups = [self._open(*self.waiting.popleft()) for _ in range(count)]
      self._prefill(groups, free[:count])

  def fill_rows(self) -> None:
    """Gives free rows to rollouts that wait for one."""
    cfg = self.engine.cfg
    everybody = cfg.row_count == cfg.slots * cfg.group
    free = collections.deque(r for r, member in enumerate(self.assignment) if member is None)
    begins_R = np.zeros(cfg.row_count, bool)
    while self.queued and free:
      member = self.queued.popleft()
      r = member.slot * cfg.group + member.sample if everybody else free.popleft()
      self.assignment[r], begins_R[r] = member, True
      self.group_of(member).rows[member.sample].since = self.chunk
    if not begins_R.any():
      return
    rollout_R = np.zeros(cfg.row_count, np.int32)
    row_BG = np.zeros((cfg.slots, cfg.group), np.int32)
    samplings: list[RowSampling | None] = [None] * cfg.row_count
    for r, member in enumerate(self.assignment):
      if member is not None:
        group, (slot, g) = self.group_of(member), member
        rollout_R[r], row_BG[slot, g] = slot * cfg.group + g, r
        samplings[r] = RowSampling(
          self.key_BG2[group.number, g], group.rows[g].limit, self.sampling_params[g]
        )
    sampling = sampling_batch(samplings)
    self.state = self.engine.programs.start_rows(self.state, begins_R, rollout_R, row_BG, sampling)

  def _open(self, number: int, prompt: Prompt) -> _Group:
    path = (self.seed, self.step, _number(prompt))
    rows = [
      rows_lib.open_row(self.engine, prompt, g, (*path, draw), mode)
      for g, (draw, mode) in enumerate(zip(self.sample_index, self.sampling_params, strict=True))
    ]
    return _Group(number, prompt, rows)

  def _prefill(self, groups: list[_Group], slots: list[int]) -> None:
    cfg, prompts = self.engine.cfg, [group.prompt for group in groups]
    for slot, group in zip(slots, groups, strict=True):
      self.slots[slot] = group
      self.queued += [_Assignment(slot, g) for g in range(len(self.sampling_params))]
    feature_of = self.pictures.encode([prompt.images for prompt in prompts])
    batch = prompt_batch(prompts, slots, feature_of, cfg.prefill, cfg.slots, cfg.prompt_buckets)
    self.state, mark = self.engine.programs.prefill(
      self.params, self.state, self.pictures.feature_buffer_MYD, batch
    )
    tokens = sum(len(prompt.token_ids_T) for prompt in prompts)
    self.timeline.submitted("prefill", mark, tokens, batch.token_BT.size)

  def append_observations(self) -> None:
    """Takes up the drawings that are due, and reads them behind their rows."""
    cfg, observed = self.engine.cfg, []
    taken = self._taken()
    self.pending_drawings = [due for due in self.pending_drawings if due not in taken]
    for due in taken:
      row = self.row(due.row)
      assert row is not None
      with self.timeline.waiting():
        drawing = due.drawing.result()
      observation = rows_lib.add_observation(self.engine, row, drawing, self.chunk)
      if observation is not None:
        observed.append((due.row, row, observation))
    self._leave()
    while observed:
      count = fitting(
        [piece.images for _, _, piece in observed[: cfg.append[-1]]], cfg.feature_buffer_tokens
      )
      self._append(observed[:count])
      observed = observed[count:]

  def _taken(self) -> list[_PendingDrawing]:
    schedule, silent = self.engine.cfg.schedule, not self.active()
    if schedule == "barrier":
      return self.pending_drawings if silent else []
    if schedule == "logical":
      return [due for due in self.pending_drawings if due.chunk <= self.chunk]
    return [due for due in self.pending_drawings if due.drawing.done()] or self.pending_drawings[
      : int(silent)
    ]

  def _append(self, observed: list[tuple[int, Row, TokenSegment]]) -> None:
    """One call for some observations."""
    cfg = self.engine.cfg
    feature_of = self.pictures.encode([piece.images for _, _, piece in observed])
    rows, buckets = cfg.row_count, cfg.observation_buckets
    batch = observation_batch(observed, feature_of, cfg.append, rows, buckets)
    self.state, mark = self.engine.programs.append(
      self.params, self.state, self.pictures.feature_buffer_MYD, batch
    )
    self.timeline.submitted("append", mark, int(batch.valid_RT.sum()), batch.token_RT.size)

  # --- a chunk -----------------------------------------------------------------------------------

  def decode(self) -> _Output | None:
    """Hands the next chunk to the devices; None where no row is active."""
    cfg, active = self.engine.cfg, self.active()
    if not active:
      return None
    count = cfg.row_count
    halt_R = np.ones(count, bool)
    halt_R[active] = False
    width = next(width for width in cfg.decode_row_counts if len(active) <= width)
    row_R, few = np.arange(count, dtype=np.int32), None
    if width < count:
      row_R = np.full(width, count, np.int32)
      row_R[: len(active)] = active
      few = row_R
    truncate = any(mode.truncates for mode in self.sampling_params)
    self.state, token_RT, logp_RT = self.engine.programs.sample(
      self.params, self.state, halt_R, few, truncate
    )
    span = self.timeline.submitted("decode", token_RT, 0, 0)
    return _Output(self.chunk, row_R, token_RT, logp_RT, span)

  def record(self, output: _Output) -> None:
    """Notes who is where during the chunk handed over, now that the one before it was heard."""

    def slot_of(r: int) -> int:
      member = self.assignment[r]
      assert member is not None
      return member.slot

    active = collections.Counter(map(slot_of, self.active()))
    drawing = collections.Counter(slot_of(due.row) for due in self.pending_drawings)
    slots = range(len(self.slots))
    self.timeline.frames.append(
      Frame(
        output.span,
        len(self.assignment),
        self.engine.cfg.group,
        tuple(active[slot] for slot in slots),
        tuple(drawing[slot] for slot in slots),
      )
    )

  def on_tokens(self, output: _Output) -> None:
    """Takes down what a chunk gave: hands over drawings, frees what has ended."""
    token_RT, logp_RT = np.asarray(output.token_RT), np.asarray(output.logp_RT)
    steps = int((token_RT >= 0).any(axis=0).sum())
    output.span.tokens, output.span.places = int((token_RT >= 0).sum()), steps * len(token_RT)
    for r, token_T, logp_T in zip(output.row_R.tolist(), token_RT, logp_RT, strict=True):
      row, sampled_T = self.row(r), token_T >= 0
      if row is None or not row.active or row.since > output.chunk:
        continue
      assert sampled_T.any(), "an active row samples"
      ended = rows_lib.add_tokens(
        self.engine, row, token_T[sampled_T].tolist(), logp_T[sampled_T].tolist()
      )
      if self.token_listener is not None:
        member = self.assignment[r]
        assert member is not None
        self.token_listener(self.group_of(member).number, row)
      if ended:
        rows_lib.end_turn(self.engine, row, self.step)
        if row.reason is None:
          drawing = self.engine.executor.submit(row.pictures, row.parsed[-1].operations)
          self.pending_drawings.append(
            _PendingDrawing(output.chunk + 1 + self.engine.cfg.drawing_delay, r, drawing)
          )
    self._leave()

  def _leave(self) -> None:
    """A rollout that has ended gives its row back, a group of which every one has, its slot."""
    for r in range(len(self.assignment)):
      row = self.row(r)
      if row is not None and row.reason is not None:
        self.assignment[r] = None
    for slot, group in enumerate(self.slots):
      if group is not None and all(row.reason is not None for row in group.rows):
        self.rollouts[group.number] = [row.episode.finish(row.reason or "") for row in group.rows]
        self.slots[slot] = None


def _number(prompt: Prompt) -> int:
  """A task's own number for its sampling keys: the same wherever in a batch it stands."""
  return zlib.crc32(prompt.task.task_id.encode()) & 0x7FFFFFFF


def _keys(seed: int, step: int, prompts: Prompts, sample_index: Sequence[int]) -> np.ndarray:
  """Data of the sampling keys of all rollouts, uint32 [B, G, 2]."""
  root = rng.fold(rng.stream(seed, "sample"), step)
  number_B = np.zeros(1 << (len(prompts) - 1).bit_length(), np.int32)  # few sizes, few traces
  number_B[: len(prompts)] = [_number(prompt) for prompt in prompts]
  return np.asarray(_fold_all(root, number_B, np.asarray(sample_index, np.int32)))[: len(prompts)]


@jax.jit
def _fold_all(root: jax.Array, number_B: jax.Array, draw_G: jax.Array) -> jax.Array:
  def one(number: jax.Array, draw: jax.Array) -> jax.Array:
    return jax.random.key_data(rng.fold(root, number, draw))

  return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(number_B, draw_G)
