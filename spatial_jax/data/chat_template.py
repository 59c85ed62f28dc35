"""The chat template of a model's folder: messages as text, as transformers renders them.

    chat_template.jinja, else chat_template.json, else "chat_template" of tokenizer_config.json

The contents of messages are strings with the tokens of images in them. A folder without a template
gets ChatML, the format of Qwen:

    <|im_start|>system\\n ... <|im_end|>\\n<|im_start|>user\\n ... <|im_end|>\\n
    <|im_start|>assistant\\n  [sampled turn]<|im_end|>  \\n<|im_start|>user\\n ...

Source: transformers, `utils/chat_template_utils.py` (environment and functions of templates).
"""

import dataclasses
import datetime
import functools
import json
import pathlib
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from spatial_jax.data.tokenizer import IM_END, IM_START
from spatial_jax.errors import DataError

FILE = "chat_template.jinja"
_LEGACY_FILE, _TOKENIZER_FILE = "chat_template.json", "tokenizer_config.json"
_KEY = "chat_template"
_ASSISTANT = f"{IM_START}assistant\n"
_TURN, _USER, _SYSTEM = "[[a sampled turn]]", "[[a question]]", "[[a system message]]"

# Roles between <|im_start|> and <|im_end|>, one pad token per image or video, no default system
# message.
CHATML_SOURCE = (
  "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
  "{% if message['content'] is string %}{{ message['content'] }}"
  "{% else %}{% for part in message['content'] %}"
  "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
  "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
  "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
  "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """A chat template; only its text is stored, so that it can be sent to other processes."""

  source: str  # Jinja
  file: str  # where it was read, for messages

  def prompt(self, system: str, user: str) -> str:
    """Returns the text before the first turn.

    Args:
      system: content of the system message; "": none is given, and the template may add its own.
      user: content of the user message, images as tokens.

    Raises:
      DataError: if the template refuses the messages.
    """
    return self._render(self._first(system, user))

  def observation(self, user: str) -> str:
    """Returns the text after the <|im_end|> of a turn, up to the next turn; errors as in `prompt`.

    Args:
      user: content of the user message between the turns.
    """
    turn, question = self._message("assistant", _TURN), self._message("user", user)
    text = self._render([*self._first("", _USER), turn, question])
    return text.partition(_TURN)[2].removeprefix(IM_END)

  @functools.cached_property
  def response_prefix(self) -> str:
    """What the template writes at the beginning of each turn: "<think>\\n" of thinking models."""
    return self.prompt("", _USER).rpartition(_ASSISTANT)[2]

  def _first(self, system: str, user: str) -> list[dict[str, str]]:
    given = [self._message("system", system)] if system else []
    return [*given, self._message("user", user)]

  def _message(self, role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}

  def _render(self, messages: list[dict[str, str]]) -> str:
    try:
      template = _compiled(self.source)
      return template.render(
        messages=messages, tools=None, documents=None, add_generation_prompt=True
      )
    except Exception as error:  # a template may raise any error
      raise DataError(
        f"{self.file}: the chat template cannot be used ({error}); copy that of the model again"
      ) from error


CHATML = ChatTemplate(CHATML_SOURCE, "ChatML")


def read_chat_template(folder: pathlib.Path) -> ChatTemplate:
  """Reads and checks the chat template of a Hugging Face folder or a run; ChatML without one.

  Raises:
    DataError: if a file cannot be read, or turns are not between <|im_start|> and <|im_end|>.
  """
  for name in (FILE, _LEGACY_FILE, _TOKENIZER_FILE):
    path = folder / name
    source = _read(path) if path.is_file() else None
    if source is not None:
      template = ChatTemplate(source, str(path))
      _check(template)
      return template
  return CHATML


def _read(path: pathlib.Path) -> str | None:
  """The template of one file, None without one."""
  try:
    text = path.read_text(encoding="utf-8")
    if path.name == FILE:
      return text
    found = json.loads(text).get(_KEY)
    if isinstance(found, list):  # several templates with names
      found = {one["name"]: one["template"] for one in found}["default"]
    if not isinstance(found, str | None):
      raise ValueError(f"{_KEY} is {type(found).__name__}, not a text")
    return found
  except KeyError as error:
    raise DataError(
      f"{path}: {_KEY} has no {error.args[0]!r}; give one template, or a list with names"
    ) from error
  except (OSError, ValueError, AttributeError, TypeError) as error:
    raise DataError(f"{path} cannot be read ({error}); copy it again") from error


def _check(template: ChatTemplate) -> None:
  """Checks what rollouts need: each message once, turns that end with <|im_end|>."""
  first = template.prompt(_SYSTEM, _USER)
  messages = [*template._first(_SYSTEM, _USER), template._message("assistant", _TURN)]
  both = template._render([*messages, template._message("user", "[[a drawing]]")])
  between = both.partition(_TURN)[2]
  problem = None
  if not all(first.count(text) == 1 for text in (_SYSTEM, _USER)):
    problem = "it does not write the system message and the question once"
  elif _ASSISTANT not in first.partition(_USER)[2]:
    problem = f"no {IM_START}assistant line follows the question"
  elif not between.startswith(IM_END):
    problem = f"a turn of the assistant does not end with {IM_END}"
  elif between.count("[[a drawing]]") != 1 or f"{IM_START}user\n" not in between:
    problem = "it does not write a user message after a turn of the assistant"
  if problem:
    raise DataError(
      f"{template.file}: the chat template is not that of a Qwen-VL model ({problem}); use that of "
      "the model, or remove it for ChatML"
    )


class _Generation(jinja2.ext.Extension):
  """{% generation %} ... {% endgeneration %}, with which templates mark what is trained."""

  tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

  def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
    """The statements between the two tags."""
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
  """The template in the environment of transformers; its code cannot reach outside."""
  environment = ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise_exception
  environment.globals["strftime_now"] = _strftime_now
  return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None) -> str:
  """JSON without the HTML escapes of jinja2's filter."""
  return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
  return datetime.datetime.now().strftime(form)
