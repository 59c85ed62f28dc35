"""Answers of foreign rows in the form that their source means: a number, an option, or words.

"(B)", "B", "<answer>B</answer>", "lamp"  ──► choice  B
"6.1", "6.1 meters", 6.1                  ──► number  6.1 and its unit
"""

import re
import unicodedata
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, Literal

from spatial_jax.data.formats.fields import as_text, shown
from spatial_jax.data.rows import RowProblem

MAX_OPTIONS = 26
_LARGEST = 1e38  # the largest number that float32 holds is a little more

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_THINK = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)
_LETTER = re.compile(r"[(\[]?([A-Z])[)\].:]*")
_LETTERED = re.compile(r"[(\[]?([A-Z])[.):\]]\s*(.*)", re.DOTALL)
# "A. x", "(A) x", "A: x" after white space, a comma or a semicolon, or at the beginning.
_MARKER = re.compile(r"(?:(?<=[\s,;])|^)[(\[]?([A-Z])[.):\]]+(?=\s|$)")
# What may stand in front of the first option, and what sources add after the last one.
_BEFORE = re.compile(r"[?.:!;)\]>\n]\s*$|\n$")
_INSTRUCTION = re.compile(
  r"(?:please\s+)?(?:answer|select|choose|respond|provide)\b.*\b(?:letter|option|choice)",
  re.I | re.S,
)
_HEADING = re.compile(r"\s*(?:the\s+)?(?:options|choices)\s*(?:are)?\s*[:.]?\s*$", re.IGNORECASE)
_NUMBER = re.compile(
  r"(?P<number>[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|\.)?(?:[eE][+-]?\d+)?)\s*(?P<unit>.*)"
)
_UNITS = MappingProxyType({
  "m": "m", "meter": "m", "meters": "m", "metre": "m", "metres": "m",
  "cm": "cm", "centimeter": "cm", "centimeters": "cm", "centimetre": "cm", "centimetres": "cm",
  "mm": "mm", "millimeter": "mm", "millimeters": "mm", "km": "km", "kilometers": "km",
  "ft": "ft", "feet": "ft", "foot": "ft", "in": "in", "inch": "in", "inches": "in",
  "m^2": "m^2", "m2": "m^2", "square meters": "m^2", "square metres": "m^2", "sq m": "m^2",
  "deg": "deg", "degree": "deg", "degrees": "deg", "°": "deg", "s": "s", "seconds": "s",
})  # fmt: skip
# In a sentence "in" is a word, and "s" may be a plural.
_SENTENCE_UNITS = "|".join(
  re.escape(unit) for unit in sorted(_UNITS, key=len, reverse=True) if unit not in ("in", "s")
)
_IN_SENTENCE = re.compile(
  r"(?<![\w.,])[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?!\w|[.,]\d)"
  rf"(?P<unit>\s*(?:{_SENTENCE_UNITS})(?![\w^/]))?",
  re.IGNORECASE,
)
_RANGE = re.compile(r"\d\s*(?:-|\u2013|~|\bto\b|\bor\b)\s*\d")


def final_answer(text: str) -> str:
  """What a response answers: the last <answer> element, else the text without <think> elements."""
  found = _ANSWER.findall(text)
  return (found[-1] if found else _THINK.sub("", text)).strip()


def answer_fields(
  answer: Any,
  options: Sequence[str] | None = None,
  kind: Literal["number", "words"] | None = None,
  unit: str | None = None,
  field: str = "answer",
) -> dict[str, Any]:
  """The fields `answer`, `kind`, `options` and `unit` of a row.

  Args:
    answer: text or number.
    options: of a choice, with letters or without.
    kind: None for a choice, or to see it from the answer: one number, perhaps with a known unit, is
      a number.
    unit: of a number that does not name one.
    field: name of the answer in the source, for messages.

  Raises:
    RowProblem: if the answer is no number, no option, or blank.
  """
  if options:
    named = with_letters(options)
    return {"kind": "choice", "options": named, "answer": letter_of(answer, named, field)}
  if isinstance(answer, bool) or not isinstance(answer, str | int | float):
    raise RowProblem(field, f"must be a text or a number, got {shown(answer)}")
  if kind != "words":
    value, named_unit = _number_and_unit(answer)
    if value is not None:
      unit = named_unit or unit
      return {"kind": "number", "answer": value} | ({"unit": unit} if unit else {})
    if kind == "number" or not isinstance(answer, str):
      raise RowProblem(field, f"is {shown(answer)} and must be a number")
  return {"kind": "words", "answer": as_text(str(answer), field)}


def embedded_fields(
  question: str,
  answer: Any,
  kind: Literal["number", "words"] | None = None,
  unit: str | None = None,
  field: str = "answer",
  letters: bool = False,
) -> dict[str, Any]:
  """As `answer_fields` with `question`, for a source that writes options into the question.

  The options are taken out of the question if the answer is the letter or the text of one of them.

  Args:
    letters: an answer that is one capital letter must be the letter of an option.
  """
  split = split_options(question)
  if split is not None and isinstance(answer, str):
    stem, options = split
    letter = find_letter(answer, options)
    if letter is not None:
      return {"question": stem, "kind": "choice", "options": options, "answer": letter}
  if letters and isinstance(answer, str) and _LETTER.fullmatch(answer.strip()):
    raise RowProblem(field, f"is {shown(answer)}, but the question has no such option")
  return {"question": question} | answer_fields(answer, None, kind, unit, field)


