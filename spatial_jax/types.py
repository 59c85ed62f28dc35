"""Axis letters, and every struct that passes from one stage to the next.

    Task ──► Prompts ──► Rollouts ──► Scores ──► advantages ──► TrainBatch ──► TrainState

Suffix order is array order, one letter per axis, digits are literal sizes:

  B prompts             N images, packed over rows       D decoder width    J drawing turns
  G rollouts per prompt P patches, before merging        F feed-forward     Z objects in one answer
  R rows, at most B*G   M merged visual tokens (P/4)     H query heads      L layers
  T tokens (queries)    X values in one patch            K key/value heads  C channels of one head
  S key positions       E vision width                   Q heads per KV head (H = K*Q)
  V vocabulary          W vision windows                 A rotary axes (time, height, width) = 3
  Y feature streams: the last layer of the vision tower, then the DeepStack layers

`valid_*` means "not padding"; `trained_*` means "sampled by the policy". Records on the host (Task,
Prompt, Trajectory) contain NumPy arrays; structs on devices (VisionBatch, TrainBatch) are pytrees.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
  import jax

  Array: TypeAlias = jax.Array | np.ndarray
else:
  Array: TypeAlias = Any  # drawing workers import this module and must not load JAX

Params: TypeAlias = dict[str, Any]


AnswerKind = Literal["number", "choice", "words"]


@dataclasses.dataclass(frozen=True)
class ObjectBox:
  """The true position of one object of the question in one image.

  Attributes:
    label: name of the object.
    image: index of the image, from 0.
    box_4: (x1, y1, x2, y2) in pixels of that image, origin at the top left.
    distance_m: metres from the camera to the closest point of the object; NaN if unknown.
    place_m: position of the object's centre on the floor relative to the camera, metres (right,
      ahead); NaN if unknown.
  """

  label: str
  image: int
  box_4: tuple[float, float, float, float]
  distance_m: float = math.nan
  place_m: tuple[float, float] = (math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class Task:
  """One question about images, with its answer.

  Attributes:
    task_id: unique and stable; sampling keys and resuming depend on it.
    question_type: a VSI-Bench type ("object_abs_distance", ...) or a type of this project
      ("camera_distance", ...).
    question: text of the question, without options and without the rest of the prompt.
    options: "A. chair", ... for a multiple-choice question, else None.
    answer: the true answer as text: a number ("2.4") or an option letter ("A"); "" if unknown.
    answer_kind: "number", "choice", or "words", which no reward reads yet.
    images: uint8 [height, width, 3] each; several images are frames of one walk through the room.
    source: "procedural", "vsi-rooms", "photos", or "hand" for a question typed by a user.
    scene_id: the training and held-out splits have no scene in common.
    benchmark: "vsi-bench" if the scene belongs to that benchmark, else None.
    boxes: positions of the question's objects in the images (may be empty).
  """

  task_id: str
  question_type: str
  question: str
  options: tuple[str, ...] | None
  answer: str
  answer_kind: AnswerKind
  images: tuple[np.ndarray, ...]
  source: str
  scene_id: str
  benchmark: str | None
  boxes: tuple[ObjectBox, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
  """One drawing operation, in pixels of its image.

  Attributes:
    tool: "box" or "line".
    image: index of the image from 1, as the policy writes it: the images of the prompt, then the
      drawn images.
    points_4: x1, y1, x2, y2 of a box; start x, start y, end x, end y of a line.
    label: text that is drawn beside the box or line.
  """

  tool: Literal["box", "line"]
  image: int
  points_4: tuple[float, float, float, float]
  label: str


@dataclasses.dataclass(frozen=True)
class OperationError:
  """Why a part of a response was not executed: a short stable `code`, and a `detail` to read."""

  code: str
  detail: str


@dataclasses.dataclass(frozen=True, eq=False)
class PatchedImage:
  """One image or video clip as patches, in the Hugging Face order (2x2 blocks contiguous).

  Attributes:
    content_hash: hex digest of pixels and size; equal images share their features.
    patches_PX: float32, normalised, P = time * height * width of the grid.
    grid_3: (time, height, width) in patches, before merging.
    pixels: uint8 [height, width, 3], the resized image (of a clip, its first frame).
  """

  content_hash: str
  patches_PX: np.ndarray
  grid_3: tuple[int, int, int]
  pixels: np.ndarray

  @property
  def tokens(self) -> int:
    """The number of merged visual tokens, t*h*w/4."""
    t, h, w = self.grid_3
    return t * h * w // 4


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """The tokens, positions and images of one task.

  Attributes:
    task: the question.
    token_ids_T: int32; one image pad token for every merged patch.
    position_TA: int32 rotary positions (time, height, width).
    next_position: rotary position of the first token after the prompt.
    images: in order of appearance.
    image_start: index of the first pad token of each image; image i has `images[i].tokens` of them.
  """

  task: Task
  token_ids_T: np.ndarray
  position_TA: np.ndarray
  next_position: int
  images: tuple[PatchedImage, ...]
  image_start: tuple[int, ...]


Prompts: TypeAlias = list[Prompt]


@dataclasses.dataclass(frozen=True)
class Turn:
  """One turn of the policy: its sampled text, and the result of its drawing operations.

  Attributes:
    start, end: the sampled tokens of the turn are `token_ids_T[start:end]` of the trajectory.
    text: the decoded tokens.
    operations: valid drawing operations of the text.
    errors: reasons for all operations that were not executed.
    executable: all operations of the text were valid and were drawn; true without operations.
    produced: content hashes of the images that the turn drew.
  """

  start: int
  end: int
  text: str
  operations: tuple[Operation, ...]
  errors: tuple[OperationError, ...]
  executable: bool
  produced: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
  """One rollout: the tokens of prompt, sampled turns and observations, in order.

      tokens   | prompt ........ | turn 1 ...... | observation ... | turn 2 ... |
      trained  | 0 ............. | 1 ........... | 0 ............. | 1 ........ |

  Attributes:
    task_id: of the task.
    sample: index in the group, 0..G-1.
    seed_path: the numbers folded into its sampling keys: (seed, step, number of the prompt, number
      of earlier samples of the group with equal sampling parameters).
    temperature: of sampling; 1 for greedy decoding.
    forbidden_ids: token ids with logit -inf during sampling.
    token_ids_T: int32.
    position_TA: int32 rotary positions.
    trained_T: bool, true for exactly the sampled tokens, including <|im_end|>.
    logp_T: float32 log-probability of each sampled token, else 0.
    policy_step_T: int32, step of the policy that sampled the token, else -1.
    images, image_start: as in Prompt, followed by the drawn images in order of appearance.
    prompt_length, prompt_images: the number of tokens and of images of the prompt.
    turns: in order.
    end_reason: "answer", "no_action", "too_many_images", "repeated_operation", "turn_limit",
      "token_limit", or "fault" (a program failed: excluded from statistics and update).
  """

  task_id: str
  sample: int
  seed_path: tuple[int, ...]
  temperature: float
  forbidden_ids: tuple[int, ...]
  token_ids_T: np.ndarray
  position_TA: np.ndarray
  trained_T: np.ndarray
  logp_T: np.ndarray
  policy_step_T: np.ndarray
  images: tuple[PatchedImage, ...]
  image_start: tuple[int, ...]
  prompt_length: int
  prompt_images: int
  turns: tuple[Turn, ...]
  end_reason: str

  @property
  def text(self) -> str:
    """The text of all turns, one per line."""
    return "\n".join(turn.text for turn in self.turns)


Rollouts: TypeAlias = list[list[Trajectory]]  # [B][G]


class Scores(NamedTuple):
  """The rewards of each rollout, float32 [B, G] unless noted.

  Attributes:
    reward_BG: the advantage is computed from it.
    accuracy_BG: the accuracy part of the reward, in [0, 1]: the scale of AP-GRPO.
    score_BG: the hard score (MRA or exact match), which gates and is reported.
    format_BG: 1 if the format and every drawing operation are right, else 0.
    valid_BG: bool, false for a fault or a reward that is not finite: left out of group statistics
      and update.
    parsed_BG: bool, whether an answer could be read.
    components: name of a reward signal ("accuracy", "score", "format") -> its value before weights
      and gate.
  """

  reward_BG: np.ndarray
  accuracy_BG: np.ndarray
  score_BG: np.ndarray
  format_BG: np.ndarray
  valid_BG: np.ndarray
  parsed_BG: np.ndarray
  components: dict[str, np.ndarray]


class VisionBatch(NamedTuple):
  """Patches of many images in the order of the vision tower: windows contiguous, in equal slots.

                 | slot 0: a whole window | slot 1: two border windows, padding |     W slots
      window_P     1 1 1 1 1 1 1 1 1 1      2 2 2 2 2 3 3 3 3 0

  P = W * patches of a whole window. Window attention reshapes the slots to rows. Frame attention
  gathers frames to rows, one or several in a row, by `frame_NS` and scatters them back by `slot_P`.
  A patch attends to the patches of its row that have the same window or frame number.

  Attributes:
    patches_PX: float32 normalised pixels.
    position_P4: int32, row and column of the patch in its frame, then height and width of the
      frame, all in patches.
    window_P, frame_P: int32, number of the patch's window and frame, from 1; 0 for padding.
    frame_NS: int32 index into P, the value P for padding. N rows, S patches (both bucketed).
    slot_P: int32 index into the flattened [N * S] rows, 0 for padding.
  """

  patches_PX: Array
  position_P4: Array
  window_P: Array
  frame_P: Array
  frame_NS: Array
  slot_P: Array

  @classmethod
  def build(
    cls,
    make: Callable[[tuple[int, ...], Any], Any],
    patches: int,
    patch_values: int,
    frames: int,
    frame_patches: int,
  ) -> "VisionBatch":
    """A batch of the given sizes (P, X, N, S); each field is `make(shape, dtype)`."""
    return cls(
      patches_PX=make((patches, patch_values), np.float32),
      position_P4=make((patches, 4), np.int32),
      window_P=make((patches,), np.int32),
      frame_P=make((patches,), np.int32),
      frame_NS=make((frames, frame_patches), np.int32),
      slot_P=make((patches,), np.int32),
    )


class FeatureBatch(NamedTuple):
  """Features of many images, [M, Y, D] in the compute dtype, if the vision tower is frozen."""

  features_MYD: Array


class RowRole(enum.IntEnum):
  """The role of a row in the loss."""

  ROLLOUT = 0  # sampled by the policy, with an advantage
  CHOSEN = 1  # the preferred answer of a pair
  REJECTED = 2  # the other answer of a pair
  DEMONSTRATION = 3  # a conversation to be imitated


class TokenArrays(NamedTuple):
  """Token sequences as the policy reads them, one per row, padded on the right.

      token_RT     5  90  90   7   0   0          90: the placeholder of an image token
      valid_RT     1   1   1   1   0   0
      feature_RT  -1  12  13  -1  -1  -1

  Attributes:
    token_RT: int32.
    position_RTA: int32 rotary positions.
    valid_RT: bool, false for padding.
    feature_RT: int32 index of the image feature that replaces the embedding, -1 for text.
  """

  token_RT: Array
  position_RTA: Array
  valid_RT: Array
  feature_RT: Array


class TrainRows(NamedTuple):
  """The rows of an update, or of a microbatch of it.

  Attributes:
    tokens: of the row after its prefix.
    trained_RT: bool; trained_RT[r, t] says that token t was sampled, predicted from token t - 1;
      never true at t = 0.
    old_logp_RT: float32, recorded by the sampler, 0 where not trained.
    advantage_R: float32.
    temperature_R: float32 > 0, of sampling.
    prefix_R: int32, the prefix that the row follows; both are stored on the same device.
    group_R: int32, the group whose rows are compared with one another; -1 for padding.
    role_R: int32, a RowRole.
    weight_R: float32 >= 0, how much the row counts in the loss; 0 for padding.
  """

  tokens: TokenArrays
  trained_RT: Array
  old_logp_RT: Array
  advantage_R: Array
  temperature_R: Array
  prefix_R: Array
  group_R: Array
  role_R: Array
  weight_R: Array


class TrainBatch(NamedTuple):
  """Padded trajectories for the update: the common prefix of each group once, then its rows.

      prefix of group b | prompt ......... |      rows | last prompt token, response ... |
                                                       | last prompt token, response ... |

  The last common token belongs to the rows, because the first token of a response is predicted
  from it.

  Attributes:
    prefix: one row per group.
    rows: in the order of their groups.
    forbidden_V: bool, true for a token that could not be sampled.
    vision: each distinct image of all rows once, or the features of these images.
  """

  prefix: TokenArrays
  rows: TrainRows
  forbidden_V: Array
  vision: VisionBatch | FeatureBatch


class TrainState(NamedTuple):
  """Parameters, optimizer state and step; the update donates it, a checkpoint stores it."""

  params: Params
  opt_state: Any
  step: Array


# One step of a stage: (state, step number) -> the next state and the metrics of the step.
StageStep: TypeAlias = Callable[[TrainState, int], tuple[TrainState, Mapping[str, Any]]]
