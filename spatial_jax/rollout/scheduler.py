"""Prompts -> Rollouts: slots and rows are refilled, drawing runs next to decoding.

    devices    decode chunk n ──────────────────────► decode chunk n + 1 ──────────► decode ...
    host       read tokens of n - 1, parse ─► draw    prefill, start rows, append
    workers                                   draw ... ready before chunk n + drawing_delay

Slots hold groups: the rollouts of one prompt. Rows hold rollouts that sample. A chunk is one call
of the decode program: up to `decode_steps` tokens in each row. Time is counted in chunks, and a
drawing that is due is waited for, so which programs run, and on which shapes, depends on tokens
alone and never on the clock.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from spatial_jax.data.vision_packing import bucket
from spatial_jax.drawing.executor import Drawing
from spatial_jax.rollout import request as request_lib
from spatial_jax.rollout.config import SamplingParams
from spatial_jax.rollout.device_inputs import (
  Observed,
  RowSampling,
  observation_batch,
  prompt_batch,
  sample_indices,
  sampling_arrays,
  sampling_keys,
  task_number,
)
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.image_feature_cache import (
  ImageFeatureCache,
  ImageFeatures,
  check_room,
  count_fitting,
)
from spatial_jax.rollout.profiling import ChunkRecord, ProgramSpan, Timeline
from spatial_jax.rollout.request import Request
from spatial_jax.types import Array, Params, Prompt, Prompts, Rollouts, Trajectory

TokenListener = Callable[[int, Request], None]


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutJob:
  """What one call of `generate_rollouts` samples, and what it reports to."""

  prompts: Prompts  # at least one; `cfg.slots` of them are on the devices at a time
  # seed, step: of the run; together with task, sample and position they determine every draw.
  seed: int
  step: int
  # How each rollout of a group samples, at most `cfg.group`.
  sampling_params: Sequence[SamplingParams]
  # Filled with the features of each image; None: features are not kept.
  image_features: ImageFeatures | None = None
  # Called with the index of the prompt and the request after each chunk in which the request
  # sampled; None: nothing is called.
  token_listener: TokenListener | None = None
  # Records programs and violations; use it in `with`. None: nothing is recorded.
  timeline: Timeline | None = None


def generate_rollouts(engine: Engine, params: Params, job: RolloutJob) -> Rollouts:
  """Samples a group of rollouts for each prompt.

  Args:
    params: decode parameters (unstacked), on the rollout mesh.

  Returns:
    [len(prompts)][len(sampling_params)] trajectories. One that breaks an invariant is a fault.

  Raises:
    DataError: if a prompt, its images, or the images that could be drawn on it do not fit the
      config; every other limit ends single rollouts.
  """
  blocks = engine.conversation.policy.vision.window_blocks
  for prompt in job.prompts:
    check_room(prompt, engine.cfg, blocks)
  scheduler = _Scheduler(engine, params, job)
  previous = None  # the chunk before; the host reads its tokens while the next chunk runs
  while scheduler.has_work:
    scheduler.fill_slots()
    scheduler.fill_rows()
    scheduler.append_observations()
    current = scheduler.decode()
    if previous is not None:
      scheduler.read_tokens(previous)
    if current is not None:
      scheduler.record_chunk(current)
    previous, scheduler.chunk = current, scheduler.chunk + 1
  scheduler.collect_results()
  return scheduler.rollouts


class _ChunkOutput(NamedTuple):
  """Results of a chunk, on the devices: tokens and log-probabilities of the rows `row_R`."""

  chunk: int
  row_R: np.ndarray
  token_RT: Array
  logp_RT: Array
  span: ProgramSpan


class _PendingDrawing(NamedTuple):
  """A drawing that was submitted, and the chunk before which it is appended."""

  due_chunk: int
  row: int
  drawing: Drawing


class _RolloutIndex(NamedTuple):
  """A rollout: the slot of its group, and its index in the group."""

  slot: int
  sample: int


@dataclasses.dataclass(eq=False)
class _Group:
  """The requests of one prompt."""

  prompt_index: int
  prompt: Prompt
  requests: list[Request]


class _Scheduler:
  """State of one call: cache, groups in slots, rollouts in rows, pending drawings."""

  def __init__(self, engine: Engine, params: Params, job: RolloutJob):
    cfg, conversation = engine.cfg, engine.conversation
    self.engine, self.params, self.job = engine, params, job
    self.timeline = job.timeline or Timeline()  # one that is not entered waits for nothing
    self.sample_index = sample_indices(job.sampling_params)
    self.key_BG2 = sampling_keys(job.seed, job.step, job.prompts, self.sample_index)
    self.waiting = collections.deque(enumerate(job.prompts))
    self.slots: list[_Group | None] = [None] * cfg.slots
    self.queued: collections.deque[_RolloutIndex] = collections.deque()
    self.rows: list[_RolloutIndex | None] = [None] * cfg.row_count
    self.rollouts: Rollouts = [[] for _ in job.prompts]
    self.pending_drawings: list[_PendingDrawing] = []
    self.chunk = 0
    longest = max(job.prompts, key=lambda prompt: len(prompt.token_ids_T))
    name = f"tokens in the prompt of {longest.task.task_id}"
    prefix_size = bucket(len(longest.token_ids_T), cfg.prompt_buckets, name)
    self.state = engine.programs.empty_state(prefix_size)
    self.images = ImageFeatureCache(
      engine.programs,
      params,
      conversation.policy.vision.window_blocks,
      cfg.vision,
      job.image_features,
      self.timeline,
    )

  @property
  def has_work(self) -> bool:
    """Whether a prompt waits or a slot is in use."""
    return bool(self.waiting) or any(self.slots)

  def request_in(self, row: int) -> Request | None:
    """The request in a row; None if the row is free or padding."""
    index = self.rows[row] if row < len(self.rows) else None
    return None if index is None else self.group_of(index).requests[index.sample]

  def group_of(self, index: _RolloutIndex) -> _Group:
    """The group of a rollout."""
    group = self.slots[index.slot]
    assert group is not None
    return group

  def active_rows(self) -> list[int]:
    """Rows that sample, as far as the host has read their tokens."""
    requests = map(self.request_in, range(len(self.rows)))
    return [r for r, request in enumerate(requests) if request is not None and request.active]

  # --- between chunks ----------------------------------------------------------------------------

  def fill_slots(self) -> None:
    """Prefills waiting prompts into free slots."""
    cfg = self.engine.cfg
    if cfg.schedule == "barrier" and any(self.slots):
      return
    while self.waiting and not all(self.slots):
      free = [slot for slot, group in enumerate(self.slots) if group is None]
      count = min(len(free), len(self.waiting), cfg.prefill[-1])
      images = [self.waiting[i][1].images for i in range(count)]
      count = count_fitting(images, cfg.feature_buffer_tokens)
      groups = [self._start_group(*self.waiting.popleft()) for _ in range(count)]
      self._prefill(groups, free[:count])

  def fill_rows(self) -> None:
    """Starts queued rollouts in free rows."""
    cfg = self.engine.cfg
    row_per_rollout = cfg.row_count == cfg.slots * cfg.group
    free = collections.deque(r for r, index in enumerate(self.rows) if index is None)
    starts_R = np.zeros(cfg.row_count, bool)
    while self.queued and free:
      index = self.queued.popleft()
      r = index.slot * cfg.group + index.sample if row_per_rollout else free.popleft()
      self.rows[r], starts_R[r] = index, True
      self.group_of(index).requests[index.sample].first_chunk = self.chunk
    if not starts_R.any():
      return
    rollout_R = np.zeros(cfg.row_count, np.int32)
    row_BG = np.zeros((cfg.slots, cfg.group), np.int32)
    samplings: list[RowSampling | None] = [None] * cfg.row_count
    for r, index in enumerate(self.rows):
      if index is not None:
        group, (slot, g) = self.group_of(index), index
        rollout_R[r], row_BG[slot, g] = slot * cfg.group + g, r
        key_2 = self.key_BG2[group.prompt_index, g]
        limit = group.requests[g].turn_limit
        samplings[r] = RowSampling(key_2, limit, self.job.sampling_params[g])
    arrays = sampling_arrays(samplings)
    self.state = self.engine.programs.start_rows(self.state, starts_R, rollout_R, row_BG, arrays)

  def append_observations(self) -> None:
    """Appends the drawings that are due to their rows."""
    cfg = self.engine.cfg
    observed: list[Observed] = []
    due = self._due_drawings()
    self.pending_drawings = [pending for pending in self.pending_drawings if pending not in due]
    for pending in due:
      request = self.request_in(pending.row)
      assert request is not None
      with self.timeline.waiting_for_drawing():
        drawing = pending.drawing.result()
      segment = request_lib.add_observation(self.engine, request, drawing, self.chunk)
      if segment is not None:
        start, count = request.response_tokens - len(segment.token_ids_T), request.sampled_tokens
        limit, next_position = count + request.turn_limit, request.builder.next_position
        observed.append(Observed(pending.row, segment, start, count, limit, next_position))
    self._release_ended()
    while observed:
      images = [one.segment.images for one in observed[: cfg.append[-1]]]
      count = count_fitting(images, cfg.feature_buffer_tokens)
      self._append(observed[:count])
      observed = observed[count:]

  def _start_group(self, prompt_index: int, prompt: Prompt) -> _Group:
    path = (self.job.seed, self.job.step, task_number(prompt))
    rollouts = zip(self.sample_index, self.job.sampling_params, strict=True)
    requests = [
      request_lib.start_request(self.engine, prompt, g, (*path, sample_index), params)
      for g, (sample_index, params) in enumerate(rollouts)
    ]
    return _Group(prompt_index, prompt, requests)

  def _prefill(self, groups: list[_Group], slots: list[int]) -> None:
    """One call of the prefill program."""
    cfg, prompts = self.engine.cfg, [group.prompt for group in groups]
    for slot, group in zip(slots, groups, strict=True):
      self.slots[slot] = group
      self.queued += [_RolloutIndex(slot, g) for g in range(len(group.requests))]
    buffer_rows = self.images.encode([prompt.images for prompt in prompts])
    batch = prompt_batch(prompts, slots, buffer_rows, cfg)
    self.state, ready_token = self.engine.programs.prefill(
      self.params, self.state, self.images.feature_buffer_MYD, batch
    )
    tokens = sum(len(prompt.token_ids_T) for prompt in prompts)
    self.timeline.submitted("prefill", ready_token, tokens, batch.tokens.token_RT.size)

  def _due_drawings(self) -> list[_PendingDrawing]:
    """The pending drawings that are appended before the next chunk."""
    schedule, pending = self.engine.cfg.schedule, self.pending_drawings
    if schedule == "logical":
      return [one for one in pending if one.due_chunk <= self.chunk]
    no_row_samples = not self.active_rows()
    if schedule == "barrier":
      return pending if no_row_samples else []
    ready = [one for one in pending if one.drawing.done()]
    if not ready and no_row_samples:  # nothing else to do: wait for the oldest drawing
      return pending[:1]
    return ready

  def _append(self, observed: list[Observed]) -> None:
    """One call of the append program."""
    buffer_rows = self.images.encode([one.segment.images for one in observed])
    batch = observation_batch(observed, buffer_rows, self.engine.cfg)
    self.state, ready_token = self.engine.programs.append(
      self.params, self.state, self.images.feature_buffer_MYD, batch
    )
    tokens = int(batch.tokens.valid_RT.sum())
    self.timeline.submitted("append", ready_token, tokens, batch.tokens.token_RT.size)

  # --- a chunk -----------------------------------------------------------------------------------

  def decode(self) -> _ChunkOutput | None:
    """Submits the next chunk to the devices; None if no row is active."""
    cfg, active = self.engine.cfg, self.active_rows()
    if not active:
      return None
    halt_R = np.ones(cfg.row_count, bool)
    halt_R[active] = False
    count = next(count for count in cfg.decode_row_counts if len(active) <= count)
    row_R, gathered_R = np.arange(cfg.row_count, dtype=np.int32), None
    if count < cfg.row_count:
      row_R = np.full(count, cfg.row_count, np.int32)
      row_R[: len(active)] = active
      gathered_R = row_R
    truncate = any(params.truncates for params in self.job.sampling_params)
    self.state, token_RT, logp_RT = self.engine.programs.decode(
      self.params, self.state, halt_R, gathered_R, truncate
    )
    span = self.timeline.submitted("decode", token_RT, 0, 0)
    return _ChunkOutput(self.chunk, row_R, token_RT, logp_RT, span)

  def record_chunk(self, output: _ChunkOutput) -> None:
    """Records what the slots do during a chunk, after the tokens of the chunk before were read."""

    def slot_of(row: int) -> int:
      index = self.rows[row]
      assert index is not None
      return index.slot

    active = collections.Counter(map(slot_of, self.active_rows()))
    drawing = collections.Counter(slot_of(pending.row) for pending in self.pending_drawings)
    slots = range(len(self.slots))
    self.timeline.chunks.append(
      ChunkRecord(
        output.span,
        len(self.rows),
        self.engine.cfg.group,
        tuple(active[slot] for slot in slots),
        tuple(drawing[slot] for slot in slots),
      )
    )

  def read_tokens(self, output: _ChunkOutput) -> None:
    """Reads the tokens of a chunk, submits drawings and releases the rollouts that ended."""
    token_RT, logp_RT = np.asarray(output.token_RT), np.asarray(output.logp_RT)
    steps = int((token_RT >= 0).any(axis=0).sum())
    output.span.tokens, output.span.positions = int((token_RT >= 0).sum()), steps * len(token_RT)
    for r, token_T, logp_T in zip(output.row_R.tolist(), token_RT, logp_RT, strict=True):
      request, sampled_T = self.request_in(r), token_T >= 0
      if request is None or not request.active or request.first_chunk > output.chunk:
        continue
      assert sampled_T.any(), "an active row samples"
      ids, logps = token_T[sampled_T].tolist(), logp_T[sampled_T].tolist()
      ended = request_lib.add_tokens(self.engine, request, ids, logps)
      index = self.rows[r]
      if self.job.token_listener is not None and index is not None:
        self.job.token_listener(self.group_of(index).prompt_index, request)
      if ended:
        self._end_turn(r, request, output.chunk)
    self._release_ended()

  def _end_turn(self, row: int, request: Request, chunk: int) -> None:
    """Ends the turn of a request; unless the rollout ends too, its drawing is submitted."""
    request_lib.end_turn(self.engine, request, self.job.step)
    if request.end_reason is None:
      drawing = self.engine.executor.submit(request.images, request.parsed[-1].operations)
      due_chunk = chunk + 1 + self.engine.cfg.drawing_delay
      self.pending_drawings.append(_PendingDrawing(due_chunk, row, drawing))

  def _release_ended(self) -> None:
    """Frees the rows of rollouts that ended, and the slots of groups whose rollouts all ended."""
    for r in range(len(self.rows)):
      request = self.request_in(r)
      if request is not None and request.end_reason is not None:
        self.rows[r] = None
    for slot, group in enumerate(self.slots):
      if group is not None and all(r.end_reason is not None for r in group.requests):
        self.rollouts[group.prompt_index] = [self._finish(request) for request in group.requests]
        self.slots[slot] = None

  def _finish(self, request: Request) -> Trajectory:
    """The checked trajectory of a request."""
    trajectory = request_lib.finish(request)
    with self.timeline.checking_trajectory():
      violation = request_lib.invariant_violation(self.engine, trajectory)
    if violation is not None:
      trajectory = request_lib.prompt_as_fault(request)
      self.timeline.violations.append(violation)
      logging.log_first_n(logging.ERROR, "a rollout is left out as a fault: %s", 5, violation)
    return trajectory

  def collect_results(self) -> None:
    """Hands over image features and counts."""
    self.images.collect_features()
    self.timeline.images_requested = self.images.requested
    self.timeline.images_encoded = self.images.encoded
