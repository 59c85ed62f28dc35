"""The host side of one rollout while it runs: decode tokens, parse the turn, draw, observe.

tokens ─► add_tokens ─► end_turn ─► (drawing) ─► add_observation ─► tokens ...
                           └─► end_reason ─► finish
"""

import dataclasses
from collections.abc import Sequence

from spatial_jax.data.tokenizer import IM_END
from spatial_jax.drawing.canvas import DrawnImage
from spatial_jax.drawing.executor import Fault
from spatial_jax.drawing.parser import Coordinates, Parsed, parse
from spatial_jax.drawing.termination import end_reason
from spatial_jax.rollout.config import SamplingParams
from spatial_jax.rollout.conversation import TokenSegment, TrajectoryBuilder
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.trajectory import violation
from spatial_jax.types import Prompt, Trajectory


@dataclasses.dataclass(eq=False)
class Request:
  """One rollout while it runs."""

  builder: TrajectoryBuilder  # the trajectory so far, without the current turn
  # The images that the policy may draw on, with the operations drawn on each.
  images: list[DrawnImage]
  max_tokens_per_turn: int  # limit of every turn, tokens
  parsed: list[Parsed] = dataclasses.field(default_factory=list)  # the finished turns
  end_reason: str | None = None  # why the rollout ended; None while it runs
  active: bool = True  # the current turn goes on, as far as the host has read its tokens
  first_chunk: int = 0  # the chunk in which the current turn begins
  turn_limit: int = 0  # limit of the current turn, tokens
  # turn_ids, turn_logps: tokens of the current turn and their log-probabilities.
  turn_ids: list[int] = dataclasses.field(default_factory=list)
  turn_logps: list[float] = dataclasses.field(default_factory=list)

  @property
  def response_tokens(self) -> int:
    """Tokens after the prompt, without the current turn."""
    return self.builder.length - len(self.builder.prompt.token_ids_T)

  @property
  def sampled_tokens(self) -> int:
    """Sampled tokens, without the current turn."""
    return sum(turn.end - turn.start for turn in self.builder.turns)


def start_request(
  engine: Engine,
  prompt: Prompt,
  sample: int,
  seed_path: tuple[int, ...],
  params: SamplingParams,
) -> Request:
  """Returns the request of one rollout; `first_chunk` is set when it gets a row.

  Args:
    sample, seed_path: as in `Trajectory`.
  """
  temperature = 1.0 if params.greedy else params.temperature
  builder = TrajectoryBuilder(prompt, sample, seed_path, temperature, engine.forbidden_ids)
  images = [DrawnImage(image.pixels, ()) for image in prompt.images]
  limit = engine.cfg.max_tokens_per_turn
  request = Request(builder, images, min(params.max_tokens_per_turn or limit, limit))
  request.turn_limit = next_turn_limit(engine, request)
  return request


def next_turn_limit(engine: Engine, request: Request) -> int:
  """Returns the limit in tokens of the turn that begins next."""
  left = engine.cfg.stop.max_response_tokens - request.response_tokens
  return min(request.max_tokens_per_turn, left)


def add_tokens(
  engine: Engine, request: Request, ids: Sequence[int], logps: Sequence[float]
) -> bool:
  """Adds sampled tokens to the current turn; returns whether the turn ends with them."""
  request.turn_ids += ids
  request.turn_logps += logps
  end = _stop_string_end(engine, request, len(ids)) if engine.cfg.stop_strings else None
  if end is not None:
    request.turn_ids, request.turn_logps = request.turn_ids[:end], request.turn_logps[:end]
  stopped = bool(request.turn_ids) and request.turn_ids[-1] in engine.stop_ids
  full = len(request.turn_ids) >= request.turn_limit
  request.active = not (stopped or end is not None or full)
  return not request.active


