"""Sampled tokens per second: this engine beside transformers, and beside itself without its parts.

    python -m benchmarks.rollout [--case=image|frames|drawing] [--shape=nano] [--repeats=5]

image    8 prompts x 8 samples, one image of 256 tokens, 128 new tokens for every row
frames   4 prompts x 8 samples, 16 images of 256 tokens, 64 new tokens for every row
drawing  16 prompts x 8 samples in 32 rows, one image of 64 tokens, 1 to 6 turns of a length drawn
         from exp(N(4, 1)), at most 256 tokens: half below 55, one in ten above 197. Every turn but
         the last draws one box on the image and looks at it: 64 visual tokens more.

Prompts have 64 tokens of text. `torch` is generate() with num_return_sequences; `torch prefix` runs
tower and prompt once and copies the cache for the samples. Of the engine's parts,

a prompt per sample   every rollout reads its prompt and keeps it for itself
no refill             four groups have the 32 rows until all of them have ended; else a rollout
                      takes the row of any that has, and prompts of eight groups lie on the device
turn barrier          neither refill nor drawing beside decoding: all rows wait for the slowest turn
no row leaves         likewise, and rows that wait are decoded along, as in a batch of fixed rows
"""

import contextlib
import functools
import pathlib
import unittest.mock
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import transformers
from absl import app, flags

from benchmarks import measure, peer, shapes
from benchmarks.measure import Benchmark, Timed
from spatial_jax import compiled
from spatial_jax.data.prompt_text import TextConfig
from spatial_jax.data.tokenizer import IM_END
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.drawing.parser import Coordinates, Limits, Parsed
from spatial_jax.drawing.termination import StopLimits
from spatial_jax.hf import weights
from spatial_jax.rollout import request as rows_lib
from spatial_jax.rollout.config import RolloutConfig, SamplingParams
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.profiling import Timeline
from spatial_jax.rollout.scheduler import generate_rollouts
from spatial_jax.types import Operation, Prompt, Rollouts, Task


class Case(NamedTuple):
  """Prompts, images of each and their sides, groups with rows, turns, most tokens of one."""

  prompts: int
  images: int
  side_px: int
  slots: int
  turns: int
  max_tokens_per_turn: int


CASES = {
  "image": Case(shapes.PROMPTS, 1, 448, shapes.PROMPTS, 1, shapes.RESPONSE),
  "frames": Case(4, 16, 448, 4, 1, 64),
  "drawing": Case(16, 1, 224, 4, 6, 256),
}
CASE = flags.DEFINE_enum("case", "image", list(CASES), "what is sampled")
SHARES = (0.75, 0.5, 0.25)  # of the rows, decoded by themselves
CUT = 170  # tokens in a block of a row's own cache
COMPARED = 2  # prompts whose samples torch scores again
TOLERANCE = 1e-3  # of a log-probability, float32
MODE = SamplingParams(
  temperature=1.0, greedy=False, top_k=0, top_p=1.0, min_p=0.0, max_tokens_per_turn=0
)
STYLE = Style(line_px=4, dot_px=4, font_px=10, label_offset_px=(8, 6))


# --- ours --------------------------------------------------------------------------------------


class Parts(NamedTuple):
  """What an engine has: shared prompts, refill, drawing beside decoding, rows that leave."""

  shared: bool = True
  refill: bool = True
  beside: bool = True
  leave: bool = True


