"""Rewards besides accuracy and format: rubric, attention, length, drawing, custom, scorers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs import common
from spatial_jax.config import ConfigError, build
from spatial_jax.errors import UserError
from spatial_jax.reward.attention import attention_reward, concentration
from spatial_jax.reward.compose import length_component, score
from spatial_jax.reward.config import LengthConfig, RewardConfig
from spatial_jax.reward.custom import check_functions, load_function
from spatial_jax.reward.phyx import matches_choice, matches_open
from spatial_jax.reward.principles import KEYWORDS, names_principle
from spatial_jax.reward.reflection import is_reflective, reflections
from spatial_jax.reward.rubric import unit_term
from spatial_jax.reward.snra import Schedule, adaptive_sharpness, shifted_tanh, snra
from spatial_jax.reward.units import Measure, dimension, read_measure, value_in
from spatial_jax.reward.vilasr_release import release_accuracy
from spatial_jax.types import Operation, Turn
from tests.reward_fixtures import DISTANCE, NEAREST, answering, rollout, turn


def config(**changes):
  """The default reward with dotted keys changed."""
  cfg = common.reward()
  cfg.update_from_flattened_dict(changes)
  return build(RewardConfig, cfg.to_dict())


def only(name, **changes):
  """The reward of one component alone."""
  weights = {f"weights.{key}": float(key == name) for key in common.reward().weights}
  return config(**weights, **changes)


def scores_of(*rollouts, task=DISTANCE, cfg, k=10.0, attention_BG=None):
  return score([list(rollouts)], [task], cfg, k, attention_BG)


# --- composition ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["accuracy", "format"])
def test_one_component_alone_is_a_configuration(name):
  group = [rollout(answering(x)) for x in ("2.0", "2.2")] + [rollout("<answer> 2.0 </answer>")]
  scores = scores_of(*group, cfg=only(name, gated=()))
  np.testing.assert_array_equal(scores.reward_BG, scores.components[name])
  assert list(scores.terms) == [name]


def test_the_reward_is_the_weighted_sum_of_its_terms():
  cfg = config(**{"weights.length": 0.3, "weights.rubric": 0.5, "gated": ("format", "rubric")})
  group = [rollout(answering(x)) for x in ("2.0", "2.2", "9", "cat")]
  scores = scores_of(*group, cfg=cfg)
  total = sum(scores.weights[name] * term for name, term in scores.terms.items())
  np.testing.assert_allclose(scores.reward_BG, total, rtol=1e-6)
  assert (scores.terms["rubric"][0, 2:] == 0).all()


def test_an_evaluation_leaves_out_what_only_training_has():
  cfg = config(**{"weights.attention": 0.5, "schedule.kind": "adaptive", "schedule.k_max": 400.0})
  changed = cfg.for_evaluation()
  assert changed.active == ("accuracy", "format")
  assert changed.schedule.kind == "constant"
  groups = [[rollout(answering("2.2")), rollout(answering(x))] for x in ("2.2", "9")]
  first, second = (scores_of(*group, cfg=changed, k=50.0).reward_BG[0, 0] for group in groups)
  assert first == second, "the other answers of a group do not count"
  assert only("attention", gated=()).for_evaluation().active == ("accuracy",)
  assert config().for_evaluation() == config()


@pytest.mark.parametrize("number", ["sigmoid", "tanh", "mra", "ratio", "tolerance"])
@pytest.mark.parametrize("size", [1e-19, 3e-9, 1e-5])
def test_a_small_truth_is_rewarded_like_a_large_one(number, size):
  cfg = only("accuracy", number=number, gated=())
  off = (1.0, 1.03, 1.27, 2.5)
  large, small = (
    scores_of(
      *(rollout(answering(f"{2.0 * x * unit:.4g}")) for x in off),
      task=dataclasses.replace(DISTANCE, answer=f"{2.0 * unit:g}"),
      cfg=cfg,
    )
    for unit in (1.0, size)
  )
  np.testing.assert_allclose(small.reward_BG, large.reward_BG, atol=1e-5)
  np.testing.assert_array_equal(small.score_BG, large.score_BG)


def test_a_reward_without_a_component_is_refused():
  weights = {f"weights.{key}": 0.0 for key in common.reward().weights}
  with pytest.raises(ConfigError, match="have a component"):
    config(**weights)


# --- adaptive sharpness --------------------------------------------------------------------------

ADAPTIVE = Schedule("adaptive", k_min=0.5, k_max=1e4, midpoint=0.5, steepness=1.0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.001, 1.0), min_size=1, max_size=9))
def test_the_median_answer_earns_one_half(errors):
  error = jnp.asarray(errors, jnp.float32)
  for curve, is_tanh in ((snra, False), (shifted_tanh, True)):
    k = adaptive_sharpness(error, jnp.ones(len(errors), bool), ADAPTIVE, is_tanh)
    median = sorted(errors)[math.ceil((len(errors) - 1) / 2)]
    assert float(curve(np.float32(median), k)) == pytest.approx(0.5, abs=1e-3)


def test_adaptive_sharpness_stays_within_its_bounds():
  yes = jnp.ones(3, bool)
  assert float(adaptive_sharpness(jnp.zeros(3), yes, ADAPTIVE)) == 1e4
  assert float(adaptive_sharpness(jnp.full(3, 100.0), yes, ADAPTIVE)) == 0.5
  assert float(adaptive_sharpness(jnp.zeros(3), ~yes, ADAPTIVE)) == 0.5
  unread = jnp.array([True, True, False])
  one = adaptive_sharpness(jnp.array([0.1, 0.1, 9.0]), unread, ADAPTIVE)
  assert float(one) == pytest.approx(math.log(3) / 0.1, rel=1e-5)


def test_groups_have_their_own_adaptive_sharpness():
  schedule = {"schedule.kind": "adaptive", "schedule.k_min": 0.5, "schedule.k_max": 1e5}
  near = [rollout(answering(x)) for x in ("2.0", "2.02", "2.04")]
  far = [rollout(answering(x)) for x in ("2.5", "3.0", "4.0")]
  scores = score([near, far], [DISTANCE, DISTANCE], only("accuracy", **schedule), 1.0)
  np.testing.assert_allclose(scores.reward_BG[:, 1], [0.5, 0.5], atol=1e-3)
  assert (scores.reward_BG.std(axis=1) > 0.1).all()


# --- length, drawing -----------------------------------------------------------------------------


def test_the_overlong_penalty_is_daposs_and_the_target_is_a_tent():
  overlong = LengthConfig("overlong", 100, 200)
  found = [float(length_component(n, overlong)) for n in (0, 100, 150, 200, 900)]
  np.testing.assert_allclose(found, [0, 0, -0.5, -1, -1], atol=1e-6)
  target = LengthConfig("target", 100, 0)
  found = [float(length_component(n, target)) for n in (0, 50, 100, 150, 200, 900)]
  np.testing.assert_allclose(found, [0, 0.5, 1, 0.5, 0, 0], atol=1e-6)


def test_drawing_earns_what_is_missing_to_its_target():
  drawn = Turn(0, 0, "", (), (), True, ("hash",))
  last = turn(answering("2.0"))
  group = [rollout(drawn, last), *[rollout(last)] * 3]
  scores = scores_of(*group, cfg=only("drawing", **{"drawing.target": 0.5}))
  np.testing.assert_allclose(scores.reward_BG[0], [0.5, 0, 0, 0], atol=1e-6)
  many = scores_of(*group, cfg=only("drawing", **{"drawing.target": 0.2}))
  np.testing.assert_array_equal(many.reward_BG, 0)


# --- a user's function ---------------------------------------------------------------------------


def write(tmp_path, body):
  path = tmp_path / "mine.py"
  path.write_text(f"def reward(response):\n  {body}\n")
  return f"{path}:reward"


def test_a_users_function_reads_the_response(tmp_path, capsys):
  place = write(tmp_path, "return 0.25 * (response.answer == response.task.answer) + 1")
  cfg = only("custom", custom=place)
  scores = scores_of(rollout(answering("2.0")), rollout(answering("3")), cfg=cfg)
  np.testing.assert_allclose(scores.reward_BG[0], [1.25, 1.0])
  check_functions(cfg, [DISTANCE])
  assert "a right, a wrong and no answer are rewarded 1.25, 1, 1" in capsys.readouterr().out


def test_functions_are_checked_only_if_they_are_used(tmp_path):
  place = write(tmp_path, "return None")
  check_functions(only("accuracy", custom=place), [DISTANCE])
  judged = only("rubric", **{"rubric.judge": place})
  with pytest.raises(UserError, match="task distance sample 0: the reward is NoneType"):
    check_functions(judged, [DISTANCE])


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("return 1 / 0", "task distance sample 0: the reward raised ZeroDivisionError"),
    ("return float('nan')", "the reward is nan; return a finite number"),
    ("return [1, 2]", "the reward is list; return one number"),
    ("import numpy; return numpy.ones(3)", r"ndarray of shape \(3,\); return one number"),
    ("return None", "the reward is NoneType"),
  ],
)
def test_a_users_function_that_fails_names_the_sample(tmp_path, body, message):
  cfg = only("custom", custom=write(tmp_path, body))
  with pytest.raises(UserError, match=message):
    scores_of(rollout(answering("2.0")), cfg=cfg)


def test_a_users_function_that_is_not_there_is_one_line(tmp_path):
  place = write(tmp_path, "return 1")
  for name, message in (
    ("missing.py:reward", "names no file"),
    ("reward", "names no file"),
    (place.replace(":reward", ":score"), "has no function score; it has reward"),
  ):
    with pytest.raises(ConfigError, match=message):
      load_function(name)
  (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
  with pytest.raises(ConfigError, match="cannot be imported"):
    load_function(f"{tmp_path / 'broken.py'}:reward")


# --- attention -----------------------------------------------------------------------------------


def test_attention_forms_by_hand():
  attention = config().attention
  image = jnp.array([0, 1, 1, 1, 1, 0], bool)
  even = jnp.array([0.3, 0.1, 0.1, 0.1, 0.1, 0.3])
  point = jnp.array([0.3, 0.4, 0.0, 0.0, 0.0, 0.3])
  share = jnp.float32(0.5)
  forms = [{"mass": 1.0}, {"relative": 1.0}, {"concentration": 1.0}]
  found = []
  for form in forms:
    cfg = dataclasses.replace(
      attention, **({"mass": 0.0, "relative": 0.0, "concentration": 0.0} | form)
    )
    found.append([float(attention_reward(x, image, share, cfg)) for x in (even, point)])
  np.testing.assert_allclose(found, [[0.4, 0.4], [0.8, 0.8], [0.0, 1.0]], atol=1e-6)
  assert float(attention_reward(even, image, share, attention)) == pytest.approx(0.4, abs=1e-6)
  none = jnp.zeros(6, bool)
  assert float(attention_reward(even, none, jnp.float32(0.0), attention)) == 0.0


@settings(deadline=None, max_examples=50)
@given(  # no mass so small that half of it is 0 in float32
  st.lists(st.just(0.0) | st.floats(2**-20, 1, width=32), min_size=6, max_size=6),
  st.integers(0, 63),
)
def test_concentration_is_bounded_and_ignores_scale(mass, bits):
  image = jnp.array([bits >> i & 1 for i in range(6)], bool)
  mass = jnp.where(image, jnp.asarray(mass, jnp.float32), 0.0)
  found = float(concentration(mass, image))
  assert 0.0 <= found <= 1.0
  assert float(concentration(mass * 0.5, image)) == pytest.approx(found, abs=1e-4)


def test_the_gated_form_pays_right_answers_alone():
  group = [rollout(answering("2.0")), rollout(answering("9"))]
  attention_BG = np.array([[0.6, 0.8]], np.float32)
  plain = scores_of(*group, cfg=only("attention"), attention_BG=attention_BG)
  np.testing.assert_allclose(plain.reward_BG, attention_BG)
  cfg = only("attention", **{"attention.gated": True})
  gated = scores_of(*group, cfg=cfg, attention_BG=attention_BG)
  np.testing.assert_allclose(gated.reward_BG, [[0.6, 0.0]], atol=1e-6)


# --- rubric --------------------------------------------------------------------------------------

SPEED = dataclasses.replace(
  DISTANCE,
  question="A ball rolls off a table. What is its speed?",
  answer="3.0",
  unit="m/s",
  extra={"subfield": "Kinematics", "principle": "projectile motion"},
)
GOOD = (
  "<think> The image shows h = 0.45 m. Projectile motion: the time of flight is t = 0.3 s. "
  "So v = 0.9 / 0.3 = 3.0 m/s. </think> Action: Answer\n<answer> 3.0 m/s </answer>"
)


def test_the_rubric_adds_its_five_terms():
  cfg = only("rubric", gated=())
  bad = answering("3.0")
  scores = scores_of(rollout(GOOD), rollout(bad), task=SPEED, cfg=cfg)
  assert scores.reward_BG[0, 0] == pytest.approx(1.0, abs=1e-6)
  assert scores.reward_BG[0, 1] == pytest.approx(0.4 + 0.1, abs=1e-6)  # correct, well formed
  wrong_unit = scores_of(
    rollout(GOOD.replace("<answer> 3.0 m/s", "<answer> 3.0 kg")), task=SPEED, cfg=cfg
  )
  assert wrong_unit.reward_BG[0, 0] == pytest.approx(0.2 + 0.1 + 0.1, abs=1e-6)


@pytest.mark.parametrize(
  ("question", "unit", "answer", "right"),
  [
    ("How many chairs are in this room?", None, "4 chairs", 1.0),
    ("How many chairs are in this room?", None, "4 m", 0.0),
    ("How long is the sofa, in meters?", None, "2 feet", 1.0),
    ("How long is the sofa, in meters?", None, "2 kg", 0.0),
    ("How long is the sofa, in meters?", None, "2", 0.0),
    ("How many chairs are in this room?", None, "4", 1.0),
    ("What is the angle?", "degrees", "30 degrees", 1.0),
    ("What is the angle?", "degrees", "30 m", 0.0),
  ],
)
def test_the_unit_of_the_rubric_is_that_of_task_or_question(question, unit, answer, right):
  task = dataclasses.replace(DISTANCE, question=question, unit=unit, answer="2")
  assert unit_term(answer, task) == right


def test_a_judge_takes_the_place_of_one_term(tmp_path):
  place = write(tmp_path, "return 0.5")
  cfg = only("rubric", gated=(), **{"rubric.judge": place, "rubric.judged_term": "principle"})
  scores = scores_of(rollout(GOOD), task=SPEED, cfg=cfg)
  assert scores.reward_BG[0, 0] == pytest.approx(1.0 - 0.2 * 0.5, abs=1e-6)


def test_all_25_subfields_have_keywords_and_a_list_of_all_names_none():
  assert len(KEYWORDS) == 25
  everything = " ".join(word for words in KEYWORDS.values() for word in words)
  for subfield, words in KEYWORDS.items():
    assert names_principle(" and ".join(words), subfield), subfield
    assert not names_principle(everything, subfield, words[0]), subfield
    assert not names_principle("", subfield)


@pytest.mark.parametrize(
  ("text", "value", "unit_dimension"),
  [
    ("36.1 kg", 36.1, "[mass]"),
    (r"3.0 \times 10^{8} m/s", 3e8, "[length] / [time]"),
    (r"4.7 \mathrm{~m}", 4.7, "[length]"),
    ("9.8 m/s^2", 9.8, "[length] / [time] ** 2"),
    ("25 °C", 25.0, "[temperature]"),
    ("7", 7.0, ""),
  ],
)
def test_measures_are_read(text, value, unit_dimension):
  measure = read_measure(text)
  assert measure is not None
  assert measure.value == pytest.approx(value)
  assert dimension(measure.unit) == unit_dimension


@settings(deadline=None, max_examples=100)
@given(st.text(max_size=60))
def test_reading_a_measure_never_raises(text):
  measure = read_measure(text)
  assert measure is None or math.isfinite(measure.value)


def test_a_measure_beyond_float32_is_not_read():
  assert read_measure("1e39 m") is None
  assert read_measure("1e300 J") is None
  assert value_in(Measure(1e37, "km"), "m") is None
  assert value_in(Measure(5.0, "km^999"), "m^999") is None
  assert dimension("dimensionless") == dimension("count") == ""


_UNIT = st.lists(
  st.sampled_from(
    ["degC", "°C", "degree", "deg", "m", "kg", "/", "*", "^2", "^99", " ", "K", "rad"]
  ),
  max_size=6,
).map("".join)


@given(st.floats(allow_nan=False), _UNIT, _UNIT)
@example(30.0, "degree degC", "degC")
def test_any_units_are_converted_or_refused(value, given, wanted):
  converted = value_in(Measure(value, given), wanted)
  assert converted is None or math.isfinite(converted) or not given
  measure = read_measure(f"{value} {given}")
  assert measure is None or math.isfinite(measure.value)


def test_measures_are_converted():
  assert value_in(read_measure("72 km/h"), "m/s") == pytest.approx(20)
  assert value_in(read_measure("25 °C"), "K") == pytest.approx(298.15)
  assert value_in(read_measure("3 kg"), "m") is None
  scores = scores_of(
    rollout(answering("10.8 km/h")), task=SPEED, cfg=only("accuracy", number="mra")
  )
  assert scores.reward_BG[0, 0] == 1.0


# --- scorers of released code --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("text", "key", "right"),
  [
    ("The final answer is: 4.7 m", "4.7 m", True),
    ("Final Answer: 4.8 m\nas 4.7 m would be", "4.7 m", True),  # the key anywhere counts
    ("final answer: 4.8", "4.7", False),
    ("It is 14.75", "4.7", True),
    ("correct answer\uff1a 3", "3", True),
  ],
)
def test_phyx_open_answers(text, key, right):
  assert matches_open(text, key) is right


@pytest.mark.parametrize(
  ("text", "key", "right"),
  [
    ("B", "B", True),
    ("The answer is B.", "B", True),
    ("The Answer: (C)", "C", True),
    ("answer A, no: B: it is", "B", True),  # another letter was found, then B: in the text
    ("Option C is wrong", "B", False),
    ("A: no. D: yes", "D", True),
    ("**B**", "B", True),
    ("", "A", False),
  ],
)
def test_phyx_choices(text, key, right):
  assert matches_choice(text, key) is right


def test_phyx_scores_a_choice_by_its_letter_whatever_the_key_of_the_open_question_is():
  task = dataclasses.replace(NEAREST, extra={"key": "3.0 m"})
  scores = scores_of(
    rollout(answering(task.answer), task=task),
    rollout(answering("D" if task.answer != "D" else "A"), task=task),
    task=task,
    cfg=only("accuracy", scorer="phyx", gated=()),
  )
  np.testing.assert_array_equal(scores.reward_BG, [[1, 0]])


def test_vilasrs_released_accuracy_scores_unfinished_numbers():
  assert release_accuracy("I see 2.24 m. No answer", DISTANCE) == pytest.approx(0.8)
  assert release_accuracy("<answer> 2.0 </answer>", DISTANCE) == pytest.approx(1.0)
  assert release_accuracy("<answer> B </answer>", NEAREST) == 1.0
  assert release_accuracy("<answer> b </answer>", NEAREST) == 0.0
  assert release_accuracy("none", DISTANCE) == 0.0
  early = rollout("it is 2.0 meters", end_reason="no_action")
  released = scores_of(early, cfg=only("accuracy", scorer="vilasr_release"))
  published = scores_of(early, cfg=only("accuracy"))
  assert released.reward_BG[0, 0] == 1.0
  assert published.reward_BG[0, 0] == 0.0


# --- reflection ----------------------------------------------------------------------------------


def drawing(*boxes):
  operations = tuple(Operation("box", 1, box, label) for label, box in boxes)
  return Turn(0, 0, "", operations, (), True, ())


def test_reflection_is_the_same_label_drawn_elsewhere_in_a_later_turn():
  chair, moved = ("chair", (0, 0, 5, 5)), ("chair", (1, 0, 5, 5))
  assert reflections([drawing(chair), drawing(moved)]) == 1
  assert reflections([drawing(chair, moved)]) == 0, "in one turn"
  assert reflections([drawing(chair), drawing(chair)]) == 0, "the same operation"
  assert reflections([drawing(chair), drawing(("lamp", (1, 0, 5, 5)))]) == 0, "another label"
  assert is_reflective([drawing(chair), drawing(), drawing(moved)])
  line = Turn(0, 0, "", (Operation("line", 1, (0, 0, 5, 5), "chair"),), (), True, ())
  assert is_reflective([drawing(chair), line]), "another tool"


def test_signals_trace_once_for_every_sharpness():
  cfg, traces = config(), []

  @jax.jit
  def one(k):
    traces.append(1)
    return length_component(k, cfg.length)

  one(jnp.float32(1)), one(jnp.float32(2))
  assert len(traces) == 1
