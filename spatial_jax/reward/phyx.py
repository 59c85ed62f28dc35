r"""PhyX's own rules for reading and matching an answer, with their quirks.

    open    after "final answer" or "correct answer" and a colon, up to three line breaks; equal to
            the key in lower case; else right if the key occurs anywhere in the response
    choice  the first A-D after "answer", "option" or "correct"; else the last "A:"; else, and also
            if another letter was found, right if "KEY:", "KEY**" or "**KEY" occurs

PhyX asks a language model about answers that the rules do not match; here they count as wrong, as
with its valid_type STR.

Source: PhyX (arXiv:2505.15929), vlmeval/dataset/utils/phyx.py of its repository.
"""

import re

_OPEN = re.compile(  # a colon may be that of Chinese text
  "\\b(?:final\\s+answer|correct\\s+answer)\\b[^:\uff1a]*[:\uff1a]\\s*(.*?)(?=\n\n\n|\\Z)",
  re.IGNORECASE | re.DOTALL,
)
_CHOICE = re.compile(r"\b(?:correct|answer|option|Answer|Option|Correct)\b[\s\S]*?([A-D])")
_LETTER = re.compile(r"([ABCD]):")


def extract_open(prediction: str) -> str:
  """Returns the final answer of a response; the whole response if it names none."""
  match = _OPEN.search(prediction)
  return match[1] if match else prediction


def matches_open(prediction: str, key: str) -> bool:
  """Returns whether an open answer is right."""
  extracted = extract_open(prediction).strip().lower()
  return extracted == key.strip().lower() or key in prediction


def extract_choice(prediction: str) -> str | None:
  """Returns the letter of a response, None without one."""
  if match := _CHOICE.search(prediction):
    return match[1]
  letters = _LETTER.findall(prediction)
  return letters[-1] if letters else None


def matches_choice(prediction: str, key: str) -> bool:
  """Returns whether a choice is right; a response that is only the letter counts."""
  prediction = prediction.strip()
  if prediction == key or extract_choice(prediction) == key:
    return True
  return any(form in prediction for form in (f"{key}:", f"{key}**", f"**{key}"))
