"""A user's own reward: one function in one Python file.

# my_reward.py
def reward(response):
  return 1.0 if response.answer == response.task.answer else 0.0

--config.learn.reward.custom=my_reward.py:reward --config.learn.reward.weights.custom=1.0
"""

import functools
import importlib.util
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import numpy as np

from spatial_jax.config import ConfigError
from spatial_jax.errors import UserError
from spatial_jax.reward.config import RewardConfig
from spatial_jax.types import Task, Turn


class Response(NamedTuple):
  """What a reward function reads."""

  text: str  # of all turns
  answer: str | None  # as the policy wrote it; None without one
  task: Task  # with question, options, the true answer and `extra`
  turns: tuple[Turn, ...]  # with their drawing operations and errors
  tokens: int  # sampled tokens
  end_reason: str  # "answer", or why the rollout ended early
  sample: int  # index in the group


RewardFunction = Callable[[Response], float]


@functools.lru_cache(maxsize=8)
def load_function(place: str) -> RewardFunction:
  """Loads the function of "FILE.py:FUNCTION".

  Raises:
    ConfigError: if the file or the function does not exist, or the file cannot be imported.
  """
  file, _, name = place.rpartition(":")
  path = pathlib.Path(file)
  if not file or not path.is_file():
    raise ConfigError(f"{place} names no file; write FILE.py:FUNCTION with the path of the file")
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec is not None  # it is a file
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as error:
    raise ConfigError(f"{file} cannot be imported ({type(error).__name__}: {error})") from error
  function = vars(module).get(name)
  if not callable(function):
    names = ", ".join(k for k, v in vars(module).items() if callable(v) and k[0] != "_")
    raise ConfigError(f"{file} has no function {name}; it has {names or 'none'}")
  return cast(RewardFunction, function)


def custom_reward(place: str, response: Response) -> float:
  """Calls the function of "FILE.py:FUNCTION" with one response.

  Raises:
    UserError: if it raises, or returns anything but a finite number; names the sample.
  """
  where = f"{place}: task {response.task.task_id} sample {response.sample}"
  try:
    value = load_function(place)(response)
  except ConfigError:
    raise
  except Exception as error:
    raise UserError(f"{where}: the reward raised {type(error).__name__}: {error}") from error
  if isinstance(value, np.ndarray) and value.shape == ():
    value = value.item()
  if isinstance(value, bool | np.bool_):
    value = float(value)
  if not isinstance(value, int | float | np.number):
    shape = f" of shape {value.shape}" if isinstance(value, np.ndarray) else ""
    raise UserError(f"{where}: the reward is {type(value).__name__}{shape}; return one number")
  if not math.isfinite(value):
    raise UserError(f"{where}: the reward is {value}; return a finite number")
  return float(value)


def check_functions(cfg: RewardConfig, tasks: Sequence[Task]) -> None:
  """Calls the user's functions, reward and judge, with a right, a wrong and no answer.

  Prints the values. Errors as in `custom_reward`.

  Args:
    cfg: of the reward; without functions of the user nothing is called.
    tasks: examples of the data, at least one.
  """
  places = [cfg.custom] if "custom" in cfg.active else []
  if "rubric" in cfg.active and cfg.rubric.judge:
    places.append(cfg.rubric.judge)
  for place in places:
    values = [custom_reward(place, response) for response in _examples(tasks)]
    shown = ", ".join(f"{value:g}" for value in values)
    print(f"{place}: a right, a wrong and no answer are rewarded {shown}")


def _examples(tasks: Sequence[Task]) -> list[Response]:
  """A right, a wrong and no answer, to three tasks if there are as many."""
  chosen = [tasks[number % len(tasks)] for number in range(3)]
  answers = (chosen[0].answer, "no idea", None)
  return [
    Response(
      text="" if answer is None else f"<think> I look. </think> <answer> {answer} </answer>",
      answer=answer,
      task=task,
      turns=(),
      tokens=0 if answer is None else 8,
      end_reason="no_action" if answer is None else "answer",
      sample=number,
    )
    for number, (task, answer) in enumerate(zip(chosen, answers, strict=True))
  ]
