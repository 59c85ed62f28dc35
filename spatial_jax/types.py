"""Axis glossary and every struct that crosses a stage.

    Task ──► Prompts ──► Rollouts ──► Scores ──► advantages ──► TrainBatch ──► TrainState

Suffix order is array order, one letter per axis, digits are literal sizes:

  B prompts             N images, packed over rows       D decoder width    J drawing turns
  G rollouts per prompt P patches, before merging        F feed-forward     Z objects in one answer
  R rows, at most B*G   M merged visual tokens (P/4)     H query heads      L layers
  T tokens (queries)    X values in one patch            K key/value heads  C channels of one head
  S key positions       E vision width                   Q heads per KV head (H = K*Q)
  V vocabulary          W vision windows                 A rotary axes (time, height, width) = 3
  Y streams of features: the tower's last layer, and those that DeepStack adds

`valid_*` means "not padding"; `trained_*` means "sampled by the policy". Host records (Task,
Prompt, Trajectory) hold NumPy arrays; device structs (VisionBatch, TrainBatch) are pytrees.
"""

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

if TYPE_CHECKING:
  import jax

  Array: TypeAlias = jax.Array | np.ndarray
else:
  Array: TypeAlias = Any  # drawing workers read Operation and must never load JAX

Params: TypeAlias = dict[str, Any]


AnswerKind = Literal["number", "choice", "words"]


