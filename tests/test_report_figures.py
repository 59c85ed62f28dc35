"""The report page: its sentences, its figures, and the reward card."""

import dataclasses
import re

import numpy as np
import pytest

from spatial_jax.evaluate.results import Cell, Paired, headline, score_change
from spatial_jax.report import curves, gallery, result_plots, svg, wording
from spatial_jax.report.report import key_figures, not_finite
from spatial_jax.report.reward_card import EXAMPLE_ERRORS, RewardCard, card_view, sharpness_of
from spatial_jax.report.timeline_plot import timeline_figure
from spatial_jax.reward.snra import Schedule
from spatial_jax.rollout import saved_groups
from tests import dummies


@pytest.fixture(scope="module")
def result_table():
  return dummies.result_table(np.random.default_rng(0))


# --- words -------------------------------------------------------------------------------------


def table_with(table, *changes):
  """The dummy table whose differences have the given intervals: ((after, before), low, high)."""
  paired = [
    Paired(f"{after} - {before}", after, before, "score", (low + high) / 2, low, high)
    for after, before, low, high in changes
  ]
  return dataclasses.replace(table, paired=tuple(paired))


@pytest.mark.parametrize(
  ("low", "high", "verb"),
  [
    (0.01, 0.2, "rose from"),
    (-0.2, -0.01, "fell from"),
    (-0.1, 0.2, "shows no clear change"),
    (0.0, 0.0, "shows no clear change"),
  ],
)
def test_headline_is_rose_fell_or_no_clear_change(result_table, low, high, verb):
  table = table_with(result_table, ("end_greedy", "start_greedy", low, high))
  overall = table.overall | {
    "start_greedy": Cell(0.5211, 0.4, 0.6),
    "end_greedy": Cell(0.5232, 0.4, 0.6),
  }
  sentence = headline(dataclasses.replace(table, overall=overall)) or ""
  values = "(0.521 at the start, 0.523 at the end)" if "no clear" in verb else "0.521 to 0.523"
  assert sentence.startswith(f"On 451 held-out questions the greedy score {verb} {values}: ")
  assert sentence.endswith(f"95 % interval {low:+.3f} to {high:+.3f}.")
  change = score_change(table)
  assert change
  assert change.verb == verb.removesuffix(" from")


@pytest.mark.parametrize(
  ("gain", "best", "words"),
  [
    ((0.1, 0.2), (0.01, 0.1), "more than sharpening"),
    ((0.1, 0.2), (-0.1, 0.1), "as much without training"),
    ((0.1, 0.2), (-0.2, -0.1), "more without training"),
    ((-0.1, 0.1), (0.01, 0.1), None),
    ((-0.2, -0.1), (-0.2, -0.1), None),
  ],
)
def test_sharpening_is_mentioned_only_if_the_sampled_score_rose(result_table, gain, best, words):
  table = table_with(
    result_table,
    ("end_greedy", "start_greedy", -0.1, 0.1),
    ("end_sampled", "start_sampled", *gain),
    ("end_sampled", "start_best_temperature", *best),
  )
  found = " ".join(wording.findings(table))
  assert (words in found) if words else not re.search("sharpening|temperature", found)


def test_baselines_are_compared_in_words(result_table):
  table = table_with(
    result_table,
    ("end_greedy", "start_greedy", 0.1, 0.2),
    ("end_greedy", "median", 0.1, 0.2),
    ("end_greedy", "end_other_image", -0.1, 0.2),
  )
  median, other = wording.findings(table)
  assert median.startswith("The greedy score at the end is above that of the median answer")
  assert other.startswith("The greedy score at the end does not differ from")


def test_an_evaluation_of_one_policy_has_no_verb_of_change(result_table):
  table = table_with(result_table, ("end_greedy", "median", 0.1, 0.2))
  kept = ("end_greedy", "median")
  table = dataclasses.replace(table, overall={key: table.overall[key] for key in kept})
  assert re.search(r"the greedy score is 0\.\d{3}, 95 % interval", headline(table) or "")
  assert wording.findings(table)[0].startswith("The greedy score is above")