def end_turn(engine: Engine, request: Request, policy_step: int) -> None:
  """Parses the turn that ended, adds it to the trajectory and sets `end_reason`.

  Args:
    request: its current turn has ended.
    policy_step: training step of the policy that sampled the turn.
  """
  conversation, cfg = engine.conversation, engine.cfg
  grammar, prefix = conversation.form.grammar, conversation.turn_prefix(not request.parsed)
  sampled = conversation.tokenizer.decode(request.turn_ids)
  text = prefix + sampled
  sizes = tuple((image.pixels.shape[1], image.pixels.shape[0]) for image in request.images)
  parsed = parse(text, Coordinates(conversation.policy.coordinates, sizes), cfg.limits, grammar)
  # A turn that a stop string ended is complete.
  stopped = request.turn_ids[-1] in engine.stop_ids or _has_stop(sampled, cfg.stop_strings)
  if not stopped and not grammar.answer:  # the rest of the answer is missing
    parsed = dataclasses.replace(parsed, answer_text=None)
  request.parsed.append(parsed)
  tokens = request.response_tokens + len(request.turn_ids)
  request.end_reason = end_reason(
    request.parsed, len(request.images), tokens, not stopped, cfg.stop
  )
  request.builder.add_turn(
    request.turn_ids, request.turn_logps, policy_step, text, parsed.operations, parsed.errors
  )
  request.turn_ids, request.turn_logps = [], []


def add_observation(
  engine: Engine, request: Request, drawing: tuple[DrawnImage, ...] | Fault, chunk: int
) -> TokenSegment | None:
  """Adds the drawn images as an observation, after which the next turn begins.

  Args:
    request: its last turn drew.
    drawing: the drawn images, or why there are none.
    chunk: the chunk in which the next turn begins.

  Returns:
    The observation; None if the rollout ends instead, with `end_reason` set.
  """
  if isinstance(drawing, Fault):
    request.end_reason = "fault"
    return None
  cfg, conversation = engine.cfg, engine.conversation
  last = len(request.parsed) == cfg.stop.max_turns - 1
  has_im_end = request.builder.last_id == conversation.tokenizer.id(IM_END)
  pixels = [image.pixels for image in drawing]
  observation = conversation.observation(len(request.images) + 1, pixels, last, has_im_end)
  # An observation is added as a whole or not at all; one over a budget ends the rollout.
  images = (*request.builder.images, *observation.images)
  if sum(image.tokens for image in images) > cfg.stop.max_image_tokens:
    request.end_reason = "too_many_images"
    return None
  left = cfg.stop.max_response_tokens - request.response_tokens - 1
  if len(observation.token_ids_T) > min(left, cfg.observation_buckets[-1]):
    request.end_reason = "token_limit"
    return None
  request.images += drawing
  request.builder.add_observation(observation)
  request.active, request.first_chunk = True, chunk
  request.turn_limit = next_turn_limit(engine, request)
  return observation


def finish(request: Request) -> Trajectory:
  """Returns the trajectory of a request that has ended."""
  assert request.end_reason is not None
  return request.builder.finish(request.end_reason)


def invariant_violation(engine: Engine, trajectory: Trajectory) -> str | None:
  """Returns the message of `trajectory.violation`, None if every invariant holds."""
  policy = engine.conversation.policy
  return violation(trajectory, (policy.image_pad_id, policy.video_pad_id))


def prompt_as_fault(request: Request) -> Trajectory:
  """Returns the prompt alone as a fault, in place of a trajectory that breaks an invariant.

  Every later step can read it: faults are left out of the statistics and the update.
  """
  old = request.builder
  builder = TrajectoryBuilder(
    old.prompt, old.sample, old.seed_path, old.temperature, old.forbidden_ids
  )
  return builder.finish("fault")


def _has_stop(text: str, stop_strings: Sequence[str]) -> bool:
  return any(stop in text for stop in stop_strings)


def _stop_string_end(engine: Engine, request: Request, new_tokens: int) -> int | None:
  """Number of tokens of the turn up to the one that completes a stop string; None without one."""
  decode, stop_strings = engine.conversation.tokenizer.decode, engine.cfg.stop_strings
  ids = request.turn_ids
  if not _has_stop(decode(ids), stop_strings):
    return None
  counts = range(len(ids) - new_tokens + 1, len(ids) + 1)
  return next(count for count in counts if _has_stop(decode(ids[:count]), stop_strings))
