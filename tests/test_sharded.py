"""A whole step on eight devices equals the step on one; the second step traces nothing."""

import collections
import copy
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spatial_jax import abstract_inputs, sharding
from spatial_jax.learn.optimizer import make_optimizer
from spatial_jax.learn.train_batch import to_train_batch
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from tests import rollout_fixtures, step_fixtures
from tests.step_fixtures import Outcome, StepSetup


class Calls:
  """The shapes of all calls of one jitted function."""

  def __init__(self, function):
    self.function = function
    self.shapes = []

  def record(self, arguments):
    self.shapes.append(jax.tree.map(_shape, arguments))

  @property
  def signatures(self) -> int:
    return len({str(call) for call in self.shapes})


def _shape(x) -> str:
  return f"{x.dtype}{np.shape(x)}" if hasattr(x, "dtype") else repr(x)


def _kinds(tree) -> list[str]:
  return [leaf.split("(")[0] for leaf in jax.tree.leaves(tree)]


def _watch(lab: StepSetup) -> tuple[StepSetup, dict[str, Calls]]:
  programs = lab.engine.programs
  calls = {
    "encode_images": Calls(programs.encode_images),
    "prefill": Calls(programs.prefill),
    "start_rows": Calls(programs.start_rows),
    "decode": Calls(programs.decode),
    "append": Calls(programs.append),
    "update": Calls(lab.learn.update),
  }

  def around(name, program, *arguments):
    calls[name].record(arguments)
    return program(*arguments)

  def update(*arguments):
    calls["update"].record(arguments)
    return lab.learn.update(*arguments)

  engine = rollout_fixtures.watch(lab.engine, around)
  learn = copy.copy(lab.learn)
  learn.update = update
  return dataclasses.replace(lab, engine=engine, learn=learn), calls


COMPILED = collections.Counter()  # names of the functions that were compiled


def count_compilation(event: str, duration_secs: float, fun_name: str = "", **_: object) -> None:
  COMPILED[fun_name] += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(count_compilation)


@dataclasses.dataclass(frozen=True, eq=False)
class Ran:
  """One step on one device; two steps, watched, on eight."""

  before: dict
  one: Outcome
  eight: Outcome
  second: Outcome
  lab: StepSetup
  watched: dict[str, Calls]
  compiled: dict[str, int]  # program -> number of compilations on eight devices
  after: tuple[dict, dict]


@pytest.fixture(scope="module")
def ran():
  with pytest.MonkeyPatch.context() as monkeypatch:
    step_fixtures.make_rollouts_draw(monkeypatch)
    small = step_fixtures.step_setup(1, 1, 1)
    lab, watched = _watch(step_fixtures.step_setup(2, 2, 2))
    before = jax.tree.map(np.array, small.state.params)  # copies: the update donates its state
    one = step_fixtures.step(small, small.state, 0)
    COMPILED.clear()
    eight = step_fixtures.step(lab, lab.state, 0)
    after = jax.tree.map(np.array, (one.state.params, eight.state.params))
    second = step_fixtures.step(lab, eight.state, 1)
  compiled = {name: COMPILED[f"jit(_{name})"] for name in watched}
  return Ran(before, one, eight, second, lab, watched, compiled, after)


def test_rollouts_are_the_same(ran):
  pairs = list(
    zip(*(itertools.chain(*outcome.rollouts) for outcome in (ran.one, ran.eight)), strict=True)
  )
  assert {len(t.turns) for t, _ in pairs} == {1, 2}, "some rows draw, some do not"
  for one, eight in pairs:
    np.testing.assert_array_equal(one.token_ids_T, eight.token_ids_T)
    np.testing.assert_array_equal(one.position_TA, eight.position_TA)
    np.testing.assert_allclose(one.logp_T, eight.logp_T, rtol=0, atol=1e-5)


def test_rollouts_in_fewer_rows_are_the_same(ran):
  """The prompt of a row may be on another device than the row."""
  few = dataclasses.replace(step_fixtures.ROLLOUT, rows=4)
  with pytest.MonkeyPatch.context() as monkeypatch:
    step_fixtures.make_rollouts_draw(monkeypatch)
    lab = step_fixtures.step_setup(2, 2, 2, few)
    weights = lab.decode_params(lab.state.params)
    prompts = [lab.engine.conversation.prompt(task) for task in step_fixtures.tasks(0)]
    job = RolloutJob(prompts, 0, 0, [step_fixtures.SAMPLED] * few.group)
    rollouts = generate_rollouts(lab.engine, weights, job)
  pairs = zip(itertools.chain(*ran.one.rollouts), itertools.chain(*rollouts), strict=True)
  for one, other in pairs:
    np.testing.assert_array_equal(one.token_ids_T, other.token_ids_T)
    np.testing.assert_allclose(one.logp_T, other.logp_T, rtol=0, atol=1e-5)


