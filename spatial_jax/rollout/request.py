"""The host side of one rollout while it runs: hear -> parse -> draw -> look -> hear."""

import dataclasses
from collections.abc import Sequence

from spatial_jax.data.prompt_text import response_prefix_of
from spatial_jax.data.tokenizer import IM_END
from spatial_jax.drawing.canvas import Picture
from spatial_jax.drawing.executor import Fault
from spatial_jax.drawing.parser import Coordinates, Parsed, parse
from spatial_jax.drawing.termination import end_reason
from spatial_jax.rollout.config import SamplingParams
from spatial_jax.rollout.conversation import Episode, TokenSegment
from spatial_jax.rollout.engine import Engine
from spatial_jax.types import Prompt


@dataclasses.dataclass(eq=False)
class Row:
  """One rollout.

  Attributes:
    episode: what it said and saw so far.
    pictures: what it may draw on.
    parsed: its turns.
    reason: why it ended, None while it goes on.
    active: whether its turn goes on, as far as the host has heard.
    since: the chunk that its turn begins with.
    max_tokens_per_turn: most tokens of any of its turns.
    limit: most tokens of this turn.
    ids, logps: of this turn so far.
  """

  episode: Episode
  pictures: list[Picture]
  max_tokens_per_turn: int
  parsed: list[Parsed] = dataclasses.field(default_factory=list)
  reason: str | None = None
  active: bool = True
  since: int = 0
  limit: int = 0
  ids: list[int] = dataclasses.field(default_factory=list)
  logps: list[float] = dataclasses.field(default_factory=list)

  @property
  def tokens(self) -> int:
    """Tokens behind the prompt, this turn's left out."""
    return self.episode.length - len(self.episode.prompt.token_ids_T)

  @property
  def sampled(self) -> int:
    """Tokens sampled, this turn's left out."""
    return sum(turn.end - turn.start for turn in self.episode.turns)


def open_row(
  engine: Engine, prompt: Prompt, sample: int, seed_path: tuple[int, ...], mode: SamplingParams
) -> Row:
  """A rollout that samples once it has a row; `since` is set then."""
  temperature = 1.0 if mode.greedy else mode.temperature
  episode = Episode(prompt, sample, seed_path, temperature, engine.conversation.forbidden_ids)
  pictures = [Picture(image.pixels, ()) for image in prompt.images]
  most = engine.cfg.max_tokens_per_turn
  row = Row(episode, pictures, min(mode.max_tokens_per_turn or most, most))
  row.limit = turn_limit(engine, row)
  return row


def turn_limit(engine: Engine, row: Row) -> int:
  """Most tokens of the turn that begins."""
  return min(row.max_tokens_per_turn, engine.cfg.stop.max_response_tokens - row.tokens)


def add_tokens(engine: Engine, row: Row, ids: Sequence[int], logps: Sequence[float]) -> bool:
  """Takes down tokens of a turn; returns whether it ended with them."""
  row.ids += ids
  row.logps += logps
  end = _string_end(engine, row, len(ids)) if engine.cfg.stop_strings else None
  if end is not None:
    row.ids, row.logps = row.ids[:end], row.logps[:end]
  stopped = bool(row.ids) and row.ids[-1] in engine.stop_ids
  row.active = not (stopped or end is not None or len(row.ids) >= row.limit)
  return not row.active


def end_turn(engine: Engine, row: Row, step: int) -> None:
  """Takes down the turn that was said, and decides whether the rollout ends with it."""
  conversation, cfg = engine.conversation, engine.cfg
  words = "" if row.parsed else response_prefix_of(row.episode.prompt.task, conversation.text)
  said = conversation.tokenizer.decode(row.ids)
  text = words + said
  sizes = tuple((p.pixels.shape[1], p.pixels.shape[0]) for p in row.pictures)
  parsed = parse(text, Coordinates(conversation.policy.coordinates, sizes), cfg.limits)
  row.parsed.append(parsed)
  # A turn that a stop string ended is whole.
  truncated = row.ids[-1] not in engine.stop_ids and not _has_stop(said, cfg.stop_strings)
  tokens = row.tokens + len(row.ids)
  row.reason = end_reason(row.parsed, len(row.pictures), tokens, truncated, cfg.stop)
  row.episode.add_turn(row.ids, row.logps, step, text, parsed.operations, parsed.errors)
  row.ids, row.logps = [], []


def add_observation(
  engine: Engine, row: Row, drawing: tuple[Picture, ...] | Fault, since: int
) -> TokenSegment | None:
  """Puts drawn pictures behind the turn; None where the rollout ends here instead."""
  if isinstance(drawing, Fault):
    row.reason = "fault"
    return None
  cfg, conversation = engine.cfg, engine.conversation
  last = len(row.parsed) == cfg.stop.max_turns - 1
  closed = row.episode.last_id == conversation.tokenizer.id(IM_END)
  observation = conversation.observation(
    len(row.pictures) + 1, [picture.pixels for picture in drawing], last, closed
  )
  # Whole pictures or none: a drawing that does not fit a budget ends the rollout.
  seen = sum(image.tokens for image in (*row.episode.images, *observation.images))
  if seen > cfg.stop.max_image_tokens:
    row.reason = "too_many_images"
    return None
  room = min(cfg.stop.max_response_tokens - row.tokens - 1, cfg.observation_buckets[-1])
  if len(observation.token_ids_T) > room:
    row.reason = "token_limit"
    return None
  row.pictures += drawing
  row.episode.add_observation(observation)
  row.active, row.since, row.limit = True, since, turn_limit(engine, row)
  return observation


def _has_stop(text: str, stop_strings: Sequence[str]) -> bool:
  return any(stop in text for stop in stop_strings)


def _string_end(engine: Engine, row: Row, fresh: int) -> int | None:
  """How many of the turn's tokens it takes to complete a stop string; None: none is."""
  decode, stop_strings = engine.conversation.tokenizer.decode, engine.cfg.stop_strings
  if not _has_stop(decode(row.ids), stop_strings):
    return None
  counts = range(len(row.ids) - fresh + 1, len(row.ids) + 1)
  return next(count for count in counts if _has_stop(decode(row.ids[:count]), stop_strings))
