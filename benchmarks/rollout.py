"""Sampled tokens per second: this engine, transformers, and this engine without some of its parts.

    python -m benchmarks.rollout [--case=image|frames|drawing] [--shape=nano] [--repeats=5]

image    8 prompts x 8 samples, one image of 256 tokens, 128 new tokens in every row
frames   4 prompts x 8 samples, 16 images of 256 tokens, 64 new tokens in every row
drawing  16 prompts x 8 samples in 32 rows, one image of 64 tokens, 1 to 6 turns; the length of a
         turn is drawn from exp(N(4, 1)), at most 256 tokens: half are below 55, one in ten is above
         197. Every turn but the last draws one box on the image: 64 visual tokens more.

Prompts have 64 tokens of text. `torch` is generate() with num_return_sequences; `torch prefix` runs
vision tower and prompt once and copies the cache for the samples. Variants of the engine:

a prompt per sample   every rollout prefills its prompt and has its own prefix cache
no refill             four groups use the 32 rows until all of them have ended; otherwise a rollout
                      takes the row of any that ended, and prompts of eight groups are prefilled
turn barrier          no refill, and drawings wait until no row samples
no gathered rows      turn barrier, and rows that wait are decoded too, as in a batch of fixed rows
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
from spatial_jax.data.chat_template import CHATML
from spatial_jax.data.prompt_form import PromptForm
from spatial_jax.data.prompt_text import TextConfig
from spatial_jax.data.tokenizer import IM_END
from spatial_jax.data.vision_packing import VisionBuckets
from spatial_jax.drawing.canvas import Style
from spatial_jax.drawing.executor import Executor, ExecutorConfig
from spatial_jax.drawing.parser import Coordinates, Limits, Parsed
from spatial_jax.drawing.termination import StopLimits
from spatial_jax.grammar import VILASR, Grammar
from spatial_jax.hf import weights
from spatial_jax.rollout import request as request_lib
from spatial_jax.rollout.config import RolloutConfig, SamplingParams
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.engine import Engine
from spatial_jax.rollout.profiling import Timeline
from spatial_jax.rollout.request import Request
from spatial_jax.rollout.scheduler import RolloutJob, generate_rollouts
from spatial_jax.types import ImageRef, Operation, Prompt, Rollouts, Task


class Case(NamedTuple):
  """What is sampled.

  Attributes:
    prompts: number of prompts.
    images, side_px: images per prompt, and their side.
    slots: groups that have rows at a time.
    turns: maximum number of turns.
    max_tokens_per_turn: limit of a turn, tokens.
  """

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
GATHER_FRACTIONS = (0.75, 0.5, 0.25)
BLOCK = 170  # tokens in a block of the suffix cache
COMPARED = 2  # prompts whose samples torch scores too
TOLERANCE = 1e-3  # of a log-probability, float32
SAMPLING = SamplingParams(
  temperature=1.0, greedy=False, top_k=0, top_p=1.0, min_p=0.0, max_tokens_per_turn=0
)
STYLE = Style(line_px=4, dot_px=4, font_px=10, label_offset_px=(8, 6))


# --- ours --------------------------------------------------------------------------------------


class Parts(NamedTuple):
  """Parts of the engine: shared prompts, refill, drawing during decoding, gathered rows."""

  shared: bool = True
  refill: bool = True
  overlap: bool = True
  gather: bool = True


class Ours:
  """The engine of training; every id decodes to text, and turns have the lengths of the case."""

  def __init__(self, folder: pathlib.Path, parts: Parts = Parts()):
    cfg, case = weights.read_config(folder), CASES[CASE.value]
    policy = shapes.policy_of(cfg)
    self._config = rollout_config(case, parts)
    tokenizer = shapes.tokenizer(cfg)
    conversation = Conversation(tokenizer, _form(), CHATML, shapes.PREPROCESS, shapes.VIDEO, cfg)
    stop = shapes.stop_id(cfg)
    programs = compiled.rollout_programs(policy, self._config, shapes.forbidden_ids(cfg), (stop,))
    executor = Executor(ExecutorConfig(1, 20.0, 1024), STYLE)
    self.engine = Engine(conversation, programs, executor, self._config, (stop,))
    self.weights = compiled.decode_params(policy, compiled.train_mesh(policy), "compute")(
      shapes.load(folder, policy)
    )
    copies = 1 if parts.shared else shapes.GROUP
    questions = shapes.questions(cfg, case.prompts, case.images, case.side_px)
    self._prompts = [
      prompt(question, f"question/{i}/{copy}")
      for i, question in enumerate(questions)
      for copy in range(copies)
    ]
    self._prompts_per_call = len(self._prompts) if parts.refill else self._config.slots
    self._calls = 0

  def __call__(self, timeline: Timeline | None = None) -> Rollouts:
    """Samples all rollouts."""
    self._calls += 1
    rollouts: Rollouts = []
    with self.engine.executor, forced_turns():
      for first in range(0, len(self._prompts), self._prompts_per_call):
        job = RolloutJob(
          prompts=self._prompts[first : first + self._prompts_per_call],
          seed=self._calls,
          step=0,
          sampling_params=[SAMPLING] * self._config.group,
          timeline=timeline,
        )
        rollouts += generate_rollouts(self.engine, self.weights, job)
    sampled = sum(int(t.trained_T.sum()) for group in rollouts for t in group)
    stated = sum(map(sum, all_lengths(CASES[CASE.value])))
    measure.require_close("tokens sampled and tokens stated", abs(sampled - stated), 0)
    return rollouts


def rollout_config(case: Case, parts: Parts) -> RolloutConfig:
  """Returns the config of one case."""
  group = shapes.GROUP if parts.shared else 1
  refilled = case.turns > 1 and parts.refill
  prompts = 2 * case.slots if refilled else case.slots  # in the prefix cache
  tokens = (case.side_px // 28) ** 2
  windows, observation = tokens // 16, tokens + 32  # fewer than 32 tokens of text per drawing
  size = shapes.TEXT_BEFORE + shapes.TEXT_AFTER + (tokens + 2) * case.images
  response = max(sum(lengths) + (len(lengths) - 1) * observation for lengths in all_lengths(case))
  # The fastest of 4, 8 and 16 for each.
  decode_steps = 4 if case.turns > 1 and parts.overlap else 16
  return RolloutConfig(
    prompts=case.prompts,
    group=group,
    slots=prompts * shapes.GROUP // group,
    rows=case.slots * shapes.GROUP,
    prefill=tuple(sorted({1, min(case.slots * shapes.GROUP // group, 8)})),
    append=(1, 2),
    decode_steps=decode_steps,
    gather_fractions=GATHER_FRACTIONS if case.turns > 1 and parts.gather else (),
    schedule="logical" if parts.overlap else "barrier",
    drawing_delay=1,
    weights="compute",
    sampling=SAMPLING,
    max_tokens_per_turn=case.max_tokens_per_turn,
    stop=StopLimits(case.turns, 8 * case.images, 8 * case.images * tokens, response, 0.0),
    stop_tokens=(IM_END,),
    stop_strings=(),
    limits=Limits(1, 1, 1, 1, 1, 1),
    prompt_buckets=(size,),
    observation_buckets=(observation,),
    suffix_block_edges=(
      (response // 2,) if case.turns == 1 else tuple(range(BLOCK, response, BLOCK))
    ),
    feature_buffer_tokens=tokens * (case.images * prompts + 64),
    vision=VisionBuckets((windows, 2 * windows, 8 * windows), (1, 2, 8), (4 * tokens,)),
  )


def prompt(question: shapes.Question, name: str) -> Prompt:
  """Returns a question as a prompt of the engine."""
  media = tuple(ImageRef(image.pixels) for image in question.images)
  task = Task(name, "camera_distance", "", None, "1", "number", None, media, "", "", None, ())
  return Prompt(
    task,
    question.token_ids_T,
    question.position_TA,
    question.next_position,
    question.images,
    question.image_starts,
    VILASR,
  )


def _form() -> PromptForm:
  """Short texts around a drawing."""
  text = TextConfig("", "", "{question}", "", "", "", "", "", "more", "final")
  return PromptForm(text, VILASR)


@functools.cache
def forced_lengths(case: Case, name: str) -> tuple[int, ...]:
  """Returns the number of tokens of each turn of a rollout."""
  if case.turns == 1:
    return (case.max_tokens_per_turn,)
  random = np.random.default_rng(zlib.crc32(name.encode()))
  count = int(random.integers(1, case.turns + 1))
  drawn = np.exp(random.normal(4.0, 1.0, count)).astype(int)
  return tuple(np.clip(drawn, 1, case.max_tokens_per_turn).tolist())


def all_lengths(case: Case) -> list[tuple[int, ...]]:
  """Returns `forced_lengths` of every rollout of a call."""
  return [
    forced_lengths(case, f"{number}/{sample}")
    for number in range(case.prompts)
    for sample in range(shapes.GROUP)
  ]


@contextlib.contextmanager
def forced_turns() -> Iterator[None]:
  """Forces the number and lengths of turns of the case; all turns but the last draw a box."""
  case, original = CASES[CASE.value], request_lib.end_turn

  def next_turn_limit(engine: Engine, request: Request) -> int:
    return lengths_of(request)[len(request.parsed)]

  def parse(text: str, coordinates: Coordinates, limits: Limits, grammar: Grammar) -> Parsed:
    corner = float(zlib.crc32(text.encode()) % 100)
    box = Operation("box", 1, (corner, corner, corner + 100, corner + 50), "thing")
    return Parsed((box,), (), None, False)

  def end_turn(engine: Engine, request: Request, policy_step: int) -> None:
    original(engine, request, policy_step)
    is_last = len(request.parsed) == len(lengths_of(request))
    request.end_reason = "token_limit" if is_last else None

  def lengths_of(request: Request) -> tuple[int, ...]:
    _, number, copy = request.builder.prompt.task.task_id.split("/")
    return forced_lengths(case, f"{number}/{request.builder.sample + int(copy)}")

  with (
    unittest.mock.patch.object(request_lib, "next_turn_limit", next_turn_limit),
    unittest.mock.patch.object(request_lib, "parse", parse),
    unittest.mock.patch.object(request_lib, "end_turn", end_turn),
  ):
    yield


# --- torch -------------------------------------------------------------------------------------


class Torch:
  """`generate` with one prompt expanded to its samples, so that each image is encoded once."""

  def __init__(self, folder: pathlib.Path, cache: str = "dynamic", compiles: bool = False):
    self.cache, self.compiled = cache, transformers.CompileConfig() if compiles else None
    if self.compiled:
      self.compiled._compile_all_devices = True  # otherwise it does not compile on a CPU
    cfg, case = weights.read_config(folder), CASES[CASE.value]
    self.model = peer.load(folder).eval()
    self.questions = shapes.questions(cfg, case.prompts, case.images, case.side_px)
    self.inputs = peer.prompt_tensors(cfg, self.questions)
    self.forbidden_ids, self.length = list(shapes.forbidden_ids(cfg)), case.max_tokens_per_turn

  def __call__(self) -> np.ndarray:
    """Samples; returns tokens int64 [R, response]."""
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
  """Vision tower and prompt once for all samples, a copied cache, then token by token."""

  def __call__(self) -> np.ndarray:
    positions = np.stack([question.position_TA for question in self.questions])
    position_ABT = torch.tensor(positions.transpose(2, 0, 1)).long()
    next_R = torch.tensor([q.next_position for q in self.questions]).repeat_interleave(shapes.GROUP)
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
        position_AR1 = (next_R + step)[None, :, None].expand(3, -1, -1)
        out = self.model.model(
          input_ids=tokens[-1], position_ids=position_AR1, past_key_values=cache, use_cache=True
        )
        hidden_RD = out.last_hidden_state[:, -1]
    return torch.cat(tokens, dim=1).numpy()


# --- both --------------------------------------------------------------------------------------

NO_REFILL = Parts(refill=False)
BARRIER = NO_REFILL._replace(overlap=False)
IMAGE_SIDES = {
  "ours": Ours,
  "a prompt per sample": functools.partial(Ours, parts=Parts(shared=False)),
  "torch": Torch,
  "torch static cache": functools.partial(Torch, cache="static"),
  "torch compiled": functools.partial(Torch, cache="static", compiles=True),
  "torch prefix": TorchPrefix,
}
DRAWING_SIDES = {
  "ours": Ours,
  "no refill": functools.partial(Ours, parts=NO_REFILL),
  "turn barrier": functools.partial(Ours, parts=BARRIER),
  "no gathered rows": functools.partial(Ours, parts=BARRIER._replace(gather=False)),
}


def sides() -> dict[str, Callable[[pathlib.Path], Callable[[], object]]]:
  """Returns the sides of this run."""
  return measure.chosen(DRAWING_SIDES if CASE.value == "drawing" else IMAGE_SIDES)


def time(folder: pathlib.Path) -> Timed:
  """Times all sides in turn; torch scores our samples and must agree on their log-probabilities."""
  calls: dict[str, Callable[[], object]] = {side: make(folder) for side, make in sides().items()}
  results = {side: call() for side, call in calls.items()}
  differences = {}
  theirs = calls.get("torch")
  if isinstance(theirs, Torch) and "ours" in results and CASES[CASE.value].images == 1:
    difference = _difference(folder, theirs, results["ours"])  # pyright: ignore[reportArgumentType]
    name = "log-probabilities of our samples, recorded and scored by torch,"
    measure.require_close(name, difference, TOLERANCE)
    differences[name] = difference
  return Timed(measure.alternate(calls, measure.REPEATS.value), differences)


def _difference(folder: pathlib.Path, theirs: Torch, rollouts: Rollouts) -> float:
  """Largest difference between recorded log-probabilities and those of torch, first prompts."""
  cfg, most = weights.read_config(folder), 0.0
  for question, group in zip(theirs.questions[:COMPARED], rollouts, strict=False):
    sampled_RT = np.stack([t.token_ids_T[t.trained_T] for t in group])
    recorded_RT = np.stack([t.logp_T[t.trained_T] for t in group])
    with torch.no_grad():
      rows = peer.rows(cfg, question, sampled_RT)
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
