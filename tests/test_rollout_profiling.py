"""The engine's instruments: they see all that ran, and change nothing of it."""

import dataclasses
import json
import math

import pytest

from spatial_jax.report import plots
from spatial_jax.rollout.profiling import Frame, Span, Timeline
from spatial_jax.rollout.scheduler import generate_rollouts
from tests.rollout_fixtures import GREEDY, ROLLOUT, SAMPLED, flat
from tests.test_rollout_engine import engine_of, everybody_draws, lab, said
from tests.test_rollout_scheduler import LateExecutor, assert_same, counted, prompts

__all__ = ["everybody_draws"]  # a fixture


@pytest.fixture
def watched(everybody_draws):
  """A call with two slots for five prompts: its timeline, its rollouts, the programs it ran."""
  engine, calls = counted(engine_of(dataclasses.replace(ROLLOUT, slots=2)))
  with Timeline() as timeline:
    rollouts = generate_rollouts(
      engine, lab()[2], prompts(), 1, 3, [SAMPLED] * 2, timeline=timeline
    )
  return timeline, rollouts, calls


def test_every_program_is_seen_in_its_order(watched):
  timeline, _, calls = watched
  names = {
    "encode_images": "encode_images",
    "prefill": "prefill",
    "sample": "decode",
    "append": "append",
  }
  expected = [names[name] for name, *_ in calls if name != "start_rows"]
  assert [span.program for span in timeline.spans] == expected
  ends = [span.end_s for span in timeline.spans]
  assert ends == sorted(ends)
  assert all(span.start_s <= span.end_s <= timeline.total_s for span in timeline.spans)
  assert len(timeline.frames) == sum(name == "sample" for name, *_ in calls)


def test_tokens_are_those_of_the_rollouts(watched):
  timeline, rollouts, _ = watched

  def tokens(program):
    return sum(span.tokens for span in timeline.spans if span.program == program)

  heard = sum(span.tokens for span in timeline.spans[:-1] if span.program == "decode")
  assert heard <= sum(len(said(t)) for t in flat(rollouts)) == tokens("decode")
  assert tokens("prefill") == sum(len(p.token_ids_T) for p in prompts())
  drawn = {i.content_hash: i.tokens for t in flat(rollouts) for i in t.images}
  assert tokens("encode_images") == sum(drawn.values()), "each image once"
  assert all(span.tokens <= span.places for span in timeline.spans)
  observed = sum(len(t.token_ids_T) - t.prompt_length - len(said(t)) for t in flat(rollouts))
  assert tokens("append") == observed


def test_the_summary_is_of_shares_and_rates(watched):
  timeline, rollouts, _ = watched
  summary = timeline.summary()
  shares = {name: value for name, value in summary.items() if not name.endswith("per_s")}
  assert all(0 <= value <= 1 for value in shares.values()), shares
  assert summary["decode_tokens_per_s"] > 0
  assert summary["prefill_tokens_per_s"] > 0
  images = [i for t in flat(rollouts) for i in t.images[t.prompt_images :]]
  asked = sum(len(p.images) for p in prompts()) + len(images)
  assert timeline.pictures_asked == asked
  assert summary["image_cache_hits"] == pytest.approx(1 - timeline.pictures_seen / asked)


def test_the_summary_adds_up():
  """Two chunks of two slots with two rows each, a prefill before them, by hand."""
  timeline = Timeline()
  decode = [Span("decode", 1.0, 2.0, 30, 40), Span("decode", 2.0, 4.0, 10, 40)]
  timeline.spans = [Span("prefill", 0.0, 0.5, 50, 100), *decode]
  timeline.frames = [Frame(decode[0], 4, 2, (2, 2), (0, 0)), Frame(decode[1], 4, 2, (1, 0), (0, 1))]
  timeline.total_s, timeline.waited_s = 5.0, 0.5
  timeline.pictures_asked, timeline.pictures_seen = 8, 2
  assert timeline.summary() == pytest.approx(
    {
      "prefill_tokens_per_s": 100.0,
      "decode_tokens_per_s": 40 / 3,
      "slot_occupancy": (4 * 1.0 + 1 * 2.0) / (4 * 3.0),
      "padded_share": 0.5,
      "drawing_wait_share": 0.1,
      "device_idle_share": 0.3,
      "image_cache_hits": 0.75,
    }
  )


def test_late_drawings_are_waited_for_and_equal_pictures_seen_once(everybody_draws):
  engine = dataclasses.replace(engine_of(ROLLOUT), executor=LateExecutor(0))
  with Timeline() as timeline:
    rollouts = generate_rollouts(engine, lab()[2], prompts(), 1, 3, [GREEDY] * 2, timeline=timeline)
  assert 0 < timeline.waited_s < timeline.total_s
  asked = [i.content_hash for t in flat(rollouts) for i in t.images[t.prompt_images :]]
  asked += [i.content_hash for p in prompts() for i in p.images]
  assert timeline.pictures_seen == len(set(asked)) < len(asked), "greedy rollouts draw the same"
  assert timeline.summary()["image_cache_hits"] == pytest.approx(1 - len(set(asked)) / len(asked))


def test_watching_changes_nothing(watched):
  _, rollouts, _ = watched
  engine = engine_of(dataclasses.replace(ROLLOUT, slots=2))
  assert_same(rollouts, generate_rollouts(engine, lab()[2], prompts(), 1, 3, [SAMPLED] * 2), atol=0)


def test_its_record_is_a_picture(watched):
  timeline, _, _ = watched
  record = json.loads(json.dumps(timeline.record()))
  assert {len(chunk["active"]) for chunk in record["chunks"]} == {2}
  assert all(
    max(chunk["active"]) + max(chunk["drawing"]) <= 2 * chunk["group"] for chunk in record["chunks"]
  )
  assert any(sum(chunk["drawing"]) for chunk in record["chunks"]), "nobody is seen to draw"
  svg = plots.timeline_figure(record)
  assert svg.startswith("<svg")
  assert "decoding" in svg


def test_a_program_that_never_ended_is_left_out():
  with Timeline() as timeline:
    span = timeline.submitted("decode", 0, 5, 10)  # pyright: ignore[reportArgumentType]
  span.end_s = math.nan
  assert timeline.record()["programs"] == []
  assert timeline.summary()["decode_tokens_per_s"] == 0
