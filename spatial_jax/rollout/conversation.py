"""Task -> Prompt, drawn pictures -> observation: what the policy reads, token in and token out.

    prompt | turn 1 (sampled) | observation | turn 2 (sampled) | ...

An `Episode` grows one trajectory along that line. Sampling and demonstrations write through
it, so that their rows cannot differ in form.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from spatial_jax.config import ConfigError
from spatial_jax.data import prompt_text
from spatial_jax.data import tokenizer as text_lib
from spatial_jax.data.chat_template import ChatConfig, Message, chat_text
from spatial_jax.data.image import PreprocessConfig, patch_image
from spatial_jax.data.prompt_text import TextConfig
from spatial_jax.data.tokenizer import Tokenizer
from spatial_jax.errors import DataError
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.rope import VideoRule, mrope_positions
from spatial_jax.types import (
  Operation,
  OperationError,
  PatchedImage,
  Prompt,
  Task,
  Trajectory,
  Turn,
)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSegment:
  """A piece of a conversation as tokens; positions and starts count from its begin."""

  token_ids_T: np.ndarray
  position_TA: np.ndarray
  next_position: int
  images: tuple[PatchedImage, ...]
  image_start: tuple[int, ...]


def check_preprocess(preprocess: PreprocessConfig, policy: QwenVLConfig, where: str) -> None:
  """Refuses pictures cut otherwise than the policy's tower reads them.

  Raises:
    ConfigError: on the host; `where` says whose sizes they are.
  """
  tower = policy.vision
  for name, given, needed in (
    ("patch_size", preprocess.patch_size, tower.patch_size),
    ("merge_size", preprocess.merge_size, tower.merge_size),
    ("temporal_size", preprocess.temporal_size, tower.temporal_size),
  ):
    if given != needed:
      raise ConfigError(f"{where}: {name} is {given}, but this policy has {needed}")


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
  """How one policy family reads: tokenizer, words, preprocessing and rotary positions."""

  tokenizer: Tokenizer
  text: TextConfig
  preprocess: PreprocessConfig
  policy: QwenVLConfig

  def __post_init__(self):
    check_preprocess(self.preprocess, self.policy, "config.preprocess")

  @functools.cached_property
  def forbidden_ids(self) -> tuple[int, ...]:
    """Ids never sampled: special tokens but <|im_end|>, and rows that no token owns."""
    padding = range(self.tokenizer.inner.get_vocab_size(), self.policy.decoder.vocabulary)
    return (*self.tokenizer.forbidden_ids(), *padding)

  def prompt(self, task: Task, images: Sequence[PatchedImage] | None = None) -> Prompt:
    """The task as ids, positions and patches.

    Args:
      task: the question.
      images: its pictures where they have been patched already.

    Raises:
      DataError: on the host, naming the task, for pictures that cannot be used or a wording that
        does not have as many image tokens as there are pictures.
    """
    try:
      if images is None:
        images = [patch_image(image, self.preprocess) for image in task.images]
      read = self._read(prompt_text.prompt_text(task, images, self.text), images, (), "max")
    except DataError as error:
      raise DataError(f"task {task.task_id}: {error}") from error
    return Prompt(
      task, read.token_ids_T, read.position_TA, read.next_position, read.images, read.image_start
    )

  def observation(
    self, first_index: int, pictures: Sequence[np.ndarray], last: bool, closed: bool = True
  ) -> TokenSegment:
    """Drawn pictures (uint8 [h, w, 3]) as the user's next message.

    Args:
      first_index: visible index, from 1, of the first picture.
      pictures: at least one.
      last: the policy must answer now.
      closed: the policy ended its turn itself, by <|im_end|>; else that comes first.
    """
    images = tuple(patch_image(picture, self.preprocess) for picture in pictures)
    text = prompt_text.observation_text(first_index, images, last, self.text)
    return self._read(text if closed else text_lib.IM_END + text, images, (), "max")

  def chat(
    self, messages: Sequence[Message], cfg: ChatConfig, rule: VideoRule = "max"
  ) -> TokenSegment:
    """Words, pictures and clips in any order, up to the assistant's own words.

    Args:
      messages: at least one.
      cfg: the family's template.
      rule: where text goes on behind a clip, see `mrope_positions`.
    """
    chat = chat_text(messages, cfg)
    return self._read(chat.text, chat.pictures, chat.seconds, rule)

  def _read(
    self,
    text: str,
    images: Sequence[PatchedImage],
    seconds: Sequence[float],
    rule: VideoRule,
  ) -> TokenSegment:
    ids, pads = self.tokenizer.encode(text), (self.policy.image_pad_id, self.policy.video_pad_id)
    ids_T, starts = prompt_text.expand_image_tokens(ids, images, *pads)
    grids = [image.grid_3 for image in images]
    position_TA, following = mrope_positions(ids_T, grids, self.policy, seconds, rule)
    return TokenSegment(ids_T, position_TA, following, tuple(images), starts)


class Episode:
  """Grows one trajectory, append-only: sampled turns and observations behind a prompt."""

  def __init__(
    self,
    prompt: Prompt,
    sample: int,
    seed_path: tuple[int, ...],
    temperature: float,
    forbidden_ids: tuple[int, ...],
  ):
    self.prompt, self.sample, self.seed_path = prompt, sample, seed_path
    self.temperature, self.forbidden_ids = temperature, forbidden_ids
    length = len(prompt.token_ids_T)
    self.length, self.next_position = length, prompt.next_position
    self.images, self.image_start = list(prompt.images), list(prompt.image_start)
    self.turns: list[Turn] = []
    self._ids, self._positions = [prompt.token_ids_T], [prompt.position_TA]
    self._logps = [np.zeros(length, np.float32)]
    self._steps = [np.full(length, -1, np.int32)]

  @property
  def last_id(self) -> int:
    """The last token so far."""
    return int(self._ids[-1][-1])

  def add_turn(
    self,
    token_ids: Sequence[int],
    logps: Sequence[float],
    policy_step: int,
    text: str,
    operations: tuple[Operation, ...],
    errors: tuple[OperationError, ...],
  ) -> None:
    """Appends what the policy sampled, its end token included; nothing of it is drawn yet."""
    count = len(token_ids)
    executable = not operations and not errors
    self.turns.append(
      Turn(self.length, self.length + count, text, operations, errors, executable, ())
    )
    positions_T = self.next_position + np.arange(count, dtype=np.int32)
    self._append(
      np.asarray(token_ids, np.int32),
      np.repeat(positions_T[:, None], 3, axis=1),
      np.asarray(logps, np.float32),
      policy_step,
    )
    self.next_position += count

  def add_observation(self, observation: TokenSegment) -> None:
    """Appends drawn pictures and their words; the last turn is credited with them."""
    turn, produced = self.turns[-1], tuple(image.content_hash for image in observation.images)
    self.turns[-1] = dataclasses.replace(turn, produced=produced, executable=not turn.errors)
    self.image_start += [self.length + start for start in observation.image_start]
    self.images += observation.images
    self._append(
      observation.token_ids_T,
      observation.position_TA + np.int32(self.next_position),
      np.zeros(len(observation.token_ids_T), np.float32),
      -1,
    )
    self.next_position += observation.next_position

  def finish(self, end_reason: str) -> Trajectory:
    """The finished record."""
    policy_step_T = np.concatenate(self._steps)
    return Trajectory(
      task_id=self.prompt.task.task_id,
      sample=self.sample,
      seed_path=self.seed_path,
      temperature=self.temperature,
      forbidden_ids=self.forbidden_ids,
      token_ids_T=np.concatenate(self._ids),
      position_TA=np.concatenate(self._positions),
      trained_T=policy_step_T >= 0,
      logp_T=np.concatenate(self._logps),
      policy_step_T=policy_step_T,
      images=tuple(self.images),
      image_start=tuple(self.image_start),
      prompt_length=len(self.prompt.token_ids_T),
      prompt_images=len(self.prompt.images),
      turns=tuple(self.turns),
      end_reason=end_reason,
    )

  def _append(
    self, ids_T: np.ndarray, position_TA: np.ndarray, logp_T: np.ndarray, policy_step: int
  ) -> None:
    self._ids.append(ids_T)
    self._positions.append(position_TA)
    self._logps.append(logp_T)
    self._steps.append(np.full(len(ids_T), policy_step, np.int32))
    self.length += len(ids_T)
