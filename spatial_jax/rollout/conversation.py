"""Tasks and drawn images as tokens, and the builder that joins them to a trajectory.

    prompt | turn 1 (sampled) | observation | turn 2 (sampled) | ...

`Conversation` encodes prompts and observations. `TrajectoryBuilder` appends to one trajectory.
Rollouts and demonstrations both use the builder, so their trajectories have the same form.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from spatial_jax.config import ConfigError
from spatial_jax.data import prompt_text
from spatial_jax.data.chat_template import ChatTemplate
from spatial_jax.data.clip import PatchedClip, patch_clip
from spatial_jax.data.image import PreprocessConfig, patch_image
from spatial_jax.data.media import image_size, read_clip, read_pixels
from spatial_jax.data.prompt_form import PromptForm
from spatial_jax.data.tokenizer import IM_END, Tokenizer
from spatial_jax.data.video import VideoConfig
from spatial_jax.errors import DataError
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.policy.rope import VideoRule, mrope_positions
from spatial_jax.types import (
  ImageRef,
  Media,
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
  """A part of a conversation as tokens; positions and image starts count from its first token."""

  token_ids_T: np.ndarray  # int32
  position_TA: np.ndarray  # int32 rotary positions
  next_position: int  # the position of the token after the segment
  images: tuple[PatchedImage, ...]  # in order of appearance
  image_start: tuple[int, ...]  # index of the first token of each image


def check_preprocess(preprocess: PreprocessConfig, policy: QwenVLConfig, where: str) -> None:
  """Checks that images are cut into the patches that the vision tower of the policy expects.

  Args:
    where: config key or file of `preprocess`, for the message.

  Raises:
    ConfigError: if a size differs.
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
  """Encodes the messages of one run for one policy."""

  tokenizer: Tokenizer
  form: PromptForm
  template: ChatTemplate  # of the policy
  preprocess: PreprocessConfig  # of images
  video: VideoConfig
  policy: QwenVLConfig  # shape and special tokens
  # Text that first turns begin with, after that of the template; it is not sampled and not trained.
  response_prefix: str = ""

  def __post_init__(self):
    check_preprocess(self.preprocess, self.policy, "config.preprocess")
    begun, tag = self.template.response_prefix.strip(), self.form.grammar.reasoning
    if begun.startswith("<") and begun.partition(">")[0] != f"<{tag}":
      raise ConfigError(
        f"config.text: the chat template {self.template.file} begins each response with {begun}, "
        f"but the form has [grammar] reasoning = {tag!r}; copy the form, and name this tag there"
      )

  def turn_prefix(self, first: bool) -> str:
    """What a turn begins with before its sampled text; the first may have a `response_prefix`."""
    return self.template.response_prefix + (self.response_prefix if first else "")

  @functools.cached_property
  def forbidden_ids(self) -> tuple[int, ...]:
    """Ids that are never sampled: special tokens except <|im_end|>, and ids without a token."""
    unused = set(range(self.policy.decoder.vocabulary)) - self.tokenizer.used_ids
    return (*self.tokenizer.forbidden_ids(), *sorted(unused))

  def prompt(self, task: Task, media: Sequence[PatchedImage | PatchedClip] | None = None) -> Prompt:
    """Encodes a task as token ids, positions and patches.

    Args:
      media: the images of the task as patches; None: images and videos are read and cut here.

    Raises:
      DataError: if an image or video cannot be used, or the text does not have one image token per
        image; the message names the task.
    """
    try:
      sizes = [image_size(ref) for ref in task.media if isinstance(ref, ImageRef)] if media else []
      if media is None:
        media = self._patch_media(task.media, sizes)
      text = prompt_text.prompt_text(task, media, self.form.text, self.template)
      text += self.response_prefix
      parts = [(m.images, m.step_s) if isinstance(m, PatchedClip) else ((m,), ()) for m in media]
      images = [image for images, _ in parts for image in images]
      step_s = [seconds for _, steps in parts for seconds in steps]
      encoded = self._encode(text, images, step_s, "max")
    except DataError as error:
      raise DataError(f"task {task.task_id}: {error}") from error
    return Prompt(
      task=task,
      token_ids_T=encoded.token_ids_T,
      position_TA=encoded.position_TA,
      next_position=encoded.next_position,
      images=encoded.images,
      image_start=encoded.image_start,
      original_sizes=tuple(sizes),
      grammar=self.form.grammar,
    )

  def _patch_media(
    self, media: Sequence[Media], sizes: list[tuple[int, int]]
  ) -> list[PatchedImage | PatchedClip]:
    """Reads and cuts media; the (height, width) of each image before resizing joins `sizes`.

    The frames of a video are images if the policy may draw: it draws on one frame.
    """
    patched: list[PatchedImage | PatchedClip] = []
    timestamps = self.policy.family == "qwen3_vl"
    as_images = self.video.as_images or self.form.grammar.draws
    for ref in media:
      if isinstance(ref, ImageRef):
        frames: Sequence[np.ndarray] = [read_pixels(ref)]
      else:
        clip = read_clip(ref, self.video, timestamps or as_images)
        frames = clip.frames
        if not as_images:
          one = patch_clip(clip, self.preprocess, self.video, timestamps)
          patched.append(one)
          sizes += [frames[0].shape[:2]] * len(one.images)
          continue
      patched += [patch_image(frame, self.preprocess) for frame in frames]
      sizes += [frame.shape[:2] for frame in frames]
    return patched

  def observation(
    self,
    first_index: int,
    pixels: Sequence[np.ndarray],
    last: bool,
    has_im_end: bool = True,
    text: str | None = None,
  ) -> TokenSegment:
    """Encodes drawn images as the next user message.

    Args:
      first_index: index, from 1, of the first image in the conversation.
      pixels: uint8 [height, width, 3] of each drawn image, at least one.
      last: the policy must answer in the next turn.
      has_im_end: the turn before ends with <|im_end|>; otherwise the observation begins with it.
      text: of the message, with a mark <image> for each image or none; None: that of the form.
    """
    images = tuple(patch_image(image, self.preprocess) for image in pixels)
    if text is None:
      text = prompt_text.observation_text(first_index, images, last, self.form.text, self.template)
    else:
      text = prompt_text.given_observation(text, len(images), self.template)
    return self._encode(text if has_im_end else IM_END + text, images, (), "max")

  def _encode(
    self,
    text: str,
    images: Sequence[PatchedImage],
    step_s: Sequence[float],
    rule: VideoRule,
  ) -> TokenSegment:
    ids, pads = self.tokenizer.encode(text), (self.policy.image_pad_id, self.policy.video_pad_id)
    ids_T, starts = prompt_text.expand_image_tokens(ids, images, *pads)
    grids = [image.grid_3 for image in images]
    position_TA, next_position = mrope_positions(ids_T, grids, self.policy, step_s, rule)
    return TokenSegment(ids_T, position_TA, next_position, tuple(images), starts)


