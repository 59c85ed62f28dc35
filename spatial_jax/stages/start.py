"""The start of a run: its first train state and its KL reference."""

import jax
import optax

from spatial_jax import compiled, rng, sharding
from spatial_jax.policy import param_tree
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.stages.load import PolicyFiles, compute_dtypes, load_params
from spatial_jax.stages.reference import Place, StartCopy, make_reference
from spatial_jax.types import Params, TrainState


def start_of(
  policy: Policy,
  optimizer: optax.GradientTransformation,
  files: PolicyFiles,
  seed: int,
  place: Place | None,
  resumes: bool,
) -> tuple[TrainState, StartCopy | None]:
  """The state at step 0, which the loop donates, and the KL reference.

  A run that resumes gets shapes and shardings of its state. It loads the start only if the KL term
  needs it, so that the devices never hold two states.

  Args:
    policy: on the train mesh, with frozen paths and adapters.
    files: of the start.
    seed: of new adapters.
    place: of a reference that is a copy of the start; None: no such copy is needed.
    resumes: whether the work directory has a checkpoint.
  """
  mesh, reference = compiled.train_mesh(policy), None
  abstract = compiled.abstract_state(policy, optimizer, mesh)
  if resumes and place is None:
    return abstract, None
  start = load_params(files, mesh, compute_dtypes(mesh) if resumes else policy.param_dtype)
  if place is not None:
    reference = make_reference(start, policy.frozen, policy.compute_dtype, place)
  if resumes:
    return abstract, reference
  if policy.lora.paths:
    adapters = compiled.init_adapters(policy, rng.stream(seed, "adapters"), mesh)
    start = param_tree.merge(start, adapters)
  return compiled.init_state(policy, optimizer, start, mesh), reference


def reference_shapes(policy: Policy) -> Params:
  """The parameters of a reference as ShapeDtypeStruct with shardings on the devices."""
  _, trained = param_tree.partition(policy.abstract_params(), policy.frozen)
  shardings = sharding.param_shardings(trained, compiled.train_mesh(policy))
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, policy.compute_dtype, sharding=place),
    trained,
    shardings,
  )
