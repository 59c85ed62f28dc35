import dataclasses
import html.parser
import json
import re
import shutil

import numpy as np
import pytest

from spatial_jax.errors import CheckpointError, DataError
from spatial_jax.evaluate.results import is_up_to_date, read_results, write_results
from spatial_jax.report import gallery as gallery_lib
from spatial_jax.report import plots
from spatial_jax.report.report import About, interval_scale, not_finite, tiles, write_report
from spatial_jax.reward.snra import Schedule
from spatial_jax.rollout import saved_groups
from tests import dummies

ABOUT = About("A <small> run & more", "What this is.", (("policy", "random"),))
VOID = {"meta", "img", "input", "path", "use", "br"}


class Page(html.parser.HTMLParser):
  """Checks that every tag is closed, and collects what a browser would load."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.loads, self.texts = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open, f"not closed: {self.open}"

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag not in VOID:
      self.open.append(tag)
    self.loads += [value for name, value in attrs if name in ("src", "href", "data", "action")]
    assert not [name for name, _ in attrs if name.startswith("on")]

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return dummies.finished_run(tmp_path_factory.mktemp("run") / "run", steps=40)


@pytest.fixture(scope="module")
def text(run):
  return write_report(run, ABOUT, dummies.CARD, groups_per_step=2).read_text()


def test_the_page_is_whole_and_loads_nothing_from_outside(text):
  page = Page(text)
  assert "script" not in page.tags
  assert "link" not in page.tags
  assert {url.split(":")[0] for url in page.loads if not url.startswith("#")} == {"data"}
  assert "@import" not in text
  assert not re.findall(r"url\((?!#)", text)


def test_every_section_is_there(text):
  headings = re.findall(r"<h2>(.*?)</h2>", text)
  assert headings == [
    "Before and after", "Training", "Reward and advantage", "Rollouts of step 0",
    "Rollouts of step 40", "Configuration",
  ]  # fmt: skip
  assert text.count("<article>") == 4
  assert text.count('<div class="sibling') == 4 * (8 + 1)  # and the four grids around them
  assert text.count("<svg") == 8 + 2


def test_model_text_is_shown_and_never_markup(text):
  assert "I can not tell &lt;script&gt;alert(1)&lt;/script&gt;" in text
  assert "&lt;b&gt;plant&lt;/b&gt;" in text
  assert "<b>plant" not in text
  assert "A &lt;small&gt; run &amp; more" in text


def test_each_thing_said_of_a_rollout(run, text):
  group = saved_groups.load_groups(run, per_step=2)[0][0]
  shown = "".join(Page(text).texts)
  for sibling in group.rollouts:
    assert f"{sibling.reward:.2f}" in shown
    for turn in sibling.trajectory.turns:
      for kind, piece in gallery_lib.pieces(turn.text):
        assert piece in shown, kind
      for error in turn.errors:
        assert error.detail in shown
  assert "no action" in shown
  drawing = next(s for s in group.rollouts if len(s.trajectory.images) == 3)
  assert [
    image["number"]
    for turn in gallery_lib.rollout_view(drawing)["turns"]
    for image in turn["images"]
  ] == [2, 3]
  pictures = {url for url in Page(text).loads if url.startswith("data:image/webp")}
  trajectories = [
    sibling.trajectory
    for groups in saved_groups.load_groups(run, per_step=2)
    for each in groups
    for sibling in each.rollouts
  ]
  assert len(pictures) == len({i.content_hash for t in trajectories for i in t.images})


def test_the_note_on_wrong_choices(text):
  assert "<b>0.54</b> at k_min (1)" in text


def test_the_same_work_directory_gives_the_same_page(run, text):
  assert write_report(run, ABOUT, dummies.CARD, groups_per_step=2).read_text() == text


def test_an_empty_work_directory(tmp_path):
  text = write_report(tmp_path, ABOUT, None, groups_per_step=2).read_text()
  Page(text)
  assert "<h2>" not in text
  assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_one_step_and_odd_text(tmp_path):
  dummies.finished_run(tmp_path, steps=1, groups=1)
  (tmp_path / "results.json").unlink()
  [[group]] = saved_groups.load_groups(tmp_path, 1)[:1]
  strange = "\ud800 \x00 </textarea><!-- \"' &amp; ]]> <think> {{ 7 * 7 }} {% raw %}"
  broken = []
  for sibling in group.rollouts:
    turns = tuple(dataclasses.replace(t, text=strange) for t in sibling.trajectory.turns)
    rollout = dataclasses.replace(sibling.trajectory, turns=turns, end_reason="fault")
    broken.append(dataclasses.replace(sibling, trajectory=rollout, valid=False, answer=strange))
  shutil.rmtree(tmp_path / "rollouts")
  saved_groups.save_groups([dataclasses.replace(group, rollouts=tuple(broken))], tmp_path)
  text = write_report(tmp_path, ABOUT, dummies.CARD, 2).read_text()
  Page(text)
  assert "{{ 7 * 7 }} {% raw %}" in text
  assert "</textarea>" not in text
  assert "mean reward" not in text  # nobody is usable


def test_broken_files_are_named(tmp_path):
  dummies.finished_run(tmp_path, steps=2, groups=1)
  group = tmp_path / "rollouts" / "000000" / "0.json"
  group.write_text("{}")
  with pytest.raises(DataError, match=r"0\.json is not a group of rollouts"):
    write_report(tmp_path, ABOUT, None, 1)
  (tmp_path / "results.json").write_text('{"columns": 3}')
  with pytest.raises(DataError, match=r"results\.json is not a table of results .*evaluate again"):
    write_report(tmp_path, ABOUT, None, 1)
  (tmp_path / "metrics.jsonl").write_text("x\n")
  with pytest.raises(CheckpointError, match=r"metrics\.jsonl line 1"):
    write_report(tmp_path, ABOUT, None, 1)
  assert not (tmp_path / "report.html").exists()


# --- parts -------------------------------------------------------------------------------------


def test_results_round_trip(tmp_path):
  assert read_results(tmp_path) is None
  table = dummies.result_table(np.random.default_rng(0))
  write_results(table, tmp_path, {})
  assert read_results(tmp_path) == table
  record = json.loads((tmp_path / "results.json").read_text())
  assert record["rows"][0]["cells"]["start_sampled"].keys() == {"mean", "low", "high"}


def test_a_missing_cell_leaves_a_gap(tmp_path):
  table = dummies.result_table(np.random.default_rng(0))
  del table.rows[0].cells["median"]
  write_results(table, tmp_path, {})
  assert "not asked" in write_report(tmp_path, ABOUT, None, 1).read_text()
  low, high = interval_scale(table)
  assert low < min(cell.low for row in table.rows for cell in row.cells.values())
  assert high > max(cell.high for row in table.rows for cell in row.cells.values())


@pytest.mark.parametrize("count", [1, 5])
def test_every_column_of_the_table_has_room(tmp_path, count):
  """The table is as wide as so many columns need; its frame scrolls where the page is narrower."""
  table = dummies.result_table(np.random.default_rng(0))
  write_results(dataclasses.replace(table, columns=table.columns[:count]), tmp_path, {})
  text = write_report(tmp_path, ABOUT, None, 1).read_text()
  assert f'<div class="wide">\n<table class="results" style="--columns:{count}">' in text
  assert re.search(r"\.results {[^}]*min-width: calc\([^;]*var\(--columns\)", text)
  assert re.search(r"\.wide {[^}]*overflow-x: auto", text)


def test_groups_round_trip_and_replace(tmp_path):
  generator = np.random.default_rng(1)
  task = dummies.number_task(generator)
  for _ in range(2):
    rollouts = [dummies.group(generator, task, 3)]
    scores = dummies.score(rollouts, [task], dummies.REWARD, 5.0)
    saved = saved_groups.make_saved_groups(
      [dummies.prompt(task)], rollouts, scores, scores.reward_BG - 0.5, step=7
    )
    saved_groups.save_groups(saved, tmp_path)
  [[group]] = saved_groups.load_groups(tmp_path, per_step=4)
  assert (group.step, group.truth, group.task_id) == (7, task.answer, task.task_id)
  for g, sibling in enumerate(group.rollouts):
    assert sibling.reward == scores.reward_BG[0, g]
    assert sibling.advantage == np.float32(scores.reward_BG[0, g] - 0.5)
    assert sibling.answer == saved[0].rollouts[g].answer
    np.testing.assert_array_equal(sibling.trajectory.token_ids_T, rollouts[0][g].token_ids_T)


def test_groups_with_most_drawings_are_kept():
  generator = np.random.default_rng(3)
  tasks = [dummies.number_task(generator, f"room-{i}/chair") for i in range(6)]
  rollouts = [dummies.group(generator, task, 4) for task in tasks]
  scores = dummies.score(rollouts, tasks, dummies.REWARD, 5.0)
  prompts = [dummies.prompt(task) for task in tasks]
  groups = saved_groups.make_saved_groups(prompts, rollouts, scores, scores.reward_BG, step=0)

  def drew(group):
    return sum(any(turn.produced for turn in s.trajectory.turns) for s in group.rollouts)

  counts = sorted(map(drew, groups), reverse=True)
  assert counts[0] > counts[-1]
  assert list(map(drew, saved_groups.most_drawings_first(groups, 3))) == counts[:3]
  assert len(saved_groups.most_drawings_first(groups, 9)) == 6


def test_answers_of_an_evaluation_are_no_rollouts_of_a_step(tmp_path):
  """A greedy and a sampled answer, which nothing was learnt from."""
  generator = np.random.default_rng(1)
  task = dummies.number_task(generator)
  rollouts = []
  for greedy in (True, False):
    rollouts = [dummies.group(generator, task, 1)]
    scores = dummies.score(rollouts, [task], dummies.REWARD, 5.0)
    [group] = saved_groups.make_saved_groups([dummies.prompt(task)], rollouts, scores, None, None, [greedy])
    rollouts += group.rollouts
  saved_groups.save_groups([dataclasses.replace(group, rollouts=tuple(rollouts))], tmp_path)
  [[loaded]] = saved_groups.load_groups(tmp_path, per_step=4)
  assert loaded.step is None
  assert [(s.advantage, s.greedy) for s in loaded.rollouts] == [(None, True), (None, False)]
  text = write_report(tmp_path, ABOUT, None, 1).read_text()
  assert "<h2>Answers to held-out questions</h2>" in text
  assert "reward, greedy</span>" in text
  assert "reward, sampled</span>" in text
  for words in ("Rollouts of step", "advantage", "ranked", "mean reward"):
    assert words not in "".join(Page(text).texts), words
  assert "<h2>" not in write_report(tmp_path, ABOUT, None, 0).read_text()


def test_pieces_lose_nothing():
  text = "<think> a\n<b> </think> Action: X\n```json\n[1]\n```\nso <answer> 2 </answer> ```json [2"
  kinds = gallery_lib.pieces(text)
  assert [kind for kind, _ in kinds] == ["think", "plain", "code", "plain", "answer", "code"]
  assert "".join("".join(piece.split()) for _, piece in kinds) == "".join(text.split())


def test_smoothing_keeps_lines_and_ends():
  line_Z = np.linspace(0, 3, 200)
  np.testing.assert_allclose(plots.smooth(line_Z), line_Z, atol=1e-12)
  noise_Z = np.random.default_rng(0).normal(size=400)
  assert plots.smooth(noise_Z)[40:-40].std() < 0.3
  np.testing.assert_array_equal(plots.smooth(np.array([5.0])), [5.0])


def test_the_card_pays_as_the_run_does():
  card = dummies.CARD
  error_Z = np.array([0.0, 0.1, 1.0])
  np.testing.assert_allclose(card.accuracy(error_Z, 100.0), [1, 0.538, 0], atol=5e-4)
  assert card.wrong_choice(1.0) == pytest.approx(0.538, abs=5e-4)
  exact = dataclasses.replace(card, reward=dataclasses.replace(card.reward, choice="exact"))
  assert exact.wrong_choice(1.0) == 0
  assert card.sharpness == pytest.approx(1 + 99 / (1 + np.exp(0.5)), rel=1e-4)


def test_a_constant_schedule_and_sign_safe_advantages(tmp_path):
  schedule = Schedule("constant", 1.0, 20.0, 0.5, 10.0)
  reward = dataclasses.replace(dummies.REWARD, schedule=schedule, discrete_sharpness=1.0)
  advantage = dataclasses.replace(dummies.ADVANTAGE, sign_safe=True)
  card = plots.RewardCard(reward, advantage, 0.3)
  text = write_report(tmp_path, ABOUT, card, 1).read_text()
  assert "start of the schedule" not in text
  assert "now, k = 20" in text
  assert "sign-safe AP-GRPO" in text
  assert "paid the same throughout the run: 0.54" in text


def test_tiles_and_flags():
  records = [
    {"step": s, "time_s": 10.0 * (s % 5 + 1), "reward": 0.1 * s, "score": None} for s in range(10)
  ]
  records[3]["not_finite"] = ["loss"]
  found = {tile.label: (tile.value, tile.before) for tile in tiles(records, None)}
  assert found == {"reward in training": ("0.90", "from 0.00"), "steps": ("10", "in 1:40")}
  assert not_finite(records) == [("loss", [3])]
  sharper = [r | {"sharpness": r["step"], "score": 0.5} for r in records]
  assert [t.label for t in tiles(sharper, None)] == ["sampled score in training", "steps"]
  assert tiles([], None) == []
  table = dummies.result_table(np.random.default_rng(0))
  assert [tile.label for tile in tiles([], table)] == [p.label for p in table.paired[:2]]


def test_results_say_what_they_come_from(tmp_path):
  """So that a finished run is not examined again, and a changed one is."""
  table = dummies.result_table(np.random.default_rng(0))
  origin = {"seed": 0, "evaluation": {"temperatures": (0.3, 0.5)}}
  assert not is_up_to_date(tmp_path, origin)
  write_results(table, tmp_path, {"origin": origin | {"benchmark": None}})
  assert is_up_to_date(tmp_path, origin)
  assert not is_up_to_date(tmp_path, origin | {"seed": 1})
  assert not is_up_to_date(tmp_path, origin | {"steps": 3})
  for broken in ("{", "[]", "{}", '{"origin": 3}'):
    (tmp_path / "results.json").write_text(broken)
    assert not is_up_to_date(tmp_path, origin)
