r"""Text of an answer -> number or option, strictly: text with two readings gives none.

Runs on the host, once per rollout. A number is a phrase of this grammar and nothing else:

    [about | approximately | the answer is | ~ ...] quantity [smaller quantity ...] [(the same)]
    quantity  =  number [unit]        2.35 m     1,200 cm^2     3 1/2 feet     5 ft 3 in     twelve
    count     =  number [noun of the question]                  4 chairs

Unicode, LaTeX and Markdown spellings (−5, \boxed{5}, **5**) are those of `plain_text`.
Two numbers ("2 or 3"), ranges ("2-3"), bounds ("at least 2"), decimal commas ("2,5"), units that do
not fit the question, unknown words, NaN and infinity are failures: reward 0, counted in `parsed`.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from spatial_jax.errors import DataError
from spatial_jax.reward.plain_text import plain
from spatial_jax.reward.quantity import COUNT, asked_unit, counted_noun, parse_number
from spatial_jax.types import Task

MAX_CHARS = 2000  # of the text of a choice; a longer answer is prose

_LABELLED_OPTION = re.compile(r"[(\[]?(?P<letter>[A-Za-z])[.):\]]+\s*(?P<text>.*)", re.DOTALL)
_CHOSEN_OPTION = re.compile(
  r"[(\[{]?\s*(?P<letter>[A-Za-z])"
  r"(?:(?:\s*[.:,;=)\]}\u2014]+\s*|\s+)(?:[-\u2014]\s+)?(?P<text>.*))?",
  re.DOTALL,
)
_OPTION_IN_FRONT = re.compile(r"(?P<text>.*\S)\s*[(\[](?P<letter>[A-Za-z])[)\]]", re.DOTALL)
_CHOICE_LEAD = re.compile(
  r"(?:(?:(?:the|my|final|correct)\s+)*(?:answer|option|choice)\s*(?:is\b)?\s*:?\s*)+",
  re.IGNORECASE,
)


class Expected(NamedTuple):
  """The form of the answer to one question."""

  options: tuple[str, ...] | None  # of a choice, "A. table", ...; None: the answer is a number
  unit: str | None  # of the number ("meters"); `COUNT` if it counts something; None: no unit
  noun: str | None  # the counted noun ("chair(s)"), which may follow a count; None: unknown


class Reading(NamedTuple):
  """One answer as a number, ready for the jitted rewards."""

  value: float  # in the expected unit, or the index of the option; 0 if not parsed
  parsed: bool  # the text has exactly one reading


def expected_of(task: Task) -> Expected:
  """Returns the form of the answer to a task, derived from its kind, question and options."""
  if task.answer_kind != "number":
    return Expected(task.options or (), None, None)
  unit = asked_unit(task.question)
  return Expected(None, unit, counted_noun(task.question) if unit == COUNT else None)


def read(text: str | None, task: Task) -> Reading:
  """Reads an answer in the form that its task expects; None (no answer) is not parsed."""
  return read_as(text, expected_of(task))


def read_as(text: str | None, expected: Expected) -> Reading:
  """Reads an answer in the expected form; None (no answer) is not parsed."""
  value = None
  if text is not None and expected.options is None:
    value = parse_number(text, expected.unit, expected.noun)
  elif text is not None and expected.options is not None:
    letter = parse_choice(text, expected.options)
    value = None if letter is None else float(ord(letter) - ord("A"))
  return Reading(0.0 if value is None else value, value is not None)


def check_truth(task: Task) -> Reading:
  """Returns the truth of a task as a number; a task without a readable truth is refused.

  Raises:
    DataError: if no reward can read `task.answer` as the question asks for it.
  """
  if task.answer_kind not in ("number", "choice"):
    raise DataError(
      f"task {task.task_id}: no reward reads an answer of kind {task.answer_kind!r}; use number or "
      "choice"
    )
  if task.answer_kind == "choice" and not task.options:
    raise DataError(f"task {task.task_id}: a choice needs options")
  expected = expected_of(task)
  truth = read_as(task.answer, expected)
  if not truth.parsed:
    form = f"one of the options {task.options}" if expected.options else "a number"
    unit = f" in {expected.unit}" if expected.unit not in (None, COUNT) else ""
    raise DataError(
      f"task {task.task_id}: the truth {task.answer!r} cannot be read as {form}{unit}, which the "
      f"question asks for ({task.question!r}); fix the truth or the question"
    )
  return truth


def parse_choice(text: str, options: Sequence[str]) -> str | None:
  """Reads the one option that an answer chooses.

  Accepts the letter ("B", "b.", "(B)", "[B]"), the letter with the option's own text ("B. chair",
  "B - chair", "chair (B)"), the text alone ("chair", "the chair") and each of them after "the
  answer is". A letter with the text of another option, two letters, or a text that several options
  share give None.

  Args:
    text: the answer; None is returned for more than 2,000 characters.
    options: "A. table", "B. chair", ...; options without letters are A, B, C in order.
  """
  if len(text) > MAX_CHARS:
    return None
  texts = _option_texts(options)
  text = plain(text)
  readings = _chosen(text, texts)
  if lead := _CHOICE_LEAD.match(text):
    readings |= _chosen(plain(text[lead.end() :]), texts)
  return readings.pop() if len(readings) == 1 else None


def _option_texts(options: Sequence[str]) -> dict[str, str]:
  """Letter -> words of the option."""
  matches = [_LABELLED_OPTION.fullmatch(plain(option)) for option in options]
  labelled = {match["letter"].upper(): _words(match["text"]) for match in matches if match}
  if len(labelled) == len(options):
    return labelled
  return {chr(ord("A") + i): _words(plain(option)) for i, option in enumerate(options)}


def _chosen(text: str, texts: dict[str, str]) -> set[str]:
  """The letters that the text can mean."""
  words = _words(text)
  found = {letter for letter, option in texts.items() if words and option == words}
  for form in (_CHOSEN_OPTION, _OPTION_IN_FRONT):
    if match := form.fullmatch(text):
      letter, rest = match["letter"].upper(), match["text"] or ""
      if letter in texts and (not re.search(r"\w", rest) or _words(rest) == texts[letter]):
        found.add(letter)
  return found


def _words(text: str) -> str:
  """An option's text for comparison: lower case, no article, no punctuation except in numbers."""
  text = re.sub(r"^(?:a|an|the)\s+", "", text.strip().lower())
  return " ".join(re.sub(r"(?!-\s?\d|[.,/^]\d)[^\w\s]", " ", text).split())
