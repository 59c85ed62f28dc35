r"""Typographic, LaTeX and Markdown spellings of an answer -> the plain ASCII form that is parsed.

    "\boxed{2.5\,\text{m}^{2}}"     "2.5 m^2"          "3½"        "3 1/2"
    "**[Ｂ]**"                      "B"                "−5"        "-5"
    "1{,}200"                       "1,200"            "“B”。"     "B"

All parsers of answers, options, questions and units read this form, so that a spelling that one of
them reads is read by all. A spelling with two readings stays as it is and is not read.
"""

import re
import unicodedata

_PADDED_KINDS = ("<compat>", "<circle>", "<square>")  # their digits must not join other digits
_SIGNS = str.maketrans(
  {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),  # hyphens, en dash, minus
    **dict.fromkeys("\u2044\u2215", "/"),
    **dict.fromkeys("\u2018\u2019\u02bc\u2032", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb", '"'),
    **dict.fromkeys("\u223c\u2243\u2245\u2248", "~"),
    **dict.fromkeys("\u3008\u300c\u300e\u3010\u3014", "["),
    **dict.fromkeys("\u3009\u300d\u300f\u3011\u3015", "]"),
    "\u00d7": "x",
    "\u3001": ",",
    "\u3002": ".",
  }
)
_GAP = "[\u00a0\u2007\u2009\u202f]"  # spaces that typesetting puts between groups of three digits
_GROUPED_DIGITS = re.compile(rf"(?<![\d.,/])[1-9]\d{{0,2}}(?:{_GAP}\d{{3}})+(?![\d/])", re.ASCII)

_LATEX = ("\\", "$", "{")
_LATEX_FORMS = [
  (re.compile(r"(?<=\d)(?:\\,|\{,\}|\\,\{\})(?=\d{3}(?!\d))", re.ASCII), ","),
  (re.compile(r"\\(?:[,;: ]|q?quad\b|displaystyle\b)"), " "),
  (re.compile(r"\\!|\\(?:left|right)(?![a-zA-Z])"), ""),
  (re.compile(r"(?<=\d)\s*\\[dtc]?frac\s*\{(\d+)\}\s*\{(\d+)\}", re.ASCII), r" \1/\2"),
  (re.compile(r"\\[dtc]?frac\s*\{(\d+)\}\s*\{(\d+)\}", re.ASCII), r"\1/\2"),
  (re.compile(r"\\(?:times|cdot)(?![a-zA-Z])"), " x "),
  (re.compile(r"\\(?:approx|sim|simeq)(?![a-zA-Z])"), "~"),
  (re.compile(r"\^\s*\{([^{}]*)\}|\\textsuperscript\s*\{([^{}]*)\}"), r"^\1\2"),
]
_LATEX_WRAPPERS = re.compile(
  r"\\(?:boxed|fbox|mbox|hbox|text(?:bf|it|rm|sf|tt|normal)?|math(?:bf|it|rm|sf|tt)|emph|underline"
  r"|operatorname|boldsymbol|bm)\s*\{([^{}]*)\}"
  r"|\$\$([^$]*)\$\$|\$([^$]*)\$|\\\((.{0,300}?)\\\)|\\\[(.{0,300}?)\\\]",
  re.DOTALL,
)
_MAX_NESTING = 6

_BRACKETS = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'"}


def plain(text: str) -> str:
  """Returns the plain form of a whole answer or option; never raises.

  Brackets, quotes and emphasis around the whole text and full stops at its end are removed.
  """
  text = plain_signs(text)
  text = re.sub(r"\*\*|__|`", " ", text)
  for _ in range(_MAX_NESTING):
    text = text.strip(" \n*_").rstrip(" .")
    start, inner, end = text[:1], text[1:-1], text[1:][-1:]
    if start not in _BRACKETS or _BRACKETS[start] != end or start in inner or end in inner:
      break
    text = inner
  return text


def plain_signs(text: str) -> str:
  """Returns the text with plain characters and without LaTeX; brackets and words stay."""
  text = _GROUPED_DIGITS.sub(lambda match: re.sub(_GAP, "", match[0]), text)
  text = _plain_characters(text)
  if any(sign in text for sign in _LATEX):
    text = _without_latex(text)
  return text


def _plain_characters(text: str) -> str:
  """NFKC, except that it keeps apart what must not join: powers, fractions, enclosed digits."""
  pieces: list[str] = []
  raised = False
  for char in text:
    if char.isascii():
      if raised and char.isdigit():
        pieces.append(" ")
      raised = False
      pieces.append(char if char == "\n" or not char.isspace() else " ")
      continue
    if unicodedata.category(char) == "Cf":  # zero-width and direction marks
      continue
    kind = unicodedata.decomposition(char).split(" ")[0]
    form = unicodedata.normalize("NFKC", char)
    if kind == "<super>":
      form = form if raised else f"^{form}"
    elif kind == "<fraction>":
      form = f" {form} " if pieces and pieces[-1][-1:].isdigit() else f"{form} "
    elif kind in _PADDED_KINDS and any(map(str.isdigit, form)):
      form = f" {form} "
    elif kind == "<sub>":
      form = char
    raised = kind == "<super>"
    pieces.append(" " if form.isspace() else form)
  return unicodedata.normalize("NFC", "".join(pieces).translate(_SIGNS))


def _without_latex(text: str) -> str:
  for pattern, form in _LATEX_FORMS:
    text = pattern.sub(form, text)
  for _ in range(_MAX_NESTING):
    text, changes = _LATEX_WRAPPERS.subn(_content, text)
    if not changes:
      break
  return text


def _content(match: re.Match[str]) -> str:
  """The content of a wrapper, with a space where it would join a letter or digit beside it."""
  content = next(group for group in match.groups() if group is not None)
  start, end = match.span()
  before, after = match.string[start - 1 : start], match.string[end : end + 1]
  left = " " if before.isalnum() and content[:1].isalnum() else ""
  right = " " if after.isalnum() and content[-1:].isalnum() else ""
  return f"{left}{content}{right}"
