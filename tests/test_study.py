"""Tables over stages and conditions: folders, starts, and the values of their evaluations."""

import json

import pytest

from spatial_jax import study
from spatial_jax.errors import DataError
from spatial_jax.evaluate.benchmarks.phyx import grouped_scores, scores_by_group
from spatial_jax.evaluate.results import Cell, ResultColumn, ResultRow, ResultTable, write_results

COLUMNS = ("start_greedy", "end_greedy")
TYPES = {"distance": 3, "size": 1}


def cells(start, end):
  return {
    key: Cell(mean, mean - 0.1, mean + 0.1) for key, mean in zip(COLUMNS, (start, end), strict=True)
  }


def evaluated(folder, start=0.25, end=0.5, **more):
  """results.json of an evaluation of two question types."""
  table = ResultTable(
    columns=tuple(ResultColumn(key, key) for key in COLUMNS),
    rows=tuple(ResultRow(name, n, cells(start, end)) for name, n in TYPES.items()),
    overall=cells(start, end),
    parsed=dict.fromkeys(COLUMNS, 1.0),
    summary=(),
    paired=(),
    notes=(),
  )
  folder.mkdir(parents=True, exist_ok=True)
  write_results(table, folder, more)
  return folder


def answer(score, column="end_greedy", end_reason="answer", **extra):
  return {"column": column, "score": score, "end_reason": end_reason, "extra": extra}


def predicted(folder, *answers):
  """predictions.jsonl."""
  text = "".join(f"{json.dumps(record)}\n" for record in answers)
  (folder / "predictions.jsonl").write_text(text)
  return folder / "predictions.jsonl"


def read_json(path):
  return json.loads(path.read_text())


# --- folders -------------------------------------------------------------------------------------


def test_a_single_stage_has_the_work_directory_and_several_have_a_folder_each(tmp_path):
  assert study.stage_folder(tmp_path, ["grpo"], 0) == tmp_path
  stages = ["sft", "reject", "grpo"]
  found = [study.stage_folder(tmp_path, stages, number).name for number in range(3)]
  assert found == ["1_sft", "2_reject", "3_grpo"]


def test_the_end_of_a_run_is_its_last_stage(tmp_path):
  assert study.final_folder(tmp_path) == tmp_path
  for name in ("2_reject", "1_sft", "checkpoints", "10"):
    (tmp_path / name).mkdir()
  (tmp_path / "3_grpo").write_text("a file is no stage")
  assert study.final_folder(tmp_path).name == "2_reject"


def test_a_condition_may_start_from_the_end_of_another_one(tmp_path):
  (tmp_path / "warm_up").mkdir()
  assert study.start_of("Qwen2-VL-2B", tmp_path) == "Qwen2-VL-2B"
  assert study.start_of("@warm_up", tmp_path) == str(tmp_path / "warm_up")
  for name in ("1_sft", "2_grpo"):
    (tmp_path / "warm_up" / name).mkdir()
  assert study.start_of("@warm_up", tmp_path) == str(tmp_path / "warm_up" / "2_grpo")


# --- tables --------------------------------------------------------------------------------------


def test_the_stages_are_one_table_from_the_start_to_the_last_end(tmp_path, capsys):
  evaluated(tmp_path / "1_sft", 0.1, 0.3)
  evaluated(tmp_path / "2_grpo", 0.3, 0.6)
  study.show_stages(tmp_path, ["sft", "grpo"])
  lines = read_json(tmp_path / "stages.json")
  assert {name: line["score"] for name, line in lines.items()} == {
    "start": 0.1, "after sft": 0.3, "after grpo": 0.6,
  }  # fmt: skip
  assert all(line["score: distance"] == line["score"] for line in lines.values())
  shown = capsys.readouterr().out
  for word in ("start", "after sft", "after grpo", "score: size", "0.100", "0.300", "0.600"):
    assert word in shown
  assert f"wrote {tmp_path / 'stages.json'}" in shown.replace("\n", "")


def test_a_single_stage_is_a_table_too(tmp_path):
  evaluated(tmp_path, 0.2, 0.4)
  study.show_stages(tmp_path, ["grpo"])
  lines = read_json(tmp_path / "stages.json")
  assert [(name, line["score"]) for name, line in lines.items()] == [
    ("start", 0.2), ("after grpo", 0.4),
  ]  # fmt: skip


def test_the_conditions_are_compared_with_the_start_of_the_first(tmp_path, capsys):
  evaluated(tmp_path / "sft" / "1_sft", 0.1, 0.2)
  evaluated(tmp_path / "sft" / "2_grpo", 0.2, 0.7)
  evaluated(tmp_path / "format_accuracy", 0.15, 0.5)
  study.show_conditions(tmp_path, ["sft", "format_accuracy"])
  lines = read_json(tmp_path / "conditions.json")
  assert {name: line["score"] for name, line in lines.items()} == {
    "base": 0.1, "sft": 0.7, "format_accuracy": 0.5,
  }  # fmt: skip
  assert "format accuracy" in capsys.readouterr().out


def test_behaviour_and_pass_at_k_are_beside_the_score(tmp_path):
  behaviour = {
    "start_greedy": {"turns": 1.0, "drawing_share": 0.0, "faults": 2.0},
    "end_greedy": {"turns": 2.5, "drawing_share": 0.75, "end/answer": 1.0},
  }
  evaluated(tmp_path, behaviour=behaviour, pass_at={"pass@1": 0.5, "pass@8": 0.9})
  start, end = (study.line_of(tmp_path, column) for column in COLUMNS)
  assert (start["turns"], start["drawing_share"]) == (1.0, 0.0)
  assert (end["turns"], end["drawing_share"]) == (2.5, 0.75)
  assert "pass@8" not in start, "pass@k is of the end"
  assert end["pass@8"] == 0.9
  assert not {"faults", "end/answer"} & {*start, *end}