@pytest.mark.parametrize(
  ("k", "reward", "score", "words"),
  [
    ((10, 40), (0.9, 0.7), (0.5, 0.6), "falls from 0.90 to 0.70 because the sharpness k rises"),
    ((10, 40), (0.9, 0.7), (0.6, 0.5), "The sharpness k rises from 10 to 40, so the same error"),
    ((10, 40), (0.7, 0.9), (0.5, 0.6), "rewards of different steps do not compare"),
    ((20, 20), (0.9, 0.7), (0.5, 0.6), None),
    ((None, None), (0.9, 0.7), (0.5, 0.6), None),
  ],
)
def test_reward_curve_explains_why_it_falls(k, reward, score, words):
  records = [{"sharpness": k[i], "reward": reward[i], "score": score[i]} for i in (0, 1)]
  sentence = wording.reward_sentence(records)
  assert (words in sentence) if words else sentence is None


def test_schedules_that_did_not_end_are_mentioned():
  def config(steps, warmup, total):
    optimizer = {"warmup_steps": warmup, "total_steps": total}
    return {"loop": {"steps": steps}, "learn": {"optimizer": optimizer}}

  assert "warms up for 20 steps and the run has 6" in wording.schedule_sentence(config(6, 20, 56))
  assert "made for 56 steps and the run has 30" in wording.schedule_sentence(config(30, 20, 56))
  assert wording.schedule_sentence(config(56, 20, 56)) is None
  assert wording.schedule_sentence({"seed": 0}) is None
  sft = config(30, 20, 56) | {"stages": ["sft"], "sft": {"steps": 9, "optimizer": {}}}
  assert wording.schedule_sentence(sft) is None
  sft["sft"]["optimizer"] = {"warmup_steps": 9, "total_steps": 9}
  assert "warms up for 9 steps and the run has 9" in wording.schedule_sentence(sft)


def test_numbers_have_a_true_minus_and_no_negative_zero():
  assert wording.signed(-0.0004) == "+0.000"
  assert wording.signed(-0.011) == "\N{MINUS SIGN}0.011"
  assert (
    wording.typeset("end - start x factor")
    == "end \N{MINUS SIGN} start \N{MULTIPLICATION SIGN} factor"
  )
  assert wording.typeset("sharp-edged: -0.010") == "sharp-edged: \N{MINUS SIGN}0.010"
  assert wording.type_name("object_abs_distance") == "absolute distance between objects"
  assert wording.type_name("my_new_type") == "my new type"


def test_key_figures_and_metrics_that_are_not_finite(result_table):
  records = [
    {"step": s, "time_s": 10.0 * (s % 5 + 1), "score": 0.1 * s, "loss": None} for s in range(10)
  ]
  records[3]["not_finite"] = ["loss"]
  found = {item.label: (item.value, item.context) for item in key_figures(records, None)}
  assert found == {
    "score in training": ("0.90", "from 0.00, sampled"),
    "steps": ("10", "in 1:40"),
  }
  assert not_finite(records) == [("loss", [3])]
  assert key_figures([], None) == []
  table = result_table
  labels = [item.label for item in key_figures(records, table)]
  assert labels == ["greedy score", "sampled score", "median answer", "steps"]


def layouts(figure):
  """The two layouts of a figure by name."""
  wide, phone = str(figure).split('<div class="phone-only">')
  return {"wide": wide, "phone": phone}


# --- figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["wide", "phone"])
def test_dot_plot_has_a_row_per_question_type(result_table, layout):
  table = result_table
  rows = [dataclasses.replace(row, question_type=f"a$b$<{i}>") for i, row in enumerate(table.rows)]
  table = dataclasses.replace(table, rows=tuple(rows))
  figure = layouts(result_plots.dot_plot(table))[layout]
  for row in rows:
    name = row.question_type.replace("<", "&lt;").replace(">", "&gt;")
    assert f"<title>{name}</title>" in figure
    assert figure.count(f">{name}</text>") == 1
  assert figure.count("n = 64") == len(rows) - 1
  few = re.search(r"n = 3</text>", figure)
  assert few
  assert svg.PALE in figure, "a type with few questions is pale"


def test_dot_plot_falls_back_to_the_columns_of_the_table(result_table):
  table = result_table

  def legend(*names):
    overall = {key: cell for key, cell in table.overall.items() if key in names}
    figure = result_plots.dot_plot(dataclasses.replace(table, overall=overall))
    known = ("start", "end", "policy", "median answer", "images of other rooms")
    return figure and [name for name in known if f">{name}</text>" in figure]

  assert legend("end_greedy", "median") == ["policy", "median answer"]
  assert legend("start_sampled", "end_sampled") == ["start", "end"]
  assert legend("end_greedy", "end_other_image") == ["policy", "images of other rooms"]
  assert legend("median") is None


