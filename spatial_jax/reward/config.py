"""What a rollout is rewarded for.

    reward = sum over components of weight * component;  a gated component counts only if the answer
    is right enough

A weight of 0 leaves a component out: with only `format` above 0 the format alone is rewarded.
"""

import dataclasses
from typing import Literal

from spatial_jax.config import check_choice, check_field, check_number, check_whole
from spatial_jax.reward.accuracy import RatioForm
from spatial_jax.reward.snra import Schedule

Component = Literal["accuracy", "format", "rubric", "attention", "length", "drawing", "custom"]
COMPONENTS: tuple[Component, ...] = (
  "accuracy", "format", "rubric", "attention", "length", "drawing", "custom",
)  # fmt: skip

RUBRIC_TERMS = ("correctness", "principle", "unit", "format", "structure")


@dataclasses.dataclass(frozen=True)
class Weights:
  """The weight of each component of the reward; 0: it is left out."""

  accuracy: float  # of the answer, in [0, 1]
  format: float  # 1 if the response keeps the format and every drawing was made, else 0
  rubric: float  # in [0, 1], see `reward.rubric`
  attention: float  # to the images, in [0, 1], see `reward.attention`
  length: float  # of the response, see `LengthConfig`
  drawing: float  # 1 for a rollout that draws, while few do; see `DrawingConfig`
  custom: float  # a user's own function, see `reward.custom`

  def __post_init__(self):
    check_number(self, *COMPONENTS)


@dataclasses.dataclass(frozen=True)
class RubricConfig:
  """Weights of the five terms of the rubric, see `reward.rubric`."""

  correctness: float
  principle: float
  unit: float
  format: float
  structure: float
  # "FILE.py:FUNCTION", a judge in the place of one term; "": none.
  judge: str
  judged_term: Literal["correctness", "principle", "unit", "format", "structure"]

  def __post_init__(self):
    check_number(self, *RUBRIC_TERMS, at_least=0)
    check_choice(self, "judged_term")
    total = sum(vars(self)[name] for name in RUBRIC_TERMS)
    check_field(
      self, "correctness", abs(total - 1) < 1e-6, f"make the sum of the terms 1, not {total:g}"
    )


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
  """The reward of attention to the images, see `reward.attention`."""

  mass: float  # weight of form A1
  relative: float  # of A2
  concentration: float  # of A3
  # c of A2: relative attention that is rewarded 1; 1 is uniform attention.
  full_ratio: float
  gated: bool  # multiply by the score (A4)
  layers: float  # the last fraction of the decoder layers that is measured, in (0, 1]

  def __post_init__(self):
    check_number(self, "mass", "relative", "concentration", at_least=0)
    check_number(self, "full_ratio", above=0)
    check_number(self, "layers", above=0, at_most=1)
    check_field(self, "gated", isinstance(self.gated, bool), "be True or False")


@dataclasses.dataclass(frozen=True)
class LengthConfig:
  """The length component of the reward.

      overlong   0 up to `soft_tokens`, then linearly down to -1 at `max_tokens`
      target     1 at `soft_tokens`, linearly down to 0 at none and at twice as many

  Source: "overlong" is DAPO's soft punishment (arXiv:2503.14476, Eq. 13).
  """

  kind: Literal["overlong", "target"]
  soft_tokens: int  # sampled tokens
  max_tokens: int  # of "overlong"

  def __post_init__(self):
    check_choice(self, "kind")
    check_whole(self, "soft_tokens", at_least=1)
    valid = self.kind != "overlong" or self.max_tokens > self.soft_tokens
    check_field(self, "max_tokens", valid, f"be above soft_tokens, {self.soft_tokens}")