@dataclasses.dataclass(frozen=True)
class ObjectBox:
  """Where one object of the question is to be seen: the truth behind a drawing.

  `image` counts from 0; `box_4` is (x1, y1, x2, y2) in pixels of that image, top-left origin.
  `distance_m` is from that camera to the closest point of the object, NaN where unknown.
  `place_m` is where its middle stands on the floor as that camera sees it: (right, ahead), NaN
  where unknown.
  """

  label: str
  image: int
  box_4: tuple[float, float, float, float]
  distance_m: float = math.nan
  place_m: tuple[float, float] = (math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class Task:
  """One question with its pictures and its verifiable answer.

  Attributes:
    task_id: unique and stable; sampling keys and resume rest on it.
    question_type: a VSI-Bench type ("object_abs_distance", ...) or one of ours
      ("camera_distance", ...).
    question: the wording, without options and without prompt decoration.
    options: "A. chair", ... for a choice, else None.
    answer: the truth as text: a number ("2.4") or an option letter ("A"); "" where nobody knows it.
    answer_kind: "number", "choice", or "words", which no reward reads yet.
    images: uint8 [height, width, 3] each; several are frames of one walk through the room.
    source: "procedural", "vsi-rooms", "photos", or "hand" for a question put by `ask`.
    scene_id: rooms are split into train and held-out by this.
    benchmark: "vsi-bench" when the room belongs to that benchmark, else None.
    boxes: where the objects of the question are visible (may be empty).
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
  """One drawing operation, already in pixels of the image it refers to.

  `tool` is "box" (points_4 = x1, y1, x2, y2) or "line" (points_4 = start x, y, end x, y).
  `image` is 1-based as the model writes it: images of the prompt first, drawn ones after them.
  """

  tool: Literal["box", "line"]
  image: int
  points_4: tuple[float, float, float, float]
  label: str


@dataclasses.dataclass(frozen=True)
class OperationError:
  """Why a piece of model output was not executed: a short stable `code`, a `detail` for people."""

  code: str
  detail: str


@dataclasses.dataclass(frozen=True, eq=False)
class PatchedImage:
  """One image (or video clip) cut into patches, in the Hugging Face order (2x2 blocks contiguous).

  Attributes:
    content_hash: hex digest of pixels and size; equal images share their features.
    patches_PX: float32, normalised, P = time * height * width of the grid.
    grid_3: (time, height, width) in patches, before merging.
    pixels: uint8 [height, width, 3], the resized picture the policy sees (first frame of a clip).
  """

  content_hash: str
  patches_PX: np.ndarray
  grid_3: tuple[int, int, int]
  pixels: np.ndarray

  @property
  def tokens(self) -> int:
    """Number of merged visual tokens, t*h*w/4."""
    t, h, w = self.grid_3
    return t * h * w // 4


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """A task as the policy reads it.

  Attributes:
    token_ids_T: int32, image pads already expanded to one token per merged patch.
    position_TA: int32 rotary positions (time, height, width).
    next_position: the text position of the token after the prompt.
    images: in order of appearance.
    image_start: first token of each image's span; the span is `images[i].tokens` long.
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
  """What the policy said between two observations, and what came of it.

  `start`, `end` are token indices into the trajectory (the sampled tokens of this turn).
  `executable`: every item of every block was valid and was drawn; true where there is none.
  `produced`: content hashes of the images this turn drew.
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
  """One rollout: an append-only record of ids, masks, log-probabilities, images and turns.

  Prompt, sampled turns and observations lie behind one another:

      tokens   | prompt ........ | turn 1 ...... | observation ... | turn 2 ... |
      trained  | 0 ............. | 1 ........... | 0 ............. | 1 ........ |

  Attributes:
    sample: index in the group, 0..G-1.
    seed_path: (seed, step, prompt number, how many samples before it have its mode): of its keys.
    temperature: of sampling; greedy records 1.
    forbidden_ids: token ids at -inf while sampling.
    token_ids_T: int32.
    position_TA: int32 rotary positions.
    trained_T: bool, true exactly for what the policy sampled, its <|im_end|> included.
    logp_T: float32 log-probability of the token where trained, else 0.
    policy_step_T: int32, the policy step that sampled it, -1 where not trained.
    images, image_start: as in Prompt, drawn images included, in order of appearance.
    prompt_length, prompt_images: how much of tokens and images is the prompt.
    end_reason: "answer", "no_action", "too_many_images", "repeated_operation", "turn_limit",
      "token_limit" or "fault" (machinery broke: left out of statistics and update).
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
    """Everything the policy said, turn after turn."""
    return "\n".join(turn.text for turn in self.turns)


Rollouts: TypeAlias = list[list[Trajectory]]  # [B][G]


class Scores(NamedTuple):
  """What the rewards say of each rollout, float32 [B, G] unless noted.

  Attributes:
    reward_BG: what the advantage is computed from.
    accuracy_BG: the smooth (or exact) accuracy part, in [0, 1]: the scale of AP-GRPO.
    score_BG: the hard score (MRA or exact match) that gates and is reported.
    format_BG: 1 where format and every operation were right.
    valid_BG: bool, false for a fault: left out of group statistics and update.
    parsed_BG: bool, whether an answer could be read.
  """

  reward_BG: np.ndarray
  accuracy_BG: np.ndarray
  score_BG: np.ndarray
  format_BG: np.ndarray
  valid_BG: np.ndarray
  parsed_BG: np.ndarray


class VisionBatch(NamedTuple):
  """Patches of many images in the vision tower's own order: windows contiguous, in equal slots.
      | slot 0: a whole window       | slot 1: two windows of a border, pad |     W slots
      window_P   1 1 1 1 1 1 1 1 1 1   2 2 2 2 2 3 3 3 3 0

  P = W * patches of a whole window. Two static forms share the array: slots are rows by reshape;
  frames are gathered to rows, one or several in each, by `frame_NS`, and put back by `slot_P`.
  Within a row a patch sees those of its own number.

  Attributes:
    patches_PX: float32 normalised pixels.
    position_P4: int32 (row, column) of the patch in its frame, and the frame's (height, width), in
      patches.
    window_P, frame_P: int32, the window and the frame a patch belongs to, from 1; 0: padding.
    frame_NS: int32 index into P, P where padded. N rows, S patches (both bucketed).
    slot_P: int32 index into the flattened [N * S] rows, 0 where padded.
  """

  patches_PX: Array
  position_P4: Array
  window_P: Array
  frame_P: Array
  frame_NS: Array
  slot_P: Array


class FeatureBatch(NamedTuple):
  """What the tower saw of many images, where it stays as it is: [M, Y, D], compute dtype."""

  features_MYD: Array


class PrefixBatch(NamedTuple):
  """What the rows of each group have in common, left-aligned; fields as in TrainBatch."""

  token_BT: Array
  position_BTA: Array
  valid_BT: Array
  feature_BT: Array


class TrainBatch(NamedTuple):
  """Rows for the update: the only padded form of a trajectory.

  What the rollouts of a group have in common is there once; its rows go on behind it:

      prefix of b | prompt ...... |      own part of its rows | last prompt token, response ...
                                                             | last prompt token, response ...

  The last common token belongs to the rows: what stands behind it predicts their first own one.

  Attributes:
    prefix: of B groups.
    prompt_R: int32 b, ascending; the rows of one device read prefixes of that device.
    token_RT: int32, like all of [R, T] the rows' own part.
    position_RTA: int32.
    valid_RT: bool.
    trained_RT: bool; trained_RT[r, t] says token t was sampled, predicted from t - 1; never t = 0.
    old_logp_RT: float32 as recorded by the sampler, 0 where not trained.
    advantage_R: float32.
    feature_RT: int32 index of the visual feature that replaces the embedding, -1 for text.
    temperature_R: float32 > 0.
    forbidden_V: bool, true where a token could not be sampled.
    vision: the images of all rows, each distinct image once, or their features.
  """

  prefix: PrefixBatch
  prompt_R: Array
  token_RT: Array
  position_RTA: Array
  valid_RT: Array
  trained_RT: Array
  old_logp_RT: Array
  advantage_R: Array
  feature_RT: Array
  temperature_R: Array
  forbidden_V: Array
  vision: VisionBatch | FeatureBatch


class TrainState(NamedTuple):
  """Parameters, optimizer state and step: what the update donates and a checkpoint holds."""

  params: Params
  opt_state: Any
  step: Array
