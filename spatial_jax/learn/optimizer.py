"""AdamW with warm-up, constant and decay, through optax."""

import dataclasses
import functools
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from spatial_jax.config import ConfigError
from spatial_jax.policy.param_tree import matches, path_name
from spatial_jax.types import Params

# Norm scales, biases and the embedding are not decayed.
NO_DECAY = re.compile(r"(bias|scale|embedding)$")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """How parameters move.

  Attributes:
    learning_rate: peak, per step.
    schedule: after warm-up "constant", or "cosine" down to 0 at `total_steps`.
    warmup_steps: linear from 0.
    total_steps: length of the schedule.
    decay_steps: linear to 0 over the last so many steps (0: none; only with "constant").
    b1, b2, eps: of Adam.
    weight_decay: on matrices only.
    max_grad_norm: global clip.
    relative: steps are `learning_rate` times the root mean square of the parameter, so that a norm
      scale of 1 moves as far for its size as a matrix of entries of 0.1.
    gains: regexes of parameter paths that move by a common factor alone. That of the last norm is
      the inverse temperature of the policy.
    gain_rate: peak step of the logarithm of that factor; its schedule is that of `learning_rate`.
    frozen: regexes of parameter paths ("^vision/") that stay as they are, without gradient or
      moments.
  """

  learning_rate: float
  schedule: Literal["constant", "cosine"]
  warmup_steps: int
  total_steps: int
  decay_steps: int
  b1: float
  b2: float
  eps: float
  weight_decay: float
  max_grad_norm: float
  scale_by_param_rms: bool
  gains: tuple[str, ...]
  gain_rate: float
  frozen: tuple[str, ...]


def learning_rate(cfg: OptimizerConfig, peak: float) -> optax.Schedule:
  """Step -> learning rate; `peak` after warm-up.

  Raises:
    ConfigError: on the host, when the parts of the schedule do not fit into it.
  """
  if cfg.schedule == "cosine" and cfg.decay_steps:
    raise ConfigError("optimizer.decay_steps is for schedule constant; cosine needs 0")
  if cfg.decay_steps and cfg.warmup_steps + cfg.decay_steps > cfg.total_steps:
    raise ConfigError(
      f"optimizer.warmup_steps {cfg.warmup_steps} and decay_steps {cfg.decay_steps} are more than "
      f"its total_steps {cfg.total_steps}"
    )
  warm = optax.linear_schedule(0.0, peak, max(cfg.warmup_steps, 1))
  rest = max(cfg.total_steps - cfg.warmup_steps, 1)
  if cfg.schedule == "cosine":
    after = optax.cosine_decay_schedule(peak, rest)
  elif cfg.decay_steps:
    after = optax.linear_schedule(peak, 0.0, cfg.decay_steps, rest - cfg.decay_steps)
  else:
    after = optax.constant_schedule(peak)
  return optax.join_schedules([warm, after], [cfg.warmup_steps])


def check_steps(cfg: OptimizerConfig, steps: int) -> None:
  """Refuses a loop that would go on after its learning rate has come to 0.

  Raises:
    ConfigError: naming the steps that must agree.
  """
  if (cfg.decay_steps or cfg.schedule == "cosine") and steps > cfg.total_steps:
    raise ConfigError(
      f"config.loop.steps {steps}: the learning rate is 0 after optimizer.total_steps "
      f"{cfg.total_steps}; raise both"
    )


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
  """Clip by global norm, then AdamW with decay on matrices only, on what is not frozen.

  Source: AdamW (arXiv:1711.05101); steps relative to the parameter as in Adafactor
  (arXiv:1804.04235).
  """
  moving = optax.chain(
    optax.clip_by_global_norm(cfg.max_grad_norm),
    optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
    optax.scale_by_param_block_rms() if cfg.scale_by_param_rms else optax.identity(),
    optax.add_decayed_weights(cfg.weight_decay, decayed),
    optax.scale_by_learning_rate(learning_rate(cfg, cfg.learning_rate)),
  )
  gain = by_factor(
    optax.chain(
      optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
      optax.scale_by_learning_rate(learning_rate(cfg, cfg.gain_rate)),
    )
  )

  inner = optax.partition(
    {"moving": moving, "gain": gain, "frozen": optax.set_to_zero()},
    functools.partial(labels, cfg),
  )

  # optax 0.2.8 mixes dtypes in AdamW and does not trace under strict promotion.
  def init(params: optax.Params) -> optax.OptState:
    with jax.numpy_dtype_promotion("standard"):
      return inner.init(params)

  def update(
    updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.OptState]:
    with jax.numpy_dtype_promotion("standard"):
      return inner.update(updates, state, params)

  return optax.GradientTransformation(init, update)


def labels(cfg: OptimizerConfig, params: Params) -> Params:
  """For every parameter whether it is "moving", a "gain" or "frozen".

  Raises:
    ConfigError: at trace, for a regex that matches no parameter.
  """

  def label(path: Any, _: jax.Array) -> str:
    if matches(path_name(path), cfg.frozen):
      return "frozen"
    return "gain" if matches(path_name(path), cfg.gains) else "moving"

  paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  for pattern in (*cfg.gains, *cfg.frozen):
    if not any(matches(path, (pattern,)) for path in paths):
      raise ConfigError(f"optimizer.gains or .frozen: no parameter's path matches {pattern!r}")
  return jax.tree_util.tree_map_with_path(label, params)


def by_factor(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Moves every parameter w = exp(s) w0 along s alone, as `inner` moves s.

  ds = inner(<dw, w>)      dw = ds * w
  """

  def init(params: optax.Params) -> optax.OptState:
    return inner.init(jax.tree.map(lambda w: jnp.zeros((), w.dtype), params))

  def update(
    updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.OptState]:
    steps, state = inner.update(jax.tree.map(jnp.vdot, updates, params), state)
    return jax.tree.map(lambda step, w: step * w, steps, params), state

  return optax.GradientTransformation(init, update)


def decayed(params: Params) -> Params:
  """True for every leaf that weight decay applies to."""

  def is_matrix(path, leaf: jax.Array) -> bool:
    return jnp.ndim(leaf) >= 2 and not NO_DECAY.search(jax.tree_util.keystr(path, simple=True))

  return jax.tree_util.tree_map_with_path(is_matrix, params)
