"""AdamW or Adafactor with a learning-rate schedule, through optax."""

import dataclasses
import functools
import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spatial_jax.checks import is_finite, is_regex
from spatial_jax.config import (
  ConfigError,
  FieldError,
  check_choice,
  check_field,
  check_number,
  check_whole,
)
from spatial_jax.policy.param_tree import matches, merge, partition, path_name
from spatial_jax.types import Params

# Weight decay applies to matrices: not to norm scales, biases and embeddings.
NO_DECAY = re.compile(r"(bias|scale|embedding)$")

StorageDtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer and its schedule."""

  # "adafactor" stores row and column means of the second moment and no first moment: about 4 bytes
  # less per trained parameter than AdamW with mu_dtype bfloat16. b1 and eps are AdamW's alone.
  kind: Literal["adamw", "adafactor"]
  learning_rate: float  # after warm-up, per step
  # "REGEX=FACTOR": parameters whose path matches are trained at learning_rate * factor. Of several
  # that match, the first counts.
  rates: tuple[str, ...]
  # After warm-up "constant" (with decay_steps: warm-up, stable, decay), or "cosine" down to 0 at
  # `total_steps`.
  schedule: Literal["constant", "cosine"]
  warmup_steps: int  # linear from 0
  total_steps: int  # length of the schedule
  decay_steps: int  # linear to 0 over this number of last steps; 0: none. Only with "constant".
  # b1, b2, eps: of Adam.
  b1: float
  b2: float
  eps: float
  # Stored first moment. A step moves it by a tenth (1 - b1) of a gradient, far more than bfloat16
  # rounds. The second moment is always float32: bfloat16 has steps of 0.4 to 0.8 %, so that a
  # factor b2 of 0.999 would be rounded away and the moment would never fall.
  mu_dtype: StorageDtype
  # Sum of the gradients of microbatches, which the optimizer reads. It computes in float32.
  gradient_dtype: StorageDtype
  weight_decay: float  # on matrices only
  max_grad_norm: float  # the gradient is clipped to this global norm
  # Multiply the step of a parameter by its root mean square, so that a norm scale of 1 changes by
  # the same fraction as a matrix with entries of 0.1.
  scale_by_param_rms: bool
  frozen: tuple[str, ...]  # regexes of parameter paths ("^vision/") without gradient and moments
  # Of a moving average of the trained parameters, per update: average = decay * average + (1 -
  # decay) * parameters. It can be the KL reference. 0: none.
  ema_decay: float

  def __post_init__(self):
    check_choice(self, "kind", "schedule", "mu_dtype", "gradient_dtype")
    # `check_steps` refuses 0 where it matters; elsewhere the numbers it is made of have a message.
    check_whole(self, "warmup_steps", "decay_steps", "total_steps", at_least=0)
    check_number(self, "learning_rate", at_least=0, at_most=1)
    check_number(self, "b1", "b2", at_least=0, at_most=0.999999)  # below 1 in float32
    check_number(self, "weight_decay", at_least=0)
    check_number(self, "ema_decay", at_least=0, at_most=0.999999)
    valid = isinstance(self.rates, tuple) and all(map(_is_rate, self.rates))
    check_field(self, "rates", valid, 'have values "REGEX=FACTOR" with a factor of at least 0')
    check_number(self, "eps", "max_grad_norm", above=0)
    valid = isinstance(self.scale_by_param_rms, bool)
    check_field(self, "scale_by_param_rms", valid, "be True or False")
    valid = isinstance(self.frozen, tuple) and all(map(is_regex, self.frozen))
    check_field(self, "frozen", valid, "be a tuple of regular expressions")
    self._check_schedule()

  def _check_schedule(self) -> None:
    """Checks that the parts of the schedule fit into its length."""
    if self.schedule == "cosine":
      check_field(self, "decay_steps", self.decay_steps == 0, "be 0 with schedule cosine")
    if self.warmup_steps + self.decay_steps > self.total_steps:
      raise FieldError(
        f"warmup_steps is {self.warmup_steps} and decay_steps is {self.decay_steps}; their sum "
        f"must be at most total_steps, {self.total_steps}"
      )


def learning_rate(cfg: OptimizerConfig) -> optax.Schedule:
  """Step -> learning rate: warm-up, constant or cosine, decay."""
  peak = cfg.learning_rate
  warm_up = optax.linear_schedule(0.0, peak, max(cfg.warmup_steps, 1))
  rest = max(cfg.total_steps - cfg.warmup_steps, 1)
  if cfg.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, rest)
  elif cfg.decay_steps:
    after = optax.linear_schedule(peak, 0.0, cfg.decay_steps, rest - cfg.decay_steps)
  else:
    after = optax.constant_schedule(peak)
  return optax.join_schedules([warm_up, after], [cfg.warmup_steps])


def check_steps(cfg: OptimizerConfig, steps: int) -> None:
  """Checks that the learning rate is not 0 before the last step of a run.

  Raises:
    ConfigError: if the schedule ends earlier.
  """
  if (cfg.decay_steps or cfg.schedule == "cosine") and steps > cfg.total_steps:
    raise ConfigError(
      f"config.loop.steps is {steps} and the learning rate is 0 after optimizer.total_steps, "
      f"{cfg.total_steps}; raise both"
    )


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW or Adafactor with decay on matrices, for trained parameters.

  Source: AdamW (arXiv:1711.05101); Adafactor, and steps relative to the parameter
  (arXiv:1804.04235).
  """
  relative = cfg.scale_by_param_rms
  trained = optax.chain(
    optax.clip_by_global_norm(cfg.max_grad_norm),
    _scale_by_adam(cfg) if cfg.kind == "adamw" else _scale_by_adafactor(),
    optax.scale_by_param_block_rms() if relative else optax.identity(),
    optax.add_decayed_weights(cfg.weight_decay, decayed),
    optax.scale_by_learning_rate(learning_rate(cfg)),
    _scale_by_path(cfg.rates) if cfg.rates else optax.identity(),
    _moving_average(cfg.ema_decay) if cfg.ema_decay else optax.identity(),
  )
  inner = optax.partition(
    {"trained": trained, "frozen": optax.set_to_zero()}, functools.partial(labels, cfg)
  )

  # optax 0.2.8 mixes dtypes in AdamW and does not trace under strict promotion. Frozen parameters
  # may be stored in another dtype; their update is 0.
  def init(params: optax.Params) -> optax.OptState:
    with jax.numpy_dtype_promotion("standard"):
      return inner.init(params)

  def update(
    updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.OptState]:
    with jax.numpy_dtype_promotion("standard"):
      updates, state = inner.update(optax.tree.cast(updates, jnp.float32), state, params)
    assert params is not None  # every caller has them
    return optax.tree.cast_like(updates, params), state

  return optax.GradientTransformation(init, update)


