"""Demonstrations: responses that are imitated, in the same form as sampled ones.

    turns of a row (text, images)  ──┐
    script of a solver             ──┼──► Trajectory, every token of its turns trained
    true answer, with a solution   ──┘

A text is written as the policy would write it. What it draws is drawn again, unless the row gives
the images.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from spatial_jax.data.media import read_pixels
from spatial_jax.data.tokenizer import IM_END
from spatial_jax.data.vision_packing import ImageNeeds, needs_of
from spatial_jax.drawing.canvas import DrawnImage, Style, draw, targets
from spatial_jax.drawing.parser import Coordinates, Limits, Parsed, parse
from spatial_jax.errors import DataError
from spatial_jax.grammar import TAGS, VILASR, Grammar
from spatial_jax.rollout.conversation import Conversation, TrajectoryBuilder
from spatial_jax.types import DemonstratedTurn, Operation, Prompt, ScriptTurn, Task, Trajectory

TOOL_NAMES = {"box": "Object Mapper", "line": "Path Tracer"}
Solver = Callable[[Task], Sequence[ScriptTurn]]


def write_turn(
  think: str,
  operations: Sequence[Operation],
  coordinates: Coordinates,
  grammar: Grammar = VILASR,
) -> str:
  """Returns the text of a drawing turn; `parse` returns the same operations.

  Args:
    think: the reasoning, without tags or fences.
    operations: at least one, all of one tool; written coordinates are rounded to whole numbers.
    coordinates: unit and images.
    grammar: of the prompt form.

  Raises:
    ValueError: if `parse` could not read the turn.
  """
  tools = {operation.tool for operation in operations}
  if len(tools) != 1:
    raise ValueError(f"a turn draws with exactly one tool, got {sorted(tools)}")
  items = [_item(operation, coordinates) for operation in operations]
  block = json.dumps(items, ensure_ascii=False)
  if "```" in block:
    raise ValueError("a label must not contain a fence (```)")
  return f"{_before(think, TOOL_NAMES[tools.pop()], grammar)}\n```json\n{block}\n```"


def write_answer(think: str, answer: str, grammar: Grammar = VILASR) -> str:
  """Returns the text of the last turn. Raises ValueError if a text contains a tag."""
  for tag in TAGS:
    if tag in answer:
      raise ValueError(f"an answer must not contain {tag}")
  before = _before(think, "Answer", grammar)
  if not grammar.answer:
    return f"{before}{answer}"
  return f"{before}{chr(10) if before else ''}<{grammar.answer}> {answer} </{grammar.answer}>"


def _before(think: str, action: str, grammar: Grammar) -> str:
  """What a turn has before its block or answer."""
  for tag in (*TAGS, "```"):
    if tag in think:
      raise ValueError(f"the reasoning must not contain {tag}")
  if not grammar.reasoning:
    return ""
  tag = grammar.reasoning
  return f"<{tag}> {think} </{tag}>" + (f" Action: {action}" if grammar.action else "")


def _item(operation: Operation, coordinates: Coordinates) -> dict[str, Any]:
  written = coordinates.from_pixels(operation.points_4, operation.image)
  if operation.tool == "box":
    points = {"bbox_2d": list(written)}
  else:
    points = {"start_point_2d": list(written[:2]), "end_point_2d": list(written[2:])}
  return {"index": operation.image, **points, "label": operation.label}


@dataclasses.dataclass(frozen=True)
class SequenceLimits:
  """What one demonstration may need of the static shapes of a batch."""

  tokens: int  # of prompt and response
  windows: int  # slots of the vision tower
  frames: int
  patches: int  # of the largest frame

  def problem(self, tokens: int, images: ImageNeeds) -> str:
    """What a demonstration needs too much of; "" if it fits."""
    smaller = "lower config.preprocess.max_pixels or config.video.max_pixels"
    needs = (
      (tokens, self.tokens, "tokens", "raise the tokens of the stage"),
      (images.windows, self.windows, "windows of images", smaller),
      (len(images.frames), self.frames, "images and frames", "leave some out"),
      (max(images.frames, default=0), self.patches, "patches in one image", smaller),
    )
    found = (
      f"{count:,} {name}, at most {most:,} fit; {fix}"
      for count, most, name, fix in needs
      if count > most
    )
    return next(found, "")


@dataclasses.dataclass(frozen=True, eq=False)
class Demonstrator:
  """Task -> trajectory to imitate; a small record that worker processes receive."""

  conversation: Conversation
  style: Style  # of drawings
  limits: Limits  # of one turn
  # Writes the response of a task that has none; None: the true answer alone is imitated.
  solver: Solver | None
  sizes: SequenceLimits | None  # None: a demonstration may have any size

  def __call__(self, task: Task) -> Trajectory:
    """Returns the demonstration of a task.

    Raises:
      DataError: if media or turns cannot be used, or it does not fit `sizes`; the message names the
        task.
    """
    return self.of_turns(self.conversation.prompt(task), task, task.turns)

  def pair(self, task: Task) -> tuple[Trajectory, Trajectory]:
    """Returns the preferred and the rejected response of a task, about one prompt.

    Raises:
      DataError: as `__call__`, or if the task has no rejected response.
    """
    if not task.rejected:
      raise DataError(f"task {task.task_id} has no rejected response; add the field rejected")
    prompt = self.conversation.prompt(task)
    return (
      self.of_turns(prompt, task, task.turns),
      self.of_turns(prompt, task, task.rejected),
    )

  def of_script(self, task: Task, script: Sequence[ScriptTurn]) -> Trajectory:
    """The demonstration of a script of a solver; errors as in `__call__`."""
    prompt = self.conversation.prompt(task)
    found = demonstration_trajectory(self.conversation, prompt, script, self.style)
    return self._checked(found, task)

  def of_turns(self, prompt: Prompt, task: Task, turns: Sequence[DemonstratedTurn]) -> Trajectory:
    """The demonstration of given turns; without any, that of the solver or of the true answer."""
    if turns:
      trajectory = self._follow(prompt, task, turns)
    elif self.solver is not None:
      trajectory = demonstration_trajectory(
        self.conversation, prompt, self.solver(task), self.style
      )
    else:
      trajectory = self._follow(prompt, task, [answer_turn(task, prompt.grammar)])
    return self._checked(trajectory, task)

  def _checked(self, trajectory: Trajectory, task: Task) -> Trajectory:
    if self.sizes is not None:
      grids = [image.grid_3 for image in trajectory.images]
      images = needs_of(grids, self.conversation.policy.vision.window_blocks)
      if problem := self.sizes.problem(len(trajectory.token_ids_T), images):
        raise DataError(f"task {task.task_id}: its demonstration has {problem}")
    return trajectory

  def _follow(self, prompt: Prompt, task: Task, turns: Sequence[DemonstratedTurn]) -> Trajectory:
    """Appends given texts and their observations to the prompt."""
    conversation = self.conversation
    builder = TrajectoryBuilder(prompt, 0, (), 1.0, conversation.forbidden_ids)
    images = [DrawnImage(image.pixels, ()) for image in prompt.images]
    for number, turn in enumerate(turns):
      parsed = self._parse(turn.text, images, prompt.grammar)
      last = number == len(turns) - 1
      problem = _problem(parsed, turn, last, prompt.grammar)
      if problem:
        raise DataError(f"task {task.task_id} turn {number + 1}: {problem}")
      self._add(builder, turn.text, parsed.operations if not last else ())
      if last:
        break
      if turn.images is None:
        drawn = draw(images, parsed.operations, self.style)
      else:
        drawn = tuple(DrawnImage(read_pixels(ref), ()) for ref in turn.images)
      final = number == len(turns) - 2
      pixels = [image.pixels for image in drawn]
      builder.add_observation(
        conversation.observation(len(images) + 1, pixels, final, text=turn.observation)
      )
      images += drawn
    return builder.finish("answer")

  def _parse(self, text: str, images: Sequence[DrawnImage], grammar: Grammar) -> Parsed:
    sizes = tuple((image.pixels.shape[1], image.pixels.shape[0]) for image in images)
    coordinates = Coordinates(self.conversation.policy.coordinates, sizes)
    return parse(text, coordinates, self.limits, grammar)

  def _add(self, builder: TrajectoryBuilder, text: str, operations: tuple[Operation, ...]) -> None:
    tokenizer = self.conversation.tokenizer
    ids = [*tokenizer.encode(text), tokenizer.id(IM_END)]
    forbidden = set(self.conversation.forbidden_ids).intersection(ids)
    if forbidden:
      raise DataError(
        f"task {builder.prompt.task.task_id}: a turn contains the special token "
        f"{tokenizer.inner.id_to_token(min(forbidden))}; remove it"
      )
    builder.add_turn(ids, [0.0] * len(ids), 0, text, operations, ())


def _problem(parsed: Parsed, turn: DemonstratedTurn, last: bool, grammar: Grammar) -> str:
  """Why a turn cannot be imitated; "" if it can."""
  if last:
    return "" if parsed.has_answer else "the last turn has no answer in the form of config.text"
  if not grammar.draws:
    return "the form of config.text has one turn; use text=vilasr for turns that draw"
  if turn.images is None and (parsed.errors or not parsed.operations):
    code = f" ({parsed.errors[0].code}: {parsed.errors[0].detail})" if parsed.errors else ""
    return f"it draws nothing that can be executed{code}; fix it, or give its images"
  return ""


def answer_turn(task: Task, grammar: Grammar) -> DemonstratedTurn:
  """The response that is the true answer, after the solution `extra["solution"]` if there is one.

  Raises:
    DataError: if the form asks for reasoning and there is none, or it contains a tag.
  """
  solution = str(task.extra.get("solution") or "") if grammar.reasoning else ""
  if grammar.reasoning and not solution:
    raise DataError(
      f"task {task.task_id} has no turns to imitate, and the form of config.text asks for "
      "reasoning; add the field turns, or use text=vanilla"
    )
  answer = f"{task.answer} {task.unit}" if solution and task.unit else task.answer
  try:
    return DemonstratedTurn(write_answer(solution, answer, grammar), None, None)
  except ValueError as error:
    raise DataError(f"task {task.task_id}: its solution cannot be imitated: {error}") from error


def demonstration_trajectory(
  conversation: Conversation,
  prompt: Prompt,
  script: Sequence[ScriptTurn],
  style: Style,
) -> Trajectory:
  """Writes a script as a trajectory and makes its drawings; every token of its turns is trained.

  Args:
    conversation: encodes turns and observations.
    prompt: of the task.
    script: drawing turns, then one answer; also on a drawn image in pixels of the image of the task
      that it shows.
    style: of the drawings.

  Returns:
    The trajectory. Its log-probabilities are 0, because no policy sampled it.
  """
  tokenizer, unit = conversation.tokenizer, conversation.policy.coordinates
  builder = TrajectoryBuilder(prompt, 0, (), 1.0, conversation.forbidden_ids)
  images = [DrawnImage(image.pixels, ()) for image in prompt.images]
  scales = [
    (image.pixels.shape[1] / width, image.pixels.shape[0] / height)
    for image, (height, width) in zip(prompt.images, prompt.original_sizes, strict=False)
  ]
  for number, turn in enumerate(script):
    sizes = tuple((image.pixels.shape[1], image.pixels.shape[0]) for image in images)
    coordinates = Coordinates(unit, sizes)
    operations = tuple(_as_parsed(o, scales[o.image - 1], coordinates) for o in turn.operations)
    if turn.answer is None:
      text = write_turn(turn.think, operations, coordinates, prompt.grammar)
    else:
      text = write_answer(turn.think, turn.answer, prompt.grammar)
    ids = [*tokenizer.encode(text), tokenizer.id(IM_END)]
    builder.add_turn(ids, [0.0] * len(ids), 0, text, operations, ())
    if turn.answer is None:
      drawn = draw(images, operations, style)
      last = number == len(script) - 2
      builder.add_observation(
        conversation.observation(len(images) + 1, [image.pixels for image in drawn], last)
      )
      images += drawn
      scales += [scales[index - 1] for index in targets(operations)]
  return builder.finish("answer")


def _as_parsed(
  operation: Operation, scale: tuple[float, float], coordinates: Coordinates
) -> Operation:
  """The operation as it is parsed from the turn: on the resized image, in whole written numbers."""
  (x1, y1, x2, y2), (x, y) = operation.points_4, scale
  a, b, c, d = coordinates.from_pixels((x1 * x, y1 * y, x2 * x, y2 * y), operation.image)
  points_4 = coordinates.to_pixels((float(a), float(b), float(c), float(d)), operation.image)
  return dataclasses.replace(operation, points_4=points_4)
