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
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import numpy as np

from spatial_jax.grammar import Grammar

if TYPE_CHECKING:
  import jax

  Array: TypeAlias = jax.Array | np.ndarray
else:
  Array: TypeAlias = Any  # drawing workers import this module and must not load JAX

Params: TypeAlias = dict[str, Any]


AnswerKind = Literal["number", "choice", "words"]

# The places of images and videos in the text of a question.
IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"


@dataclasses.dataclass(frozen=True)
class ObjectBox:
  """The true position of one object of the question in one image."""

  label: str  # name of the object
  image: int  # index of the image, from 0
  box_4: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels, origin at the top left
  distance_m: float = math.nan  # from the camera to the closest point of the object; NaN: unknown
  place_m: tuple[float, float] = (math.nan, math.nan)  # centre on the floor: (right, ahead)


@dataclasses.dataclass(frozen=True)
class Mark:
  """A mark that a question refers to ("the object in the red box"), drawn when an image is read."""

  shape: Literal["box", "point"]
  points: tuple[float, ...]  # x1, y1, x2, y2 of a box, x, y of a point; pixels of the image file
  color: str  # as Pillow names it: "red", "#00ff00"


@dataclasses.dataclass(frozen=True, eq=False)
class ImageRef:
  """One image of a task: a reference, or its pixels. It is decoded when the prompt is made."""

  data: "str | bytes | np.ndarray"  # path; contents of a file; uint8 [height, width, 3]
  marks: tuple[Mark, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class VideoRef:
  """One video of a task: a file, or frames."""

  data: str | bytes | tuple[ImageRef, ...]  # path of a video; contents of one; frames in order
  times_s: tuple[float, ...] = ()  # of each frame, ascending, seconds; () for a video file


Media: TypeAlias = ImageRef | VideoRef


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """One question about images and videos, with its answer."""

  task_id: str  # unique and stable; sampling keys and resuming depend on it
  question_type: str  # of VSI-Bench ("object_abs_distance") or of this project ("camera_distance")
  # Without options and without the rest of the prompt. IMAGE_MARK and VIDEO_MARK are the places of
  # the media; without them the media come first.
  question: str
  options: tuple[str, ...] | None  # "A. chair", ... for a multiple-choice question
  answer: str  # the true answer: a number, an option letter ("A") or words; "" if unknown
  answer_kind: AnswerKind
  # Of a number: "m", "count", "degrees", ...; None: the one that the question asks for.
  unit: str | None
  media: tuple[Media, ...]  # in the order of their places in the question
  source: str  # "procedural", "vsi-rooms", "photos", a file, or "hand": typed by a user
  scene_id: str  # the training and held-out splits have no scene in common
  benchmark: str | None  # "vsi-bench" if the scene belongs to that benchmark
  boxes: tuple[ObjectBox, ...]  # of the question's objects; may be empty
  # Further fields of the row: what a scorer or a table needs ("subfield", "reasoning_type").
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  turns: tuple["DemonstratedTurn", ...] = ()  # a response to imitate; () for none
  rejected: tuple["DemonstratedTurn", ...] = ()  # a worse response, for DPO; () for none


@dataclasses.dataclass(frozen=True, eq=False)
class DemonstratedTurn:
  """One turn of a response that is not sampled: its text, and what the policy sees after it."""

  text: str  # as the policy would write it, without special tokens
  # The images after the turn. None: the operations of the text are drawn.
  images: tuple[ImageRef, ...] | None
  observation: str | None  # text of the message after the turn; None: that of the prompt form


@dataclasses.dataclass(frozen=True)
class Operation:
  """One drawing operation, in pixels of its image."""

  tool: Literal["box", "line"]
  image: int  # from 1, as the policy writes it: images of the prompt, then drawn images
  points_4: tuple[float, float, float, float]  # x1, y1, x2, y2; of a line from start to end
  label: str  # text beside the box or line


@dataclasses.dataclass(frozen=True)
class ScriptTurn:
  """One turn that a solver of synthetic tasks writes: operations, or an answer."""

  think: str
  operations: tuple[Operation, ...]  # in pixels of the image of the task
  answer: str | None


@dataclasses.dataclass(frozen=True)
class OperationError:
  """Why a part of a response was not executed: a short stable `code`, and a `detail` to read."""

  code: str
  detail: str


@dataclasses.dataclass(frozen=True, eq=False)
class PatchedImage:
  """One image, video clip or part of one as patches, in the Hugging Face order (2x2 blocks)."""

  content_hash: str  # hex digest of pixels and size; equal images share their features
  patches_PX: np.ndarray  # float32, normalised, P = time * height * width of the grid
  grid_3: tuple[int, int, int]  # (time, height, width) in patches, before merging
  pixels: np.ndarray  # uint8 [height, width, 3], resized; of a clip, its first frame

  @property
  def tokens(self) -> int:
    """The number of merged visual tokens, t*h*w/4."""
    t, h, w = self.grid_3
    return t * h * w // 4


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """The tokens, positions and images of one task."""

  task: Task
  token_ids_T: np.ndarray  # int32; one image pad token for every merged patch
  position_TA: np.ndarray  # int32 rotary positions (time, height, width)
  next_position: int  # rotary position of the first token after the prompt
  images: tuple[PatchedImage, ...]  # in order of appearance
  image_start: tuple[int, ...]  # first pad token of image i, which has images[i].tokens of them
  original_sizes: tuple[tuple[int, int], ...]  # (height, width) of each image before resizing
  grammar: Grammar  # the structure that the prompt asks for


Prompts: TypeAlias = list[Prompt]


@dataclasses.dataclass(frozen=True)
class Turn:
  """One turn of the policy: its sampled text, and the result of its drawing operations."""

  start: int  # the sampled tokens are token_ids_T[start:end] of the trajectory
  end: int
  text: str  # the decoded tokens
  operations: tuple[Operation, ...]  # valid ones
  errors: tuple[OperationError, ...]  # reasons for all operations that could not be read
  executable: bool  # all operations of the text were valid and were drawn; true without operations
  produced: tuple[str, ...]  # content hashes of the images that the turn drew


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
  """One rollout: the tokens of prompt, sampled turns and observations, in order.

      tokens   | prompt ........ | turn 1 ...... | observation ... | turn 2 ... |
      trained  | 0 ............. | 1 ........... | 0 ............. | 1 ........ |

  The end reasons are "answer", "no_action", "too_many_images", "repeated_operation", "turn_limit",
  "token_limit" and "fault": a drawing worker failed or the record broke an invariant, and the
  rollout is left out of statistics and update.
  """

  task_id: str
  sample: int  # index in the group, 0..G-1
  # Folded into its sampling keys: (seed, step, hash of the task id, index among the rollouts of the
  # group with equal sampling parameters).
  seed_path: tuple[int, ...]
  temperature: float  # of sampling; 1 for greedy decoding
  forbidden_ids: tuple[int, ...]  # token ids with logit -inf during sampling
  token_ids_T: np.ndarray  # int32
  position_TA: np.ndarray  # int32 rotary positions
  trained_T: np.ndarray  # bool, true for exactly the sampled tokens, <|im_end|> included
  logp_T: np.ndarray  # float32, log-probability of each sampled token, else 0
  policy_step_T: np.ndarray  # int32, step of the policy that sampled the token, else -1
  images: tuple[PatchedImage, ...]  # as in Prompt, then the drawn images in order of appearance
  image_start: tuple[int, ...]
  prompt_length: int  # tokens of the prompt
  prompt_images: int  # images of the prompt
  turns: tuple[Turn, ...]
  end_reason: str
  grammar: Grammar  # of the prompt; answer and format are read with it

  @property
  def text(self) -> str:
    """The text of all turns, one per line."""
    return "\n".join(turn.text for turn in self.turns)


Rollouts: TypeAlias = list[list[Trajectory]]  # [B][G]


class Scores(NamedTuple):
  """The rewards of each rollout, float32 [B, G] unless noted."""

  reward_BG: np.ndarray  # the advantage is computed from it
  accuracy_BG: np.ndarray  # accuracy part of the reward, in [0, 1]: the scale of AP-GRPO
  score_BG: np.ndarray  # MRA or exact match; it gates the reward and is reported
  format_BG: np.ndarray  # 1 if the format and every drawing operation are right, else 0
  # bool; false for a fault or a reward that is not finite: left out of statistics and update.
  valid_BG: np.ndarray
  parsed_BG: np.ndarray  # bool, whether an answer could be read
  components: dict[str, np.ndarray]  # name -> value before weights and gate; "score" is one more
  terms: dict[str, np.ndarray]  # name of a component with a weight -> its value after the gate
  weights: dict[str, float]  # of the terms: reward = sum of weight * term


class VisionBatch(NamedTuple):
  """Patches of many images in the order of the vision tower: windows contiguous, in equal slots.

                 | slot 0: a whole window | slot 1: two border windows, padding |     W slots
      window_P     1 1 1 1 1 1 1 1 1 1      2 2 2 2 2 3 3 3 3 0

  P = W * patches of a whole window. Window attention reshapes the slots to rows. Frame attention
  gathers frames to rows, one or several in a row, by `frame_NS` and scatters them back by `slot_P`.
  A patch attends to the patches of its row that have the same window or frame number.
  """

  patches_PX: Array  # float32, normalised pixels
  position_P4: Array  # int32, row and column in the frame, height and width of the frame, patches
  window_P: Array  # int32, number of the patch's window, from 1; 0 for padding
  frame_P: Array  # int32, number of its frame, from 1; 0 for padding
  frame_NS: Array  # int32 index into P, the value P for padding; N rows, S patches, both bucketed
  slot_P: Array  # int32 index into the flattened [N * S] rows, 0 for padding

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


class TokenArrays(NamedTuple):
  """Token sequences as the policy reads them, one per row, padded on the right.

  token_RT     5  90  90   7   0   0          90: the placeholder of an image token
  valid_RT     1   1   1   1   0   0
  feature_RT  -1  12  13  -1  -1  -1
  """

  token_RT: Array  # int32
  position_RTA: Array  # int32 rotary positions
  valid_RT: Array  # bool, false for padding
  feature_RT: Array  # int32 index of the image feature that replaces the embedding, -1 for text


class TrainRows(NamedTuple):
  """The rows of an update, or of a microbatch of it.

  trained_RT[r, t] says that token t was sampled, predicted from token t - 1; it is never true at
  t = 0.
  """

  tokens: TokenArrays  # of the row after its prefix
  trained_RT: Array  # bool
  old_logp_RT: Array  # float32, recorded by the sampler, 0 where not trained
  advantage_R: Array  # float32
  temperature_R: Array  # float32 > 0, of sampling
  prefix_R: Array  # int32, the prefix that the row follows; both are stored on the same device
  group_R: Array  # int32, rows of one group are compared with one another
  weight_R: Array  # float32 >= 0, how much the row counts in the loss


class TrainBatch(NamedTuple):
  """Padded trajectories for the update: the common prefix of each group once, then its rows.

      prefix of group b | prompt ......... |      rows | last prompt token, response ... |
                                                       | last prompt token, response ... |

  The last common token belongs to the rows, because the first token of a response is predicted
  from it.
  """

  prefix: TokenArrays  # one row per group
  rows: TrainRows  # in the order of their groups
  forbidden_V: Array  # bool, true for a token that could not be sampled
  vision: VisionBatch | FeatureBatch  # each distinct image of all rows once, or its features


class PackedRows(NamedTuple):
  """Rows that hold several whole sequences each; `learn.packing` draws them."""

  tokens: TokenArrays  # `valid_RT` is int32: the number of the sequence in its row, 0 for padding
  trained_RT: Array  # bool
  sequence_RT: Array  # int32, index of the sequence in the batch; meaningless where not trained
  weight_RT: Array  # float32, weight of the token in the loss; 0 where not trained


class PackedBatch(NamedTuple):
  """Demonstrations for SFT, or pairs of responses for DPO."""

  rows: PackedRows
  forbidden_V: Array  # bool, true for a token that cannot be sampled
  vision: VisionBatch | FeatureBatch  # each distinct image of all rows once, or its features


class OtherLogprobs(NamedTuple):
  """Log-probabilities of the same tokens under other policies, float32 [R, T]; None: not needed."""

  ref_RT: Array | None  # of the KL reference
  # Of the trained policy before the first update on these rollouts, computed by the trainer.
  trainer_RT: Array | None


class TrainState(NamedTuple):
  """Parameters, optimizer state and step; it is donated to the update and saved in checkpoints."""

  params: Params
  opt_state: Any
  step: Array


# One step of a stage: (state, step number) -> the next state and the metrics of the step.
StageStep: TypeAlias = Callable[[TrainState, int], tuple[TrainState, Mapping[str, Any]]]