def with_letters(options: Sequence[Any]) -> list[str]:
  """The options as "A. sofa", "B. lamp", ...; letters that are there are replaced.

  Raises:
    RowProblem: if an option is not a text, or there are too few or too many.
  """
  if not 2 <= len(options) <= MAX_OPTIONS:
    raise RowProblem("options", f"must be 2 to {MAX_OPTIONS} texts, got {len(options)}")
  texts = [
    as_text(str(option) if _is_number(option) else option, f"options[{i}]")
    for i, option in enumerate(options)
  ]
  alphabet = [chr(ord("A") + i) for i in range(len(texts))]
  matches = [_LETTERED.fullmatch(text) for text in texts]
  if [match[1] for match in matches if match] == alphabet:
    texts = [match[2].strip() for match in matches if match]
    if not all(texts):  # the options are images, named by their letters
      texts = alphabet
  return [f"{letter}. {text}" for letter, text in zip(alphabet, texts, strict=True)]


def letter_of(answer: Any, options: Sequence[str], field: str = "answer") -> str:
  """The letter of the right one of `with_letters(...)`.

  Raises:
    RowProblem: if the answer is none of them, or the text of several.
  """
  letter = find_letter(str(answer) if _is_number(answer) else answer, options)
  if letter is None:
    raise RowProblem(field, f"is {shown(answer)}, which is not one of {shown(list(options))}")
  return letter


def find_letter(answer: Any, options: Sequence[str]) -> str | None:
  """As `letter_of`, but None if the answer is not one of the options."""
  if not isinstance(answer, str):
    return None
  answer = answer.strip()
  texts = {option[0]: _key(option[3:]) for option in options}
  match = _LETTER.fullmatch(answer.upper())
  if match and match[1] in texts:
    return match[1]
  found = [letter for letter, text in texts.items() if text == _key(answer)]
  if len(found) == 1:
    return found[0]
  lettered = _LETTERED.fullmatch(answer)
  if lettered and texts.get(lettered[1]) == _key(lettered[2]):
    return lettered[1]
  return None


def split_options(text: str) -> tuple[str, list[str]] | None:
  """A question with options in it -> the question, and the options with letters.

      "What is left? Options: A. sofa, B. lamp" ──► "What is left?", ["A. sofa", "B. lamp"]

  The options are the last part of the text; their letters are A, B, C, ... in order. Only options
  on lines of their own may be followed by more text, which stays in the question, but for a
  sentence on the form of the answer.

  Returns:
    None if there are no options at the end of the text.
  """
  markers = list(_MARKER.finditer(text))
  starts = [i for i, marker in enumerate(markers) if marker[1] == "A"]
  if not starts:
    return None
  letters = "".join(marker[1] for marker in markers[starts[-1] :])
  if len(letters) < 2 or letters != "".join(chr(ord("A") + i) for i in range(len(letters))):
    return None
  chosen = markers[starts[-1] :]
  ends = [marker.start() for marker in chosen[1:]] + [len(text)]
  options = [
    text[marker.end() : end].strip().rstrip(",;").strip()
    for marker, end in zip(chosen, ends, strict=True)
  ]
  before = text[: chosen[0].start()]
  stem, more = _HEADING.sub("", before).strip(), ""
  if "\n" in options[-1] and not any("\n" in option for option in options[:-1]):
    options[-1], more = (part.strip() for part in options[-1].split("\n", 1))
  is_end = bool(_BEFORE.search(before) or _HEADING.search(before))
  if not stem or not is_end or not all(options) or any("?" in option for option in options):
    return None
  if more and not _INSTRUCTION.match(more):
    stem = f"{stem}\n{more}"
  return stem, [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]


def without(text: str, instructions: Sequence[str]) -> str:
  """A question without the sentences on the form of the answer that its source adds."""
  for instruction in instructions:
    text = text.replace(instruction, "")
  return text.strip()


def number_in(sentence: str, field: str = "answer") -> str:
  """The number of a sentence: the only one with a known unit, else the only one.

      "The depth is estimated to be about 1.5 meters." ──► "1.5 meters"

  A text without a digit stays as it is.

  Args:
    sentence: the answer.
    field: name of the answer in the source, for messages.

  Raises:
    RowProblem: if there are several numbers, a range, or digits that are no number.
  """
  if is_quantity(sentence) or not re.search(r"\d", sentence):
    return sentence
  matches = list(_IN_SENTENCE.finditer(sentence))
  with_unit = [match for match in matches if match["unit"]]
  chosen = with_unit if len(with_unit) == 1 else matches
  if len(chosen) > 1 or _RANGE.search(sentence):
    raise RowProblem(field, f"is {shown(sentence)}, which has several numbers")
  if not chosen:
    raise RowProblem(field, f"is {shown(sentence)}, which has digits but no number")
  return chosen[0][0].strip()


def is_quantity(answer: Any) -> bool:
  """Whether an answer is one number, with a known unit or without."""
  return isinstance(answer, str) and _number_and_unit(answer)[0] is not None


def _number_and_unit(answer: str | int | float) -> tuple[int | float | None, str | None]:
  """A finite number, and its unit in our spelling; (None, None) for another text."""
  if isinstance(answer, int | float):
    return (answer if _is_small(answer) else None), None
  match = _NUMBER.fullmatch(answer.strip().replace("\u2212", "-"))
  if match is None or not re.search(r"\d", match["number"]):
    return None, None
  unit = match["unit"].strip().rstrip(".").lower().replace("²", "^2")
  if unit and unit not in _UNITS:
    return None, None
  text = match["number"].replace(",", "")
  value = int(text) if re.fullmatch(r"[+-]?\d{1,40}", text) else float(text)
  return (value if _is_small(value) else None), _UNITS.get(unit)


def _is_small(value: int | float) -> bool:
  """Whether float32 holds the number; false for NaN and infinity."""
  return abs(value) < _LARGEST


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _key(text: str) -> str:
  """The text of an option, for comparison."""
  plain = unicodedata.normalize("NFKC", text).casefold()
  return " ".join(plain.split()).rstrip(".")