class Ours:
  """The engine of training; but any id is a word, and turns end where they are cut."""

  def __init__(self, folder: pathlib.Path, has: Parts = Parts()):
    cfg, case = weights.read_config(folder), CASES[CASE.value]
    policy = shapes.policy_of(cfg)
    self._config = rollout_config(case, has)
    conversation = Conversation(shapes.tokenizer(cfg), _text(), shapes.PREPROCESS, cfg)
    stop = shapes.stop_id(cfg)
    run = compiled.rollout_programs(policy, self._config, shapes.forbidden_ids(cfg), (stop,))
    executor = Executor(ExecutorConfig(1, 20.0, 1024), STYLE)
    self.engine = Engine(conversation, run, executor, self._config, (stop,))
    self.weights = compiled.decode_params(policy, compiled.train_mesh(policy), "compute")(
      shapes.load(folder, policy)
    )
    copies = 1 if has.shared else shapes.GROUP
    questions = shapes.questions(cfg, case.prompts, case.images, case.side_px)
    self._prompts = [
      prompt(question, f"question/{i}/{copy}")
      for i, question in enumerate(questions)
      for copy in range(copies)
    ]
    self._at_once = len(self._prompts) if has.refill else self._config.slots
    self._calls = 0

  def __call__(self, timeline: Timeline | None = None) -> Rollouts:
    """Samples all rollouts."""
    self._calls += 1
    rollouts: Rollouts = []
    with self.engine.executor, forced_turns():
      for first in range(0, len(self._prompts), self._at_once):
        some, sampling_params = (
          self._prompts[first : first + self._at_once],
          [MODE] * self._config.group,
        )
        rollouts += generate_rollouts(
          self.engine, self.weights, some, self._calls, 0, sampling_params, timeline=timeline
        )
    said = sum(int(t.trained_T.sum()) for group in rollouts for t in group)
    stated = sum(map(sum, all_lengths(CASES[CASE.value])))
    measure.require_close("tokens sampled, beside those stated,", abs(said - stated), 0)
    return rollouts