class AverageState(NamedTuple):
  """The moving average of the trained parameters."""

  average: Params


def _moving_average(decay: float) -> optax.GradientTransformation:
  """Leaves updates as they are, and keeps the average of the parameters after them."""

  def init(params: optax.Params) -> optax.OptState:
    return AverageState(jax.tree.map(lambda x: jnp.array(x, copy=True), params))

  def update(
    updates: optax.Updates, state: Any, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.OptState]:
    new: Any = jax.tree.map(jnp.add, params, updates)
    average: Any = optax.incremental_update(new, state.average, 1.0 - decay)
    return updates, AverageState(average)

  return optax.GradientTransformation(init, update)


def moving_average(opt_state: Any, params: Params, frozen: tuple[str, ...]) -> Params:
  """Returns the parameters with the moving average in place of the trained ones.

  Args:
    opt_state: of an optimizer with `ema_decay`.
    params: of the same state.
    frozen: regexes of the parameters that are not trained.
  """
  shared, trained = partition(params, frozen)
  leaves = jax.tree.leaves(optax.tree.get(opt_state, "average"))
  return merge(shared, jax.tree.unflatten(jax.tree.structure(trained), leaves))


def _scale_by_path(rates: tuple[str, ...]) -> optax.GradientTransformation:
  """Multiplies each update by the factor of the first regex that matches its path.

  Raises:
    ConfigError: at trace, if a regex matches no trained parameter.
  """
  pairs = [_split_rate(rate) for rate in rates]

  def scale(updates: optax.Updates, params: optax.Params | None = None) -> optax.Updates:
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(updates)]
    for pattern, _ in pairs:
      if not any(matches(path, (pattern,)) for path in paths):
        raise ConfigError(f"optimizer.rates: {pattern!r} matches no trained parameter; remove it")

    def one(path: Any, x: jax.Array) -> jax.Array:
      name = path_name(path)
      return x * next((factor for pattern, factor in pairs if matches(name, (pattern,))), 1.0)

    return jax.tree_util.tree_map_with_path(one, updates)

  return optax.stateless(scale)


def _split_rate(rate: str) -> tuple[str, float]:
  pattern, _, factor = rate.rpartition("=")
  return pattern, float(factor)


def _is_rate(rate: Any) -> bool:
  try:
    pattern, factor = _split_rate(rate)
  except (AttributeError, ValueError):
    return False
  return bool(pattern) and is_regex(pattern) and is_finite(factor) and factor >= 0


def _scale_by_adafactor() -> optax.GradientTransformation:
  """Steps of Adafactor without a first moment, limited to a root mean square of 1."""
  return optax.chain(
    optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30), optax.clip_by_block_rms(1.0)
  )


def _scale_by_adam(cfg: OptimizerConfig) -> optax.GradientTransformation:
  """`optax.scale_by_adam` in float32 on a first moment that is stored in `cfg.mu_dtype`.

  Its own `mu_dtype` multiplies the moment by b1 in that dtype.
  """
  inner, dtype = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps), jnp.dtype(cfg.mu_dtype)

  def stored(state: Any) -> Any:
    return state._replace(mu=optax.tree.cast(state.mu, dtype))

  def init(params: optax.Params) -> optax.OptState:
    return stored(inner.init(params))

  def update(
    updates: optax.Updates, state: Any, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.OptState]:
    state = state._replace(mu=optax.tree.cast(state.mu, jnp.float32))
    updates, state = inner.update(updates, state, params)
    return updates, stored(state)

  return optax.GradientTransformation(init, update)


def labels(cfg: OptimizerConfig, params: Params) -> Params:
  """The label of every parameter: "trained" or "frozen".

  Raises:
    ConfigError: at trace, if a regex matches no parameter, or no parameter is trained.
  """
  paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  for pattern in cfg.frozen:
    if not any(matches(path, (pattern,)) for path in paths):
      raise ConfigError(f"optimizer.frozen: {pattern!r} matches no parameter path; remove it")
  if all(matches(path, cfg.frozen) for path in paths):
    raise ConfigError(f"optimizer.frozen is {cfg.frozen} and leaves no parameter to train")

  def label(path: Any, _: jax.Array) -> str:
    return "frozen" if matches(path_name(path), cfg.frozen) else "trained"

  return jax.tree_util.tree_map_with_path(label, params)


def decayed(params: Params) -> Params:
  """True for every parameter that weight decay applies to."""

  def is_matrix(path: Any, leaf: jax.Array) -> bool:
    return jnp.ndim(leaf) >= 2 and not NO_DECAY.search(path_name(path))

  return jax.tree_util.tree_map_with_path(is_matrix, params)