def test_rollouts_do_not_depend_on_the_default_prng(ran):
  with pytest.MonkeyPatch.context() as monkeypatch, jax.default_prng_impl("rbg"):
    step_fixtures.make_rollouts_draw(monkeypatch)
    lab = step_fixtures.step_setup(1, 1, 1)
    weights = lab.decode_params(lab.state.params)
    prompts = [lab.engine.conversation.prompt(task) for task in step_fixtures.tasks(0)[:1]]
    job = RolloutJob(prompts, 0, 0, [step_fixtures.SAMPLED] * step_fixtures.ROLLOUT.group)
    rollouts = generate_rollouts(lab.engine, weights, job)
  for one, other in zip(ran.one.rollouts[0], rollouts[0], strict=True):
    np.testing.assert_array_equal(one.token_ids_T, other.token_ids_T)


def test_updates_are_the_same(ran):
  for name in ran.one.metrics:
    one, eight = float(ran.one.metrics[name]), float(ran.eight.metrics[name])
    assert one == pytest.approx(eight, rel=1e-5, abs=1e-5), name
  assert float(ran.eight.metrics["logp_difference"]) < 1e-5, "trainer and sampler agree"
  one, eight = ran.after
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), one, eight)
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), ran.before, one)
  assert min(jax.tree.leaves(moved)) > 1e-4, "every parameter moves, far more than the tolerance"


def test_every_token_of_every_row_is_scored_as_it_was_sampled(ran):
  rollouts, lab = ran.eight.rollouts, ran.lab
  zero_BG = np.zeros((len(rollouts), len(rollouts[0])))
  batch, _ = to_train_batch(rollouts, zero_BG, step_fixtures.SHAPES)
  params = jax.device_put(ran.before, sharding.param_shardings(ran.before, lab.mesh))
  logp_RT = np.asarray(lab.learn.logprobs(params, lab.learn.place(batch)))
  trained = sum(t.trained_T.sum() for t in itertools.chain(*rollouts))
  assert batch.rows.trained_RT.sum() == trained > 0
  difference_RT = np.abs(logp_RT - batch.rows.old_logp_RT)[batch.rows.trained_RT]
  assert difference_RT.max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["compute", "int8"])
def test_metrics_show_the_difference_of_a_rounded_sampler(monkeypatch, weights):
  """Sampler and trainer compute in bfloat16; kernels in 8 bits are further off the policy."""
  step_fixtures.make_rollouts_draw(monkeypatch)
  cfg = dataclasses.replace(step_fixtures.ROLLOUT, weights=weights)
  lab = step_fixtures.step_setup(1, 1, 1, cfg, jnp.bfloat16)
  metrics = step_fixtures.step(lab, lab.state, 0).metrics
  difference = float(metrics["logp_difference"])
  assert (3e-3 if weights == "int8" else 1e-4) < difference < 0.2
  assert np.isfinite(float(metrics["kl_old_k1"]))
  assert 0 < float(metrics["kl_old_k3"]) < 0.1
  assert 0.8 < float(metrics["effective_share"]) < 1


def test_state_and_weights_are_sharded_by_the_rules(ran):
  lab, local = ran.lab, sharding.rollout_mesh(ran.lab.mesh)
  assert dict(local.shape) == {"data": 4, "tensor": 2}
  for tree, mesh in ((ran.second.state, lab.mesh), (ran.second.weights, local)):
    expected = jax.tree.leaves(sharding.param_shardings(tree, mesh))
    assert [x.sharding for x in jax.tree.leaves(tree)] == expected
  down = ran.second.state.params["decoder"]["layers"]["mlp"]["down"]["kernel"]
  assert down.addressable_shards[0].data.size == down.size // 4


def test_the_same_buckets_are_compiled_once(ran):
  for name, calls in ran.watched.items():
    assert len(calls.shapes) > calls.signatures or name == "append", "called again"
    assert ran.compiled[name] == calls.signatures, name


def test_abstract_inputs_match_the_calls_of_a_run(ran):
  programs = abstract_inputs.all_programs(
    ran.lab.policy,
    ran.lab.policy,
    make_optimizer(step_fixtures.OPTIMIZER),
    step_fixtures.LOSS,
    step_fixtures.MICRO,
    step_fixtures.ROLLOUT,
    step_fixtures.SHAPES,
    step_fixtures.KEEP_FRACTION,
  )
  expected = {p.name: p.arguments for p in programs if p.name in ran.watched}
  assert expected.keys() == ran.watched.keys()
  expected["decode"] = expected["decode"][:3]  # without the rows that are gathered
  for name, arguments in expected.items():
    calls = [call[: len(arguments)] for call in ran.watched[name].shapes]
    shapes = jax.tree.map(_shape, arguments)
    for call in calls:
      assert jax.tree.structure(call) == jax.tree.structure(shapes), name
      assert _kinds(call) == _kinds(shapes), name
    if name in ("decode", "update"):  # the others use smaller buckets than the largest
      assert shapes in calls, name
