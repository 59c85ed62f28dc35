"""The acceptance check of the default run, on made-up result tables."""

import dataclasses

import pytest

from experiments.tiny import acceptance
from spatial_jax.evaluate.comparison import result_table
from spatial_jax.evaluate.results import write_results
from tests.test_evaluate_comparison import MEANS, all_sets


def table_of(**means):
  return result_table(all_sets(MEANS | means), 10.0, (), "MRA")


@pytest.mark.parametrize(
  ("means", "failed"),
  [
    ({"end_greedy": 0.60}, []),
    ({"end_greedy": 0.57}, ["greedy score, end - start"]),
    ({"end_greedy": 0.60, "median": 0.62}, ["greedy score, end - median answer"]),
    ({"end_greedy": 0.60, "end_other_image": 0.61}, ["greedy score, end - end on other images"]),
  ],
)
def test_each_requirement_can_fail_alone(means, failed):
  lines = acceptance.check(table_of(**means))
  not_met = [line.removeprefix("NOT MET: ") for met, line in lines if not met]
  assert [any(map(line.startswith, failed)) for line in not_met] == [True] * len(failed)


def test_the_exit_code_tells_the_outcome(tmp_path, capsys):
  assert acceptance.main(str(tmp_path)) == 2
  assert "results.json" in capsys.readouterr().err
  for name in ("good", "bad", "none"):
    (tmp_path / name).mkdir()
  write_results(table_of(end_greedy=0.60), tmp_path / "good", {})
  assert acceptance.main(str(tmp_path / "good")) == 0
  write_results(table_of(end_greedy=0.57), tmp_path / "bad", {})
  assert acceptance.main(str(tmp_path / "bad")) == 1
  assert "NOT MET: greedy score, end - start" in capsys.readouterr().out
  table = table_of()
  write_results(dataclasses.replace(table, paired=()), tmp_path / "none", {})
  assert acceptance.main(str(tmp_path / "none")) == 2