def test_forest_plot_has_a_row_per_difference(result_table):
  table = result_table
  for figure in layouts(result_plots.forest_plot(table.paired)).values():
    for paired in table.paired:
      assert wording.typeset(paired.label) in figure
      assert wording.interval(paired) in figure


def test_smoothing_keeps_lines_and_ends():
  line_Z = np.linspace(0, 3, 200)
  np.testing.assert_allclose(curves.smooth(line_Z), line_Z, atol=1e-12)
  noise_Z = np.random.default_rng(0).normal(size=400)
  assert curves.smooth(noise_Z)[40:-40].std() < 0.3
  np.testing.assert_array_equal(curves.smooth(np.array([5.0])), [5.0])


def test_main_curves_start_at_zero_and_others_say_if_they_do_not():
  records = [
    {"step": s, "score": 0.9, "reward": 0.8, "sharpness": s, "loss": 5.0 + s, "format": 0.99}
    for s in range(3)
  ]
  main = curves.main_panels(records)
  assert [panel.curve.key for panel in main] == ["score", "reward"]
  assert all(re.search(r">0</text>", panel.figure) for panel in main)
  further = {panel.curve.key: panel for panel in curves.further_panels(records)}
  assert list(further) == ["format", "loss"]
  assert further["loss"].sentence == "The axis does not start at 0."
  assert further["format"].sentence == ""
  assert re.search(r">0</text>", further["format"].figure), "a share is drawn from 0 to 1"


@pytest.mark.parametrize(
  ("stage", "values", "titles", "captions"),
  [
    (
      "sft",
      {"loss": 2.0, "response_tokens": 90.0, "drawing_share": 0.5, "grad_norm": 1.0},
      ["Loss", "Response length", "Drawing"],
      ["negative log-likelihood", "per demonstration", "share of demonstrations"],
    ),
    (
      "reject",
      {"loss": 2.0, "response_tokens": 90.0},
      ["Loss", "Response length"],
      ["nats", "dem"],
    ),
    (
      "dpo",
      {"loss": 0.69, "pairs_right": 0.5, "margin": -0.1, "reward_chosen": 0.1, "grad_norm": 1.0},
      ["Loss", "Pairs in the right order", "Margin"],
      ["pairs", "preferred", "preferred"],
    ),
  ],
)
def test_the_main_curves_are_those_of_the_stage(stage, values, titles, captions):
  """The loss is the first, and shown once."""
  records = [{"step": s, "stage": stage, **values} for s in range(3)]
  main, further = curves.main_panels(records), curves.further_panels(records)
  assert [panel.curve.title for panel in main] == titles
  assert all(word in p.curve.caption for p, word in zip(main, captions, strict=True))
  assert not any("rollout" in panel.curve.caption for panel in main)
  assert "loss" not in [panel.curve.key for panel in further]
  assert curves.further_title(records) == "Further curves"


def test_held_out_score_has_an_axis_that_shows_its_change():
  scores = [0.5, 0.52, 0.55, 0.54, 0.6, 0.62, 0.61, 0.65]
  records: list[dict[str, object]] = [{"step": s} for s in range(64)]
  for record, score in zip(records[7::8], scores, strict=True):
    record["held_out_score"] = score
  panel = curves.held_out_panel(records)
  assert panel
  for figure in layouts(panel.figure).values():
    ticks = [float(tick) for tick in re.findall(r">(0\.\d+|[01])</text>", figure)]
    assert 0.45 <= min(ticks) <= 0.5 < 0.65 <= max(ticks) <= 0.7
    assert figure.count("<use ") >= 8, "points are drawn"
  assert panel.sentence == "The axis does not start at 0."
  low = curves.held_out_panel([{"step": 0, "held_out_score": 0.01}])
  assert low
  assert low.sentence == ""
  assert curves.held_out_panel(records[:3]) is None


def test_timeline_legend_names_only_programs_with_bars():
  record = dummies.timeline_record(step=3)
  figure = layouts(timeline_figure(record))["wide"]
  for name in ("decode", "drawing", "idle", "encode images", "prefill"):
    assert f">{name}</text>" in figure
  assert ">append</text>" not in figure
  record["chunks"] = record["chunks"][:1]  # nothing is drawn in the first chunk
  assert ">drawing</text>" not in layouts(timeline_figure(record))["wide"]