class TrajectoryBuilder:
  """Builds one trajectory by appending turns and observations to a prompt.

  Attributes:
    prompt: what the trajectory begins with.
    sample, seed_path, temperature, forbidden_ids: as in `Trajectory`.
    length: tokens so far.
    next_position: rotary position of the next token.
    images, image_start, turns: so far.
  """

  def __init__(
    self,
    prompt: Prompt,
    sample: int,
    seed_path: tuple[int, ...],
    temperature: float,
    forbidden_ids: tuple[int, ...],
  ):
    """Starts with the prompt; arguments as in `Trajectory`."""
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
    """The last token."""
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
    """Appends a sampled turn.

    Args:
      token_ids: sampled tokens, including the stop token.
      logps: their log-probabilities, nats.
      policy_step: training step of the policy that sampled them.
      text: the tokens as text, after what the turn begins with; see `Conversation.turn_prefix`.
      operations, errors: parsed from the text. Operations are not drawn yet, so a turn that has
        some becomes executable when its observation is added.
    """
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
    """Appends an observation; its images are recorded as produced by the last turn."""
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
    """Returns the trajectory."""
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
      grammar=self.prompt.grammar,
    )

  def _append(
    self, ids_T: np.ndarray, position_TA: np.ndarray, logp_T: np.ndarray, policy_step: int
  ) -> None:
    self._ids.append(ids_T)
    self._positions.append(position_TA)
    self._logps.append(logp_T)
    self._steps.append(np.full(len(ids_T), policy_step, np.int32))
    self.length += len(ids_T)