def test_domains_and_reasoning_types_are_rows_of_the_table(tmp_path, capsys):
  evaluated(tmp_path)
  answers = [
    answer(1.0, category="Optics", reasoning_type=["Spatial Relation"]),
    answer(0.0, category="Optics", reasoning_type=["Multi-Formula"]),
    answer(0.0, "start_greedy", category="Optics", reasoning_type=["Multi-Formula"]),
  ]
  predicted(tmp_path, *answers)
  study.show_stages(tmp_path, ["grpo"])
  lines = read_json(tmp_path / "stages.json")
  assert lines["after grpo"]["category: Optics"] == 0.5
  assert lines["after grpo"]["reasoning type: Spatial Relation"] == 1.0
  assert lines["start"]["category: Optics"] == 0.0
  assert "reasoning type: Spatial Relation" not in lines["start"]
  assert "reasoning type: Multi-Formula" in capsys.readouterr().out


def test_a_stage_without_an_evaluation_has_an_empty_column(tmp_path):
  evaluated(tmp_path / "2_grpo", 0.3, 0.6)
  study.show_stages(tmp_path, ["sft", "grpo"])
  lines = read_json(tmp_path / "stages.json")
  assert (lines["start"], lines["after sft"]) == ({}, {})
  assert lines["after grpo"]["score"] == 0.6


# --- damaged files -------------------------------------------------------------------------------


def without(*keys):
  """A change of results.json that removes something."""

  def change(record):
    for key in keys[:-1]:
      record = record[key]
    del record[keys[-1]]

  return change


@pytest.mark.parametrize(
  "change",
  [
    without("overall"),
    without("overall", "end_greedy"),
    without("overall", "end_greedy", "mean"),
    without("rows"),
    without("rows", 0, "cells"),
    without("rows", 0, "question_type"),
    lambda record: record.update(rows=3),
    lambda record: record.update(behaviour=None),
    lambda record: record.update(behaviour={"end_greedy": 3}),
    lambda record: record.update(pass_at=7),
  ],
)
def test_a_table_with_missing_values_is_one_line(tmp_path, change):
  path = evaluated(tmp_path) / "results.json"
  record = read_json(path)
  change(record)
  path.write_text(json.dumps(record))
  with pytest.raises(DataError, match=r"results\.json is not an evaluation .*delete it") as caught:
    study.show_stages(tmp_path, ["grpo"])
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("contents", [b"", b"{", b"[]", b"3", b"\xff\xfe\x00", b'{"overall": {}}'])
def test_a_file_that_is_no_evaluation_is_one_line(tmp_path, contents):
  (tmp_path / "results.json").write_bytes(contents)
  with pytest.raises(DataError, match=r"results\.json is not an evaluation") as caught:
    study.line_of(tmp_path, "end_greedy")
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("contents", [b"{", b"[]\n", b'{"score": 1}\n', b"3\n", b"\xff\n"])
def test_predictions_that_cannot_be_read_are_one_line(tmp_path, contents):
  (evaluated(tmp_path) / "predictions.jsonl").write_bytes(contents)
  with pytest.raises(DataError, match=r"predictions\.jsonl .*evaluate again") as caught:
    study.line_of(tmp_path, "end_greedy")
  assert "\n" not in str(caught.value)


# --- scores of PhyX ------------------------------------------------------------------------------


def test_scores_are_means_per_domain_reasoning_type_and_text_level(tmp_path):
  both = ["Multi-Formula", "Spatial Relation"]
  path = predicted(
    tmp_path,
    answer(1.0, category="Mechanics", reasoning_type=both, text_level="full"),
    answer(0.0, category="Mechanics", reasoning_type=both[:1], text_level="minimal"),
    answer(0.5, category="Optics", reasoning_type=both[1], text_level="minimal"),
    answer(1.0, "start_greedy", category="Optics"),
    answer(1.0, end_reason="fault", category="Optics", reasoning_type=both),
    answer(1.0),
  )
  assert grouped_scores(path, "end_greedy") == {
    "category: Mechanics": 0.5,
    "category: Optics": 0.5,
    "reasoning type: Multi-Formula": 0.5,
    "reasoning type: Spatial Relation": 0.75,
    "text level: full": 1.0,
    "text level: minimal": 0.25,
  }
  assert grouped_scores(path, "start_greedy") == {"category: Optics": 1.0}
  assert grouped_scores(path, "end_sampled") == {}


def test_tasks_without_domains_have_no_groups(tmp_path):
  assert grouped_scores(tmp_path / "missing.jsonl", "end_greedy") == {}
  assert grouped_scores(predicted(tmp_path, answer(1.0), answer(0.0)), "end_greedy") == {}
  assert scores_by_group([({"subfield": "Optics", "category": ""}, 1.0)]) == {}


def test_every_answer_counts_once_in_its_domain():
  scored = [({"category": "ABC"[i % 3]}, float(i % 2)) for i in range(60)]
  found = scores_by_group(scored)
  assert list(found) == ["category: A", "category: B", "category: C"]
  assert sum(found.values()) / 3 == pytest.approx(0.5)
