"""The timeline records every program that ran, and changes none."""

import dataclasses
import json
import math

import pytest

from spatial_jax.report import timeline_plot
from spatial_jax.rollout.profiling import ChunkRecord, ProgramSpan, Timeline
from tests.rollout_fixtures import GREEDY, ROLLOUT, engine_for, flat, sampled_ids
from tests.test_rollout_engine import all_turns_draw
from tests.test_rollout_scheduler import (
  LateExecutor,
  assert_same,
  prompts,
  recorded,
  run_rollouts,
)

__all__ = ["all_turns_draw"]  # a fixture

TWO_SLOTS = dataclasses.replace(ROLLOUT, slots=2)


@pytest.fixture
def timed(all_turns_draw):
  """A call with two slots for five prompts: its timeline, its rollouts, the programs it ran."""
  engine, calls = recorded(engine_for(TWO_SLOTS))
  with Timeline() as timeline:
    rollouts = run_rollouts(TWO_SLOTS, engine, timeline=timeline)
  return timeline, rollouts, calls


def test_programs_are_recorded_in_their_order(timed):
  timeline, _, calls = timed
  expected = [name for name, *_ in calls if name != "start_rows"]
  assert [span.program for span in timeline.programs] == expected
  ends = [span.end_s for span in timeline.programs]
  assert ends == sorted(ends)
  assert all(span.start_s <= span.end_s <= timeline.total_s for span in timeline.programs)
  assert len(timeline.chunks) == sum(name == "decode" for name, *_ in calls)


def test_tokens_are_those_of_the_rollouts(timed):
  timeline, rollouts, _ = timed

  def tokens(program):
    return sum(span.tokens for span in timeline.programs if span.program == program)

  sampled = sum(len(sampled_ids(t)) for t in flat(rollouts))
  assert tokens("decode") == sampled
  assert tokens("prefill") == sum(len(p.token_ids_T) for p in prompts())
  images = {i.content_hash: i.tokens for t in flat(rollouts) for i in t.images}
  assert tokens("encode_images") == sum(images.values()), "each image once"
  assert all(span.tokens <= span.positions for span in timeline.programs)
  responses = sum(len(t.token_ids_T) - t.prompt_length for t in flat(rollouts))
  assert tokens("append") == responses - sampled


def test_summary_has_rates_and_fractions(timed):
  timeline, rollouts, _ = timed
  summary = timeline.summary()
  fractions = {name: value for name, value in summary.items() if not name.endswith("per_s")}
  assert all(0 <= value <= 1 for value in fractions.values()), fractions
  assert summary["decode_tokens_per_s"] > 0
  assert summary["prefill_tokens_per_s"] > 0
  drawn = [i for t in flat(rollouts) for i in t.images[t.prompt_images :]]
  requested = sum(len(p.images) for p in prompts()) + len(drawn)
  assert timeline.images_requested == requested
  assert summary["image_cache_hits"] == pytest.approx(1 - timeline.images_encoded / requested)


def test_summary_of_a_timeline_by_hand():
  """A prefill, then two chunks of two slots with two rows each."""
  timeline = Timeline()
  decode = [ProgramSpan("decode", 1.0, 2.0, 30, 40), ProgramSpan("decode", 2.0, 4.0, 10, 40)]
  timeline.programs = [ProgramSpan("prefill", 0.0, 0.5, 50, 100), *decode]
  timeline.chunks = [
    ChunkRecord(decode[0], 4, 2, (2, 2), (0, 0)),
    ChunkRecord(decode[1], 4, 2, (1, 0), (0, 1)),
  ]
  timeline.total_s, timeline.drawing_wait_s, timeline.check_s = 5.0, 0.5, 0.05
  timeline.images_requested, timeline.images_encoded = 8, 2
  timeline.violations = ["task a sample 0: token 3 is trained"]
  assert timeline.summary() == pytest.approx(
    {
      "prefill_tokens_per_s": 100.0,
      "decode_tokens_per_s": 40 / 3,
      "slot_occupancy": (4 * 1.0 + 1 * 2.0) / (4 * 3.0),
      "padded_share": 0.5,
      "drawing_wait_share": 0.1,
      "device_idle_share": 0.3,
      "image_cache_hits": 0.75,
      "trajectory_check_share": 0.01,
      "trajectory_violations": 1.0,
    }
  )


def test_late_drawings_are_waited_for_and_equal_images_are_encoded_once(all_turns_draw):
  engine = dataclasses.replace(engine_for(ROLLOUT), executor=LateExecutor(0))
  with Timeline() as timeline:
    rollouts = run_rollouts(engine=engine, sampling_params=[GREEDY] * 2, timeline=timeline)
  assert 0 < timeline.drawing_wait_s < timeline.total_s
  requested = [i.content_hash for t in flat(rollouts) for i in t.images[t.prompt_images :]]
  requested += [i.content_hash for p in prompts() for i in p.images]
  distinct = len(set(requested))
  assert timeline.images_encoded == distinct < len(requested), "greedy rollouts draw the same"
  assert timeline.summary()["image_cache_hits"] == pytest.approx(1 - distinct / len(requested))


def test_timeline_changes_no_bit(timed):
  _, rollouts, _ = timed
  assert_same(rollouts, run_rollouts(TWO_SLOTS), atol=0)


def test_record_can_be_plotted(timed):
  timeline, _, _ = timed
  record = json.loads(json.dumps(timeline.record()))
  assert {len(chunk["active"]) for chunk in record["chunks"]} == {2}
  assert all(
    max(chunk["active"]) + max(chunk["drawing"]) <= 2 * chunk["group"] for chunk in record["chunks"]
  )
  assert any(sum(chunk["drawing"]) for chunk in record["chunks"]), "some rollouts draw"
  assert "<svg" in timeline_plot.timeline_figure(record)


def test_programs_that_never_ended_are_left_out():
  with Timeline() as timeline:
    span = timeline.submitted("decode", 0, 5, 10)  # pyright: ignore[reportArgumentType]
  span.end_s = math.nan
  assert timeline.record()["programs"] == []
  assert timeline.summary()["decode_tokens_per_s"] == 0
