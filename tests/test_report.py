"""The report page: its structure, its words, its figures, and missing or broken files."""

import base64
import dataclasses
import html.parser
import io
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from spatial_jax.errors import CheckpointError, DataError
from spatial_jax.evaluate.results import (
  is_up_to_date,
  read_results,
  write_results,
)
from spatial_jax.report import drawings, gallery, wording
from spatial_jax.report.example import choose_example, score_changes
from spatial_jax.report.gallery import Piece, pieces
from spatial_jax.report.report import About, write_report
from spatial_jax.rollout import saved_groups
from spatial_jax.types import Operation
from tests import dummies

ABOUT = About("A <small> run & more", "A short summary.", (("policy", "random"),))
VOID = {"meta", "img", "input", "path", "use", "br", "rect"}
FILES = (
  "metrics.jsonl", "results.json", "predictions.jsonl", "rollouts", "timeline.json", "config.json",
)  # fmt: skip


class Page(html.parser.HTMLParser):
  """Asserts that every tag is closed; collects tags, texts, and what a browser would load."""

  def __init__(self, text):
    super().__init__()
    self.unclosed, self.tags, self.loads, self.texts = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.unclosed, f"not closed: {self.unclosed}"

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag not in VOID:
      self.unclosed.append(tag)
    self.loads += [value for name, value in attrs if name in ("src", "href", "data", "action")]
    assert not [name for name, _ in attrs if name.startswith("on")]

  def handle_endtag(self, tag):
    if tag not in VOID:
      assert self.unclosed.pop() == tag

  def handle_data(self, data):
    if self.tags[-1:] != ["style"]:
      self.texts.append(data)

  @property
  def words(self):
    """The visible text with single blanks."""
    return " ".join("".join(self.texts).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return dummies.finished_run(tmp_path_factory.mktemp("run") / "run", steps=40)


@pytest.fixture(scope="module")
def text(run):
  return write_report(run, ABOUT, dummies.CARD, groups_per_step=2).read_text()


def copied(run, folder):
  """A copy of a work directory that a test may change."""
  return shutil.copytree(run, folder / "run")


def headings(text):
  return re.findall(r"<h2>(.*?)</h2>", text)


# --- the page ----------------------------------------------------------------------------------


def test_page_is_self_contained(text):
  page = Page(text)
  assert not {"script", "link", "iframe"} & set(page.tags)
  assert {url.split(":")[0] for url in page.loads if not url.startswith("#")} == {"data"}
  assert "@import" not in text
  assert not re.findall(r"url\((?!#)", text)
  outside = set(re.findall(r"https?://[^\s\"<]*", text))
  assert all(url.startswith("http://www.w3.org/") for url in outside), "only XML namespaces"


def test_sections_and_folds_are_complete(text):
  assert headings(text) == [
    "Scores by question type", "Training", "Reward and advantage",
    "Held-out questions at the start and at the end", "Rollouts of step 0", "Rollouts of step 40",
    "What the devices did during the rollouts of step 40", "Configuration",
  ]  # fmt: skip
  folds = dict.fromkeys(re.findall(r"<summary>(.*?)</summary>", text))
  assert list(folds) == [
    "All numbers", "All differences", "Further curves: format, entropy, loss, speed, devices",
    "drawing code", "config.json",
  ]  # fmt: skip
  assert text.count("<article>") == 6
  assert text.count('<div class="rollout ') + text.count('<div class="rollout"') == 4 * 8 + 2 * 3


def test_a_run_of_pairs_shows_its_loss_in_the_section_of_training(tmp_path):
  values = {"loss": 0.69, "pairs_right": 0.5, "margin": 0.0, "grad_norm": 1.0}
  records = [{"step": s, "stage": "dpo", "time_s": 1.0 + s, **values} for s in range(3)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
  page = write_report(tmp_path, ABOUT, None, 1).read_text()
  assert headings(page) == ["Training"]
  section = page[page.index("<h2>Training</h2>") : page.index("<summary>Further curves</summary>")]
  assert re.findall(r"<figcaption><b>(.*?)</b>", section) == [
    "Loss", "Pairs in the right order", "Margin",
  ]  # fmt: skip


def test_result_and_example_are_first(text):
  head = text[: text.index("<h2>")]
  assert re.search(r'class="result">On 451 held-out questions the greedy score rose from', head)
  assert '<div class="example">' in head
  assert head.count("data:image/webp") == 1
  assert re.search(r"<dt>Start</dt><dd>[\d.]+</dd>.*<dt>End</dt><dd>[\d.]+</dd>", head, re.DOTALL)
  assert "the score rose on 2, fell on 0 and stayed equal on 0" in head


def test_texts_of_models_and_data_are_escaped(text):
  assert "I can not tell &lt;script&gt;alert(1)&lt;/script&gt;" in text
  assert "&lt;b&gt;plant&lt;/b&gt;" in text
  assert "<b>plant" not in text
  assert "A &lt;small&gt; run &amp; more" in text


def test_every_saved_rollout_is_shown_in_full(run, text):
  words = Page(text).words
  steps = saved_groups.load_groups(run, per_step=2)
  pairs = [(g, rollout) for groups in steps for g in groups for rollout in g.rollouts]
  images = set()
  for group, rollout in pairs:
    assert f"{rollout.reward:.2f}" in words
    images |= {image.content_hash for image in rollout.trajectory.images}
    for turn in rollout.trajectory.turns:
      for piece in pieces(turn.text, group.response_prefix):
        assert " ".join(piece.text.split()) in words, piece.kind
      for error in turn.errors:
        assert error.detail in words
  assert "<think>" not in words
  assert len({url for url in Page(text).loads if url.startswith("data:image/")}) == len(images)


def test_rollouts_of_training_are_sorted_by_reward_and_the_truth_is_shown_once(run):
  [first, *_] = saved_groups.load_groups(run, per_step=1)
  view = gallery.group_view(first[0], dummies.CARD)
  rewards = [rollout.saved.reward for rollout in view.rollouts]
  assert rewards == sorted(rewards, reverse=True)
  assert {rollout.saved.name for rollout in view.rollouts} == {f"sample {i}" for i in range(1, 9)}


def test_evaluation_shows_the_start_beside_the_end(run):
  evaluation = saved_groups.load_groups(run, per_step=2)[-1]
  view = gallery.step_view(evaluation, None)
  assert view.compared
  for group in view.groups:
    assert [r.saved.name for r in group.rollouts] == [
      "start, greedy",
      "end, greedy",
      "end, sampled",
    ]
    assert [r.turns[-1].pieces[-1].kind for r in group.rollouts] == ["answer"] * 3


def test_true_boxes_and_given_words_of_saved_groups_are_shown(text):
  given = dummies.PREFIX.removeprefix("<think> ")
  assert f"<mark>{given}</mark> are about two chair widths apart." in text
  assert re.search(r"on image 1, IoU 0\.\d\d</small>", text)
  assert "<rect x=" in text
  assert "Dashed: true boxes" in text


def test_equal_work_directories_give_equal_pages(run, text):
  assert write_report(run, ABOUT, dummies.CARD, groups_per_step=2).read_text() == text


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_leaves_out_its_section_only(tmp_path, run, missing):
  workdir = copied(run, tmp_path)
  path = workdir / missing
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  text = write_report(workdir, ABOUT, None, 1).read_text()
  Page(text)
  every = {
    "results.json": ["Scores by question type"],
    "metrics.jsonl": ["Training"],
    "predictions.jsonl": [],
    "rollouts": [
      "Held-out questions at the start and at the end",
      "Rollouts of step 0",
      "Rollouts of step 40",
    ],
    "timeline.json": ["What the devices did during the rollouts of step 40"],
    "config.json": ["Configuration"],
  }
  expected = [name for names in every.values() for name in names if name not in every[missing]]
  assert set(expected) <= set(headings(text))
  assert not set(every[missing]) & set(headings(text))


def test_an_empty_work_directory_has_a_page(tmp_path):
  text = write_report(tmp_path, ABOUT, None, groups_per_step=2).read_text()
  Page(text)
  assert not headings(text)
  assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_odd_texts_and_invalid_rollouts_are_shown(tmp_path, run):
  (group, *_), *_ = saved_groups.load_groups(run, 1)
  strange = "\ud800 \x00 </textarea><!-- \"' &amp; ]]> <think> {{ 7 * 7 }} {% raw %}"
  broken = []
  for rollout in group.rollouts:
    turns = tuple(dataclasses.replace(t, text=strange) for t in rollout.trajectory.turns)
    trajectory = dataclasses.replace(rollout.trajectory, turns=turns, end_reason="fault")
    broken.append(dataclasses.replace(rollout, trajectory=trajectory, valid=False, answer=strange))
  saved_groups.save_groups([dataclasses.replace(group, rollouts=tuple(broken))], tmp_path)
  text = write_report(tmp_path, ABOUT, dummies.CARD, 2).read_text()
  Page(text)
  assert "{{ 7 * 7 }} {% raw %}" in text
  assert "</textarea>" not in text
  assert "Mean reward" not in text, "no rollout is valid"


def test_broken_files_are_named(tmp_path, run):
  workdir = copied(run, tmp_path)
  (workdir / "report.html").unlink(missing_ok=True)
  faults = (
    ("timeline.json", "{}", DataError, r"timeline\.json cannot be read"),
    ("rollouts/000000/0.json", "{}", DataError, r"0\.json is not a group of rollouts"),
    ("predictions.jsonl", "{}\n", DataError, r"predictions\.jsonl line 1 .*evaluate again"),
    ("results.json", '{"columns": 3}', DataError, r"results\.json .*evaluate again"),
    ("metrics.jsonl", "x\n", CheckpointError, r"metrics\.jsonl line 1"),
  )
  for name, content, error, message in faults:
    path = workdir / name
    before = path.read_text()
    path.write_text(content)
    with pytest.raises(error, match=message):
      write_report(workdir, ABOUT, None, 1)
    path.write_text(before)
  assert not (workdir / "report.html").exists()


def test_a_question_by_hand_is_written_once(tmp_path):
  generator = np.random.default_rng(1)
  task = dummies.number_task(generator)
  rollouts = [[dummies.trajectory(generator, task, answer="2.5")]]
  asked = dataclasses.replace(task, answer="")
  groups = saved_groups.make_saved_groups([dummies.prompt(asked)], rollouts, None)
  saved_groups.save_groups(groups, tmp_path)
  text = write_report(tmp_path, About("Title", task.question, ()), None, 1).read_text()
  words = Page(text).words
  assert words.count(task.question) == 1
  assert headings(text) == ["Answers"]
  for absent in ("reward", "score", "advantage", "True answer", "rewarded"):
    assert absent not in words, absent


def test_an_evaluation_alone_speaks_of_no_training(tmp_path):
  dummies.write_evaluation(np.random.default_rng(1), tmp_path, 1, ("greedy", "sampled"))
  card = dataclasses.replace(dummies.CARD, advantage=None)
  text = write_report(tmp_path, ABOUT, card, 1).read_text()
  assert headings(text) == ["Reward", "Answers to held-out questions"]
  words = Page(text).words
  for absent in ("Rollouts of step", "advantage", "Mean reward", "the start"):
    assert absent not in words, absent
  assert "0.54 at" not in words, "an evaluation has one sharpness"
  assert not headings(write_report(tmp_path, ABOUT, None, 0).read_text())


def test_page_has_a_layout_for_phones():
  css = pathlib.Path(wording.__file__).with_name("report.css").read_text()
  assert re.search(r"\.scroll {[^}]*overflow-x: auto", css)
  assert re.search(r"th:first-child {[^}]*position: sticky", css)
  assert re.search(r"\.rollouts {[^}]*align-items: start", css)
  phone = css[css.index("@media (max-width") :]
  assert re.search(r"\.wide-only { display: none", phone)
  assert re.search(r"\.phone-only { display: block", phone)


def test_a_missing_cell_leaves_a_gap(tmp_path):
  table = dummies.result_table(np.random.default_rng(0))
  del table.rows[0].cells["median"]
  del table.rows[1].cells["end_greedy"]
  write_results(table, tmp_path, {})
  text = write_report(tmp_path, ABOUT, None, 1).read_text()
  assert text.count("no value") == 2


def test_a_wrong_option_is_explained(text):
  assert "earns 0.32 at the start (k = 1.66) and 0.00 at the end (k = 99.3)." in text


# --- parts -------------------------------------------------------------------------------------


def test_pieces_lose_only_tags():
  text = "<think> a\n<b> </think> Action: X\n```json\n[1]\n```\nso <answer> 2 </answer> ```json [2"
  found = pieces(text, "")
  kinds = [piece.kind for piece in found]
  assert kinds == ["think", "action", "code", "plain", "answer", "code"]
  without_tags = re.sub(r"</?think>|Action:|```(json)?|</?answer>", "", text)
  assert "".join("".join(p.text.split()) for p in found) == "".join(without_tags.split())
  assert [p.kind for p in pieces("<think> not closed ```json [1]", "")] == ["think", "code"]
  assert pieces("<answer Answer <answer>", "") == [Piece("plain", "", "<answer Answer <answer>")]
  assert pieces(" \n", "") == []


def test_given_words_are_marked():
  prefix = "<think> I mark the"
  think, answer = pieces(f"{prefix} tv. </think> <answer> 3 </answer>", prefix)
  assert think == Piece("think", "I mark the", "tv.")
  assert answer == Piece("answer", "", "3")
  assert pieces("<think> I mark it.", prefix) == [Piece("think", "", "I mark it.")]
  assert pieces("<think> I mark", "<think> I mark") == [Piece("think", "I mark", "")]


def test_drawings_have_their_colour_and_the_iou_with_true_boxes():
  generator = np.random.default_rng(5)
  task = dummies.number_task(generator)
  image = dummies.patched(task.media[0].data)
  writer = dummies.TrajectoryWriter()
  writer.image(image)
  prompt_length = len(writer.ids)
  box = Operation("box", 1, (0.0, 0.0, 20.0, 10.0), "Chair")
  line = Operation("line", 1, (0.0, 0.0, 20.0, 10.0), "gap")
  first, second = dummies.drawn(image, box), dummies.drawn(image, line)
  writer.turn("I mark the chair", 5, generator, (box, line), (), (first.content_hash,))
  writer.image(first)
  again = Operation("box", 2, (5.0, 5.0, 9.0, 9.0), "lamp")
  writer.turn("<answer> 1 </answer>", 5, generator, (again,), (), (second.content_hash,))
  writer.image(second)
  trajectory = writer.finish(task.task_id, 0, prompt_length, 1, "answer")
  truth = [saved_groups.TrueBox("chair", 0, (10.0, 0.0, 20.0, 10.0))]
  truth += [saved_groups.TrueBox("chair", 1, (0.0, 0.0, 20.0, 10.0))]  # in another image
  one, two = drawings.drawings(trajectory, truth)
  assert [(o.colour, o.iou) for o in one.operations] == [("red", 0.5), ("black", None)]
  assert [(o.label, o.colour, o.iou) for o in two.operations] == [("lamp", "green", None)]
  assert [view.number for turn in (one, two) for view in turn.images] == [2, 3]
  for turn in (one, two):  # the box of the first turn is still there in the second image
    assert turn.images[0].true_boxes == [(10.0, 0.0, 10.0, 10.0)]


def test_iou():
  assert drawings.iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
  assert drawings.iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
  assert drawings.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0
  assert drawings.iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0


def test_small_images_are_enlarged_without_smoothing():
  pixels = np.zeros((28, 14, 3), np.uint8)
  pixels[:, 7:] = 255
  view = drawings.image_view(pixels, 1, [])
  assert (view.width, view.height) == (14, 28)
  enlarged = Image.open(io.BytesIO(base64.b64decode(view.uri.partition(",")[2])))
  assert enlarged.size[1] >= 336
  assert enlarged.size[0] * 2 == enlarged.size[1]
  assert len(np.unique(np.asarray(enlarged)[5, :, 0] > 127)) == 2
  large = drawings.image_view(np.zeros((600, 400, 3), np.uint8), 1, [])
  assert Image.open(io.BytesIO(base64.b64decode(large.uri.partition(",")[2]))).size == (400, 600)


def test_example_moves_with_the_result(run):
  steps, changes = saved_groups.load_groups(run, per_step=2), score_changes(run)
  rose = choose_example(steps, changes, "rose")
  assert rose
  assert [who for who, *_ in rose.answers] == ["Start", "End"]
  scores = [rollout.score for _, rollout in rose.answers]
  assert scores == [0.0, pytest.approx(0.85, abs=0.06)], "80 % off, 10 % off"
  assert "largest rise among the 2 questions below" in rose.note
  same = choose_example(steps, changes, "shows no clear change")
  assert same
  assert same.answers[1][1].score == pytest.approx(0.65, abs=0.06), "20 % off"
  fell = choose_example(steps, changes, "fell")
  assert fell
  assert "largest fall" not in fell.note, "no question fell"


def test_example_falls_back_to_what_is_saved(run):
  steps = saved_groups.load_groups(run, per_step=1)
  alone = dataclasses.replace(steps[-1][0], rollouts=steps[-1][0].rollouts[1:])
  example = choose_example([*steps[:-1], [alone]], (), None)
  assert example
  assert example.where == "Held-out question"
  assert [who for who, *_ in example.answers] == ["Answer, end, greedy", "Answer, end, sampled"]
  example = choose_example(steps[:-1], (), None)
  assert example
  assert example.where == "Training question of step 40"
  assert choose_example([], (), None) is None


# --- files that the page reads -----------------------------------------------------------------


def test_results_round_trip(tmp_path):
  assert read_results(tmp_path) is None
  table = dummies.result_table(np.random.default_rng(0))
  write_results(table, tmp_path, {})
  assert read_results(tmp_path) == table
  record = json.loads((tmp_path / "results.json").read_text())
  assert record["rows"][0]["cells"]["start_sampled"].keys() == {"mean", "low", "high"}


def test_saved_groups_round_trip_and_replace(tmp_path):
  generator = np.random.default_rng(1)
  task = dummies.number_task(generator)
  resized = dummies.patched(np.zeros((224, 168, 3), np.uint8))  # the image of the task has 112 px
  prompt = dataclasses.replace(dummies.prompt(task), images=(resized,))
  for count in (2, 1):
    rollouts = [dummies.group(generator, task, 3)]
    scores = dummies.score(rollouts, [task], dummies.REWARD, 5.0)
    saved = saved_groups.make_saved_groups(
      [prompt], rollouts, scores, scores.reward_BG - 0.5, step=7, response_prefix="<think>"
    )
    saved_groups.save_groups(count * saved, tmp_path)
  [[group]] = saved_groups.load_groups(tmp_path, per_step=4)
  assert (group.step, group.truth, group.task_id) == (7, task.answer, task.task_id)
  assert group.boxes == (saved_groups.TrueBox("chair", 0, (15.0, 100.0, 60.0, 180.0)),)
  assert group.response_prefix == "<think>"
  for g, rollout in enumerate(group.rollouts):
    assert rollout.reward == scores.reward_BG[0, g]
    assert rollout.advantage == np.float32(scores.reward_BG[0, g] - 0.5)
    assert rollout.answer == saved[0].rollouts[g].answer
    np.testing.assert_array_equal(rollout.trajectory.token_ids_T, rollouts[0][g].token_ids_T)


def test_groups_with_most_drawings_are_kept():
  generator = np.random.default_rng(3)
  tasks = [dummies.number_task(generator, f"room-{i}/chair") for i in range(6)]
  rollouts = [dummies.group(generator, task, 4) for task in tasks]
  scores = dummies.score(rollouts, tasks, dummies.REWARD, 5.0)
  prompts = [dummies.prompt(task) for task in tasks]
  groups = saved_groups.make_saved_groups(prompts, rollouts, scores, scores.reward_BG, step=0)

  def drew(group):
    return sum(any(turn.produced for turn in r.trajectory.turns) for r in group.rollouts)

  counts = sorted(map(drew, groups), reverse=True)
  assert counts[0] > counts[-1]
  assert list(map(drew, saved_groups.most_drawings_first(groups, 3))) == counts[:3]
  assert len(saved_groups.most_drawings_first(groups, 9)) == 6


def test_results_of_another_config_are_not_up_to_date(tmp_path):
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
