"""A prompt form: the texts around a question and the grammar of its answers, as a TOML file.

    spatial_jax/prompts/vilasr.toml    config.text = "vilasr"
    my_form.toml                       config.text = "path/to/my_form.toml"

docs/prompts.md describes the keys.
"""

import dataclasses
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

from spatial_jax.config import ConfigError, build
from spatial_jax.data.prompt_text import TextConfig
from spatial_jax.grammar import Grammar

_SHIPPED = pathlib.Path(__file__).parents[1] / "prompts"
_SUFFIX = ".toml"
_GRAMMAR = "grammar"
_DRAWING_KEYS = ("observation", "more", "final")  # needed only by forms that draw


@dataclasses.dataclass(frozen=True)
class PromptForm:
  """How a question is asked, and how the response must be written."""

  text: TextConfig
  grammar: Grammar


def shipped_forms() -> tuple[str, ...]:
  """The names of the forms of this package."""
  return tuple(sorted(path.stem for path in _SHIPPED.glob(f"*{_SUFFIX}")))


def read_form(name: str) -> PromptForm:
  """Reads a form.

  Args:
    name: of a shipped form, or the path of a TOML file.

  Raises:
    ConfigError: in one line that names the file and every wrong key.
  """
  if name in shipped_forms():
    path = _SHIPPED / f"{name}{_SUFFIX}"
  elif name.endswith(_SUFFIX):
    path = pathlib.Path(name)
  else:
    raise ConfigError(
      f"config.text is {name!r}, which is no form; give a path that ends with {_SUFFIX}, or one of "
      f"{', '.join(shipped_forms())}"
    )
  try:
    settings = tomllib.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise ConfigError(
      f"config.text: {name} cannot be read ({error.strerror}); give a file, or one of the forms "
      f"{', '.join(shipped_forms())}"
    ) from error
  except ValueError as error:  # not UTF-8, or not TOML
    raise ConfigError(f"config.text: {name} is not a TOML file: {error}; fix that place") from error
  return form_of(settings, f"{name}: form")


def form_of(settings: Mapping[str, Any], name: str = "config.form") -> PromptForm:
  """Builds a form from the keys of its file, or from what a run recorded (`form_record`).

  Args:
    name: how messages call the mapping.

  Raises:
    ConfigError: listing all missing, unknown and mistyped keys.
  """
  grammar = settings.get(_GRAMMAR)
  texts = {key: value for key, value in settings.items() if key != _GRAMMAR}
  problems = [] if _GRAMMAR in settings else [f"{name}.{_GRAMMAR} is missing"]
  draws = isinstance(grammar, Mapping) and grammar.get("draws") is True
  built: dict[str, Any] = {}
  # Both parts are built before an error is raised, so that one message names every problem.
  for key, cls, part, where in (
    ("text", TextConfig, texts if draws else dict.fromkeys(_DRAWING_KEYS, "") | texts, name),
    ("grammar", Grammar, grammar, f"{name}.{_GRAMMAR}"),
  ):
    if part is None:
      continue
    try:
      if not isinstance(part, Mapping):
        raise ConfigError(f"{where} must be a table, [{_GRAMMAR}], got {part!r}")
      built[key] = build(cls, part, where)
    except ConfigError as error:
      problems.append(str(error))
  if problems:
    raise ConfigError(f"{'; '.join(problems)}; see docs/prompts.md")
  return PromptForm(built["text"], built["grammar"])


def form_record(form: PromptForm) -> dict[str, Any]:
  """Returns the keys of a form as JSON values; a run stores them beside its config."""
  return dataclasses.asdict(form.text) | {_GRAMMAR: dataclasses.asdict(form.grammar)}
