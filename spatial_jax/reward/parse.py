r"""Text of an answer -> number, option or words, strictly: text with two readings gives none.

Runs on the host, once per rollout. A number is a phrase of this grammar and nothing else:

    [about | approximately | the answer is | ~ ...] quantity [smaller quantity ...] [(the same)]
    quantity  =  number [unit]        2.35 m     1,200 cm^2     3 1/2 feet     5 ft 3 in     twelve
    count     =  number [noun of the question]                  4 chairs

Unicode, LaTeX and Markdown spellings (−5, \boxed{5}, **5**) are those of `plain_text`.
Two numbers ("2 or 3"), ranges ("2-3"), bounds ("at least 2"), decimal commas ("2,5"), units that do
not fit the question, unknown words, NaN and infinity are failures: reward 0, counted in `parsed`.

An answer in words is right if it equals the truth after case, articles, punctuation and numbers in
words are normalised (vsGRPO's character match, arXiv:2504.00883): "The Chair." is "chair".
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from spatial_jax.errors import DataError
from spatial_jax.reward.plain_text import plain
from spatial_jax.reward.quantity import (
  COUNT,
  NUMBER_WORDS,
  asked_unit,
  counted_noun,
  has_lead,
  is_metric,
  parse_number,
  parse_other_unit,
)
from spatial_jax.reward.units import read_measure, value_in
from spatial_jax.types import Task

_SMALLEST = 1e-30  # a truth below it is 0 in float32, or its relative error overflows
MAX_CHARS = 2000  # of the text of a choice, and of words; a longer answer is prose

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

  options: tuple[str, ...] | None  # of a choice, "A. table", ...; None: a number, or words
  # Of the number: a length or an area ("meters"); `COUNT` if it counts something; another text
  # ("degrees"), which may follow the number; None: no unit.
  unit: str | None
  noun: str | None  # the counted noun ("chair(s)"), which may follow a count; None: unknown
  words: str | None  # the truth of an answer in words; None: a number, or a choice

  @property
  def is_number(self) -> bool:
    """Whether the answer is a number."""
    return self.options is None and self.words is None

  @property
  def description(self) -> str:
    """What a text must be to be read, for messages."""
    if self.words is not None:
      return "words (it has no letter and no digit)"
    if self.options is not None:
      return f"one of the options {self.options}"
    return "a number" + (f" in {self.unit}" if self.unit not in (None, COUNT) else "")


class Reading(NamedTuple):
  """One answer as a number, ready for the jitted rewards."""

  # In the expected unit, the index of the option, or 1 for the right words; 0 if not parsed.
  value: float
  parsed: bool  # the text has exactly one reading


def expected_of(task: Task) -> Expected:
  """Returns the form of the answer to a task, derived from its kind, question and options."""
  if task.answer_kind == "words":
    return Expected(None, None, None, task.answer)
  if task.answer_kind == "choice":
    return Expected(task.options or (), None, None, None)
  unit = task.unit or asked_unit(task.question)
  return Expected(None, unit, counted_noun(task.question) if unit == COUNT else None, None)


def read(text: str | None, task: Task) -> Reading:
  """Reads an answer in the form that its task expects; None (no answer) is not parsed."""
  return read_as(text, expected_of(task))


def read_as(text: str | None, expected: Expected) -> Reading:
  """Reads an answer in the expected form; None (no answer) is not parsed."""
  if text is None:
    return Reading(0.0, False)
  if expected.words is not None:
    words = normal_words(text)
    return Reading(float(words == normal_words(expected.words) != ""), words != "")
  if expected.options is not None:
    letter = parse_choice(text, expected.options)
    value = None if letter is None else float(ord(letter) - ord("A"))
  elif expected.unit is not None and not is_metric(expected.unit):
    value = parse_other_unit(text, expected.unit)
    if value is None and (measure := read_measure(text)) and measure.unit:
      value = value_in(measure, expected.unit)
  else:
    value = parse_number(text, expected.unit, expected.noun)
  return Reading(0.0 if value is None else value, value is not None)


def check_truth(task: Task) -> Reading:
  """Returns the truth of a task as a number; a task without a readable truth is refused.

  Raises:
    DataError: if no reward can read `task.answer` as the question asks for it, or the number is not
      exact, or is 0.
  """
  if task.answer_kind not in ("number", "choice", "words"):
    raise DataError(
      f"task {task.task_id}: no reward reads an answer of kind {task.answer_kind!r}; use number, "
      "choice or words"
    )
  if task.answer_kind == "choice" and not task.options:
    raise DataError(f"task {task.task_id}: a choice needs options")
  expected = expected_of(task)
  truth = read_as(task.answer, expected)
  if not truth.parsed:
    raise DataError(
      f"task {task.task_id}: the truth {task.answer!r} cannot be read as {expected.description}, "
      f"which the question asks for ({task.question!r}); fix the truth or the question"
    )
  if expected.is_number and has_lead(task.answer):
    raise DataError(
      f"task {task.task_id}: the truth {task.answer!r} is not a number alone; remove the words "
      "before it"
    )
  if expected.is_number and abs(truth.value) < _SMALLEST:
    raise DataError(
      f"task {task.task_id}: the truth is 0, but the rewards of numbers divide by it; leave the "
      "task out, or give it the answer kind words"
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


_ARTICLES = ("a", "an", "the")
_MOST_PASSES = 8


def normal_words(text: str) -> str:
  """Returns an answer in words for comparison; "" if nothing is left, or of over 2,000 characters.

  Case, articles, punctuation and spaces are dropped, and numbers in words become digits:

      "The Chair."  "chair"      "**three**"  "3"      "Front-left"  "front left"      "a"  "a"
  """
  if len(text) > MAX_CHARS:
    return ""
  for _ in range(_MOST_PASSES):  # markup may have been inside punctuation: "0_:"
    before, text = text, _normal_once(text)
    if text == before:
      break
  return text


def _normal_once(text: str) -> str:
  """One pass of `normal_words`."""
  words = _words(plain(text)).split()
  words = [word for word in words if word not in _ARTICLES] or words
  numbers = {word: str(value) for value, word in enumerate(NUMBER_WORDS)}
  return " ".join(numbers.get(word, word) for word in words)