def rollout_config(case: Case, has: Parts) -> RolloutConfig:
  """Of one case."""
  group = shapes.GROUP if has.shared else 1
  refilled = case.turns > 1 and has.refill
  prompts = 2 * case.slots if refilled else case.slots  # that lie on the device
  tokens = (case.side_px // 28) ** 2
  windows, look = tokens // 16, tokens + 32  # words around a drawing: fewer than 32
  size = shapes.TEXT_BEFORE + shapes.TEXT_BEHIND + (tokens + 2) * case.images
  own = max(sum(lengths) + (len(lengths) - 1) * look for lengths in all_lengths(case))
  chunk = 4 if case.turns > 1 and has.beside else 16  # the fastest of 4, 8 and 16 for each
  return RolloutConfig(
    prompts=case.prompts,
    group=group,
    slots=prompts * shapes.GROUP // group,
    rows=case.slots * shapes.GROUP,
    prefill=tuple(sorted({1, min(case.slots * shapes.GROUP // group, 8)})),
    append=(1, 2),
    decode_steps=chunk,
    gather_fractions=SHARES if case.turns > 1 and has.leave else (),
    schedule="logical" if has.beside else "barrier",
    drawing_delay=1,
    weights="compute",
    sampling=MODE,
    max_tokens_per_turn=case.max_tokens_per_turn,
    stop=StopLimits(case.turns, 8 * case.images, 8 * case.images * tokens, own),
    stop_tokens=(IM_END,),
    stop_strings=(),
    limits=Limits(1, 1, 1, 1, 1, 1),
    prompt_buckets=(size,),
    observation_buckets=(look,),
    suffix_block_edges=(own // 2,) if case.turns == 1 else tuple(range(CUT, own, CUT)),
    feature_buffer_tokens=tokens * (case.images * prompts + 64),
    vision=VisionBuckets((windows, 2 * windows, 8 * windows), (1, 2, 8), (4 * tokens,)),
  )


def prompt(question: shapes.Question, name: str) -> Prompt:
  """A question as the engine takes it."""
  pixels = tuple(image.pixels for image in question.images)
  task = Task(name, "camera_distance", "", None, "1", "number", pixels, "", "", None, ())
  return Prompt(
    task,
    question.token_ids_T,
    question.position_TA,
    question.next_position,
    question.images,
    question.image_starts,
  )


def _text() -> TextConfig:
  """Few words around a drawing."""
  return TextConfig("", "", "{question}", "", "", "", "more", "final", "", 0.0)


@functools.cache
def forced_lengths(case: Case, name: str) -> tuple[int, ...]:
  """Tokens of each turn of a rollout."""
  if case.turns == 1:
    return (case.max_tokens_per_turn,)
  random = np.random.default_rng(zlib.crc32(name.encode()))
  count = int(random.integers(1, case.turns + 1))
  drawn = np.exp(random.normal(4.0, 1.0, count)).astype(int)
  return tuple(np.clip(drawn, 1, case.max_tokens_per_turn).tolist())


def all_lengths(case: Case) -> list[tuple[int, ...]]:
  """Of every rollout of a call."""
  return [
    forced_lengths(case, f"{number}/{sample}")
    for number in range(case.prompts)
    for sample in range(shapes.GROUP)
  ]


@contextlib.contextmanager
def forced_turns() -> Iterator[None]:
  """Turns as long, and as many, as the case says; all but the last draw a box."""
  case = CASES[CASE.value]

  def turn_limit(engine: Engine, row: rows_lib.Row) -> int:
    return planned(row)[len(row.parsed)]

  def parse(text: str, coordinates: Coordinates, limits: Limits) -> Parsed:
    corner = float(zlib.crc32(text.encode()) % 100)
    box = Operation("box", 1, (corner, corner, corner + 100, corner + 50), "thing")
    return Parsed((box,), (), None, False)

  def end_turn(engine: Engine, row: rows_lib.Row, step: int) -> None:
    original(engine, row, step)
    row.reason = "token_limit" if len(row.parsed) == len(planned(row)) else None

  def planned(row: rows_lib.Row) -> tuple[int, ...]:
    _, number, copy = row.episode.prompt.task.task_id.split("/")
    return forced_lengths(case, f"{number}/{row.episode.sample + int(copy)}")

  original = rows_lib.end_turn
  with (
    unittest.mock.patch.object(rows_lib, "turn_limit", turn_limit),
    unittest.mock.patch.object(rows_lib, "parse", parse),
    unittest.mock.patch.object(rows_lib, "end_turn", end_turn),
  ):
    yield


# --- torch -------------------------------------------------------------------------------------


class Torch:
  """`generate` with one prompt expanded to its samples: each image is encoded once."""

  def __init__(self, folder: pathlib.Path, cache: str = "dynamic", compiles: bool = False):
    self.cache, self.compiled = cache, transformers.CompileConfig() if compiles else None
    if self.compiled:
      self.compiled._compile_all_devices = True  # it would not compile on a CPU
    cfg, case = weights.read_config(folder), CASES[CASE.value]
    self.model = peer.load(folder).eval()
    self.questions = shapes.questions(cfg, case.prompts, case.images, case.side_px)
    self.inputs = peer.prompt_tensors(cfg, self.questions)
    self.forbidden_ids, self.length = list(shapes.forbidden_ids(cfg)), case.max_tokens_per_turn

  def __call__(self) -> np.ndarray:
    """Samples; tokens int64 [R, response]."""
    with torch.no_grad():
      out_RT = self.model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        **self.inputs,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=shapes.GROUP,
        min_new_tokens=self.length,
        max_new_tokens=self.length,
        suppress_tokens=self.forbidden_ids,
        cache_implementation=self.cache,
        disable_compile=self.compiled is None,
        compile_config=self.compiled,
      )
    return out_RT[:, self.inputs["input_ids"].shape[1] :].numpy()


class TorchPrefix(Torch):
  """Tower and prompt once for all samples, the cache copied, then token by token."""

  def __call__(self) -> np.ndarray:
    positions = np.stack([question.position_TA for question in self.questions])
    position_ABT = torch.tensor(positions.transpose(2, 0, 1)).long()
    following_R = torch.tensor([q.next_position for q in self.questions]).repeat_interleave(
      shapes.GROUP
    )
    with torch.no_grad():
      out = self.model.model(**self.inputs, position_ids=position_ABT, use_cache=True)
      cache = out.past_key_values
      cache.batch_repeat_interleave(shapes.GROUP)
      hidden_RD = out.last_hidden_state[:, -1].repeat_interleave(shapes.GROUP, 0)
      tokens = []
      for step in range(self.length):
        logits_RV = self.model.lm_head(hidden_RD)
        logits_RV[:, self.forbidden_ids] = -torch.inf
        tokens.append(torch.multinomial(logits_RV.softmax(-1), 1))
        position_AR1 = (following_R + step)[None, :, None].expand(3, -1, -1)
        out = self.model.model(
          input_ids=tokens[-1], position_ids=position_AR1, past_key_values=cache, use_cache=True
        )
        hidden_RD = out.last_hidden_state[:, -1]
    return torch.cat(tokens, dim=1).numpy()


# --- both --------------------------------------------------------------------------------------

NO_REFILL = Parts(refill=False)
BARRIER = NO_REFILL._replace(beside=False)
WORDS = {
  "ours": Ours,
  "a prompt per sample": functools.partial(Ours, has=Parts(shared=False)),
  "torch": Torch,
  "torch static cache": functools.partial(Torch, cache="static"),
  "torch compiled": functools.partial(Torch, cache="static", compiles=True),
  "torch prefix": TorchPrefix,
}
DRAWING = {
  "ours": Ours,
  "no refill": functools.partial(Ours, has=NO_REFILL),
  "turn barrier": functools.partial(Ours, has=BARRIER),
  "no row leaves": functools.partial(Ours, has=BARRIER._replace(leave=False)),
}


def sides() -> dict[str, Callable[[pathlib.Path], Callable[[], object]]]:
  """Those of this run."""
  return measure.chosen(DRAWING if CASE.value == "drawing" else WORDS)


def time(folder: pathlib.Path) -> Timed:
  """All sides in turn; torch scores what ours sampled, and must agree on its log-probabilities."""
  calls: dict[str, Callable[[], object]] = {side: make(folder) for side, make in sides().items()}
  results = {side: call() for side, call in calls.items()}
  differences = {}
  theirs = calls.get("torch")
  if isinstance(theirs, Torch) and "ours" in results and CASES[CASE.value].images == 1:
    difference = _difference(folder, theirs, results["ours"])  # pyright: ignore[reportArgumentType]
    name = "log-probabilities of our samples, as recorded and as torch scores them,"
    measure.require_close(name, difference, TOLERANCE)
    differences[name] = difference
  return Timed(measure.alternate(calls, measure.REPEATS.value), differences)


def _difference(folder: pathlib.Path, theirs: Torch, rollouts: Rollouts) -> float:
  """Between recorded log-probabilities and torch's, of the responses of the first prompts."""
  cfg, most = weights.read_config(folder), 0.0
  for question, group in zip(theirs.questions[:COMPARED], rollouts, strict=False):
    said_RT = np.stack([t.token_ids_T[t.trained_T] for t in group])
    recorded_RT = np.stack([t.logp_T[t.trained_T] for t in group])
    with torch.no_grad():
      rows = peer.rows(cfg, question, said_RT)
      scored_RT = peer.logprobs(theirs.model, rows, chunked=True, share_image=True).numpy()
    most = max(most, float(np.abs(scored_RT - recorded_RT).max()))
  return most


def main(argv: list[str]) -> None:
  """Measures and prints."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  case = CASES[CASE.value]
  tokens = (case.side_px // 28) ** 2
  measure.run(
    Benchmark(
      title=f"Rollout, {CASE.value}: {case.prompts} prompts x {shapes.GROUP} samples, "
      f"{case.images} x {tokens} visual tokens, "
      f"up to {case.turns} turns of {case.max_tokens_per_turn} tokens",
      unit="tokens",
      tokens=sum(map(sum, all_lengths(case))),
      sides=tuple(sides()),
      time=time,
      load=lambda side, folder: sides()[side](folder),
      notes=(
        "Included on all sides: vision tower (each image once), prefill, sampling; ours also "
        "text, log-probabilities, drawing. Left out: pixels to patches of the prompts, loading.",
      ),
    )
  )


if __name__ == "__main__":
  app.run(main)