@dataclasses.dataclass(frozen=True)
class DrawingConfig:
  """The drawing component: a rollout with an executed drawing earns the missing share.

  component = max(0, 1 - share of the rollouts of the step that draw / target)
  """

  target: float  # share of rollouts that draw, in (0, 1]

  def __post_init__(self):
    check_number(self, "target", above=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """How a rollout is rewarded."""

  weights: Weights
  # Components that count only if the score is above `score_threshold`. ("format",) keeps a smooth
  # accuracy as a dense signal; ("accuracy", "format") is ViLaSR's Eq. 2.
  gated: tuple[Component, ...]
  score_threshold: float  # in [-1, 1); if negative, every answer passes
  # Accuracy of a number: SNRA, its shifted-tanh form, MRA, vsGRPO's ratio, or 1 within `tolerance`.
  number: Literal["sigmoid", "tanh", "mra", "ratio", "tolerance"]
  ratio: RatioForm
  tolerance: float  # relative
  # Of a choice and of words: the curve of `number` at the error 1 - exact match (the sigmoid if
  # `number` has no curve), or 0 and 1.
  choice: Literal["smooth", "exact"]
  schedule: Schedule  # sharpness over the run
  # The constant sharpness of choices, > 0; None: choices follow the schedule. At sharpness 1 a
  # wrong choice is rewarded 0.54.
  discrete_sharpness: float | None
  # Score of a number, which gates the reward and is reported: MRA with <= (VSI-Bench) or with <
  # (ViLaSR's training reward), or 1 within `tolerance`.
  score: Literal["mra", "strict_mra", "tolerance"]
  # How answers are read and scored: "strict" by `reward.parse`; "vilasr_release" and "phyx" as the
  # released code of these papers does, whatever `number`, `choice` and `score` are.
  scorer: Literal["strict", "vilasr_release", "phyx"]
  rubric: RubricConfig
  attention: AttentionConfig
  length: LengthConfig
  drawing: DrawingConfig
  custom: str  # "FILE.py:FUNCTION", see `reward.custom`; "": none

  def __post_init__(self):
    check_choice(self, "number", "ratio", "choice", "score", "scorer")
    unknown = [name for name in self.gated if name not in COMPONENTS]
    check_field(self, "gated", not unknown, f"name components: {', '.join(COMPONENTS)}")
    if self.discrete_sharpness is not None:
      check_number(self, "discrete_sharpness", above=0)
    check_number(self, "score_threshold", at_least=-1, below=1)
    check_number(self, "tolerance", at_least=0, below=1)
    valid = bool(self.custom) or not self.weights.custom
    check_field(self, "custom", valid, "name FILE.py:FUNCTION, because weights.custom is not 0")
    valid = any(vars(self.weights).values())
    check_field(self, "weights", valid, "have a component that is not 0")

  @property
  def active(self) -> tuple[Component, ...]:
    """The components with a weight, in order."""
    return tuple(name for name in COMPONENTS if vars(self.weights)[name])

  @property
  def score_name(self) -> str:
    """What the score of a number is, for tables."""
    match self.scorer, self.score:
      case "strict", "mra":
        return "MRA"
      case "strict", "strict_mra":
        return "MRA with <"
      case "strict", _:
        return f"within {100 * self.tolerance:g} %"
      case "phyx", _:
        return "PhyX's match"
    return "ViLaSR's released score"

  @property
  def numbers_sharpen(self) -> bool:
    """Whether the reward of a number depends on the sharpness."""
    return self.number in ("sigmoid", "tanh")

  def for_evaluation(self) -> "RewardConfig":
    """The same reward, without what only a step of training has.

    The sharpness is that of the end of the run, `k_max` of the adaptive schedule. Attention is left
    out, because an evaluation does not measure it; if nothing else has a weight, accuracy counts.
    """
    schedule, weights = self.schedule, self.weights
    if schedule.kind == "adaptive":
      schedule = dataclasses.replace(schedule, kind="constant")
    if weights.attention:
      alone = self.active == ("attention",)
      accuracy = 1.0 if alone else weights.accuracy
      weights = dataclasses.replace(weights, attention=0.0, accuracy=accuracy)
    return dataclasses.replace(self, schedule=schedule, weights=weights)


def accuracy_reward(
  number: Literal["sigmoid", "tanh", "mra", "ratio", "tolerance"],
  choice: Literal["smooth", "exact"],
  schedule: Schedule,
  format_weight: float = 0.0,
) -> RewardConfig:
  """The reward of the accuracy, and of the format where the answer earns something; nothing else.

  For rewards outside of a run: the fields of `RewardConfig` that do not matter then are filled in.
  """
  return RewardConfig(
    weights=Weights(1.0, format_weight, 0.0, 0.0, 0.0, 0.0, 0.0),
    gated=("format",),
    score_threshold=0.0,
    number=number,
    ratio="linear",
    tolerance=0.05,
    choice=choice,
    schedule=schedule,
    discrete_sharpness=None,
    score="mra",
    scorer="strict",
    rubric=RubricConfig(1.0, 0.0, 0.0, 0.0, 0.0, "", "principle"),
    attention=AttentionConfig(0.0, 0.5, 0.5, 1.0, False, 1.0),
    length=LengthConfig("target", 1, 1),
    drawing=DrawingConfig(1.0),
    custom="",
  )