# --- the reward card ---------------------------------------------------------------------------


def test_card_rewards_as_the_run_does():
  card = dummies.CARD
  error_Z = np.array([0.0, 0.1, 1.0])
  np.testing.assert_allclose(card.accuracy(error_Z, 100.0), [1, 0.538, 0], atol=5e-4)
  assert card.wrong_choice(1.0) == pytest.approx(0.538, abs=5e-4)
  exact = dataclasses.replace(card, reward=dataclasses.replace(card.reward, choice="exact"))
  assert exact.wrong_choice(1.0) == 0
  assert sharpness_of(card.reward, 0.45) == pytest.approx(1 + 99 / (1 + np.exp(0.5)), rel=1e-4)


@pytest.mark.parametrize("gated", [("format",), ("accuracy", "format")])
def test_accuracy_and_format_part_add_up_to_the_reward(gated):
  generator = np.random.default_rng(2)
  reward = dataclasses.replace(dummies.REWARD, gated=gated, score_threshold=0.5)
  card = dataclasses.replace(dummies.CARD, reward=reward)
  task = dummies.number_task(generator)
  rollouts = [dummies.group(generator, task)]
  scores = dummies.score(rollouts, [task], card.reward, 5.0)
  [group] = saved_groups.make_saved_groups(
    [dummies.prompt(task)], rollouts, scores, scores.reward_BG, step=0
  )
  views = gallery.group_view(group, card).rollouts
  by_name = {view.saved.name: view for view in views}
  for g in range(8):
    view = by_name[f"sample {g + 1}"]
    assert view.saved.parts["accuracy"] == pytest.approx(scores.accuracy_BG[0, g], abs=1e-6)
    assert sum(view.saved.parts.values()) == pytest.approx(scores.reward_BG[0, g], abs=1e-6)
    assert view.parts.endswith("format")
  assert len({view.saved.parts["format"] for view in views}) == 2, "some earn the format part"


def test_card_shows_start_and_end_of_the_run():
  view = card_view(dummies.CARD)
  assert "start of the run, k = 1.66" in view.reward
  assert "end of the run, k = 99.3" in view.reward
  evaluation = card_view(dataclasses.replace(dummies.CARD, advantage=None))
  assert evaluation.advantage is None
  assert "of the run" not in evaluation.reward
  assert ">k = 99.3</text>" in evaluation.reward


def test_a_reward_without_sharpness_names_none_and_the_score_is_that_of_the_config():
  reward = dataclasses.replace(dummies.REWARD, number="ratio", score="tolerance", tolerance=0.05)
  loo = dataclasses.replace(dummies.ADVANTAGE, baseline="leave_one_out", alpha=0.0)
  view = card_view(RewardCard(reward, loo))
  assert "k = " not in view.reward
  assert view.wrong_choice.startswith("0.32 at the start"), "choices still follow the schedule"
  assert ">ratio</text>" in view.reward
  assert "within 5 %" in view.reward
  assert ">leave-one-out</text>" in (view.advantage or "")


def test_the_card_of_an_adaptive_schedule_has_the_sharpness_of_its_example_answers():
  schedule = Schedule("adaptive", 0.5, 1e4, 0.5, 1.0)
  reward = dataclasses.replace(dummies.REWARD, schedule=schedule)
  median = np.sort(EXAMPLE_ERRORS)[len(EXAMPLE_ERRORS) // 2] ** 2
  assert sharpness_of(reward, 0.3) == pytest.approx(np.log(3) / median, rel=1e-5)
  assert list(RewardCard(reward, dummies.ADVANTAGE).points) == [""]


def test_a_constant_schedule_has_one_curve():
  schedule = Schedule("constant", 20.0, 20.0, 0.5, 10.0)
  reward = dataclasses.replace(dummies.REWARD, schedule=schedule, discrete_sharpness=1.0)
  advantage = dataclasses.replace(dummies.ADVANTAGE, sign_safe=True)
  view = card_view(RewardCard(reward, advantage))
  assert "of the run" not in view.reward
  assert ">k = 20</text>" in view.reward
  assert "sign-safe AP-GRPO" in (view.advantage or "")
  assert view.wrong_choice == "0.54"
