"""Small random objects of every kind that crosses a stage: valid and reproducible."""

import hashlib
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from spatial_jax.data.media import image_size, read_pixels
from spatial_jax.evaluate.bootstrap import bootstrap_interval, paired_interval
from spatial_jax.evaluate.results import Paired, ResultColumn, ResultRow, ResultTable, write_results
from spatial_jax.grammar import VILASR
from spatial_jax.learn.advantage import AdvantageConfig, advantage
from spatial_jax.report.reward_card import RewardCard
from spatial_jax.reward.compose import score
from spatial_jax.reward.config import accuracy_reward
from spatial_jax.reward.snra import Schedule
from spatial_jax.rollout.saved_groups import make_saved_groups, save_groups
from spatial_jax.types import (
  ImageRef,
  ObjectBox,
  Operation,
  OperationError,
  PatchedImage,
  Prompt,
  Task,
  Trajectory,
  Turn,
)

IMAGE_PAD, VISION_START, VISION_END, IM_END = 90, 91, 92, 93
FORBIDDEN = (IMAGE_PAD, VISION_START, VISION_END)
COLOURS = ("#b5651d", "#4a6fa5", "#6b8e4e", "#8c4a5b", "#c9a227", "#5f5f6e")


def room_image(generator: np.random.Generator, height: int = 112, width: int = 112) -> np.ndarray:
  """A wall, a floor and a few boxes, uint8 [height, width, 3]."""
  image = Image.new("RGB", (width, height), "#d9d4c7")
  draw = ImageDraw.Draw(image)
  horizon = int(height * generator.uniform(0.4, 0.6))
  draw.rectangle((0, horizon, width, height), fill="#a58d6f")
  for _ in range(int(generator.integers(2, 6))):
    w, h = generator.uniform(0.1, 0.35, 2) * (width, height)
    x, y = generator.uniform(0, width - w), generator.uniform(horizon - 0.5 * h, height - h)
    draw.rectangle((x, y, x + w, y + h), fill=str(generator.choice(COLOURS)), outline="#333333")
  return np.asarray(image)


def patched(pixels: np.ndarray, grid_3: tuple[int, int, int] | None = None) -> PatchedImage:
  """An image with random patches of the right shape, without preprocessing."""
  digest = hashlib.sha256(pixels.tobytes() + bytes(str(pixels.shape), "ascii")).hexdigest()
  grid_3 = grid_3 or (1, pixels.shape[0] // 14, pixels.shape[1] // 14)
  generator = np.random.default_rng(int(digest[:8], 16))
  patches_PX = generator.normal(size=(int(np.prod(grid_3)), 12)).astype(np.float32)
  return PatchedImage(digest, patches_PX, grid_3, pixels)


def drawn(image: PatchedImage, operation: Operation) -> PatchedImage:
  """The image with one operation drawn on it."""
  canvas = Image.fromarray(image.pixels)
  draw = ImageDraw.Draw(canvas)
  if operation.tool == "box":
    draw.rectangle(operation.points_4, outline="#e4002b", width=2)
  else:
    draw.line(operation.points_4, fill="#e4002b", width=2)
  return patched(np.asarray(canvas), image.grid_3)


def random_operation(generator: np.random.Generator, image: int, size_px: int) -> Operation:
  x, y = generator.uniform(0, 0.6 * size_px, 2)
  w, h = generator.uniform(0.1 * size_px, 0.4 * size_px, 2)
  tool = "box" if generator.uniform() < 0.7 else "line"
  label = str(generator.choice(["chair", "table", "lamp", "sofa", "<b>plant</b>"]))
  return Operation(tool, image, (float(x), float(y), float(x + w), float(y + h)), label)


class TrajectoryWriter:
  """Appends text, images and turns with the right positions and masks."""

  def __init__(self):
    self.ids, self.positions, self.logps = [], [], []
    self.images, self.starts, self.turns = [], [], []
    self.following = 0

  def text(self, ids, logps=None):
    self.ids += list(map(int, ids))
    self.positions += [[self.following + i] * 3 for i in range(len(ids))]
    self.logps += [None] * len(ids) if logps is None else list(logps)
    self.following += len(ids)

  def image(self, image: PatchedImage):
    self.text([VISION_START])
    t, h, w = image.grid_3[0], image.grid_3[1] // 2, image.grid_3[2] // 2
    self.images.append(image)
    self.starts.append(len(self.ids))
    self.ids += [IMAGE_PAD] * (t * h * w)
    self.logps += [None] * (t * h * w)
    self.positions += (np.indices((t, h, w)).reshape(3, -1).T + self.following).tolist()
    self.following += max(t, h, w)
    self.text([VISION_END])

  def turn(self, text, count, generator, operations=(), errors=(), produced=()):
    start = len(self.ids)
    self.text([*generator.integers(0, 80, count), IM_END], -generator.exponential(0.7, count + 1))
    executable = not errors
    end, produced = len(self.ids), tuple(produced)
    turn = Turn(start, end, text, tuple(operations), tuple(errors), executable, produced)
    self.turns.append(turn)

  def finish(self, task_id, sample, prompt_length, prompt_images, end_reason) -> Trajectory:
    trained_T = np.array([logp is not None for logp in self.logps])
    return Trajectory(
      task_id=task_id,
      sample=sample,
      seed_path=(0, 3, 1, sample),
      temperature=0.9,
      forbidden_ids=FORBIDDEN,
      token_ids_T=np.array(self.ids, np.int32),
      position_TA=np.array(self.positions, np.int32),
      trained_T=trained_T,
      logp_T=np.array([logp or 0 for logp in self.logps], np.float32),
      policy_step_T=np.where(trained_T, 3, -1).astype(np.int32),
      images=tuple(self.images),
      image_start=tuple(self.starts),
      prompt_length=prompt_length,
      prompt_images=prompt_images,
      turns=tuple(self.turns),
      end_reason=end_reason,
      grammar=VILASR,
    )


def number_task(generator: np.random.Generator, task_id: str = "room-7/chair.table") -> Task:
  """The distance between two objects in one image."""
  pixels = room_image(generator)
  return Task(
    task_id=task_id,
    question_type="object_abs_distance",
    question="What is the distance between the chair and the table (in meters)?",
    options=None,
    answer=f"{generator.uniform(0.5, 4):.1f}",
    answer_kind="number",
    unit=None,
    media=(ImageRef(pixels),),
    source="procedural",
    scene_id="room-7",
    benchmark=None,
    boxes=(ObjectBox("chair", 0, (10.0, 50.0, 40.0, 90.0)),),
  )


def trajectory(
  generator: np.random.Generator, task: Task, sample: int = 0, answer: str | None = None
) -> Trajectory:
  """A rollout of 0 to 2 drawing turns and an answer, or one that ended early."""
  writer = TrajectoryWriter()
  writer.text(generator.integers(0, 80, 5))
  for pixels in map(read_pixels, task.media):
    writer.image(patched(pixels))
  writer.text(generator.integers(0, 80, 12))
  prompt_length, prompt_images = len(writer.ids), len(writer.images)
  for number in range(int(generator.integers(0, 3))):
    index = int(generator.integers(1, len(writer.images) + 1))
    operation = random_operation(generator, index, read_pixels(task.media[0]).shape[0])
    new = drawn(writer.images[index - 1], operation)
    notation = "bbox_2d" if operation.tool == "box" else "start_point_2d"
    text = (
      f"<think> The {operation.label} stands near the wall; I mark it before I measure. </think> "
      f'Action: Object Mapper\n```json\n[{{"index": {index}, "{notation}": '
      f'{[round(x) for x in operation.points_4]}, "label": "{operation.label}"}}]\n```'
    )
    errors = (
      (OperationError("no_such_image", "index 9 names no image, there are 2"),)
      if generator.uniform() < 0.15
      else ()
    )
    writer.turn(text, 30 + number, generator, (operation,), errors, (new.content_hash,))
    writer.text(generator.integers(0, 80, 3))
    writer.image(new)
    writer.text(generator.integers(0, 80, 4))
  if answer is None:
    writer.turn("I can not tell <script>alert(1)</script>", 9, generator)
    return writer.finish(task.task_id, sample, prompt_length, prompt_images, "no_action")
  text = (
    "<think> The boxes are about two chair widths apart. </think> Action: Answer\n"
    f"<answer> {answer} </answer>"
  )
  writer.turn(text, 20, generator)
  return writer.finish(task.task_id, sample, prompt_length, prompt_images, "answer")


# --- a finished run ----------------------------------------------------------------------------

REWARD = accuracy_reward("sigmoid", "smooth", Schedule("sigmoid", 1.0, 100.0, 0.5, 10.0), 0.1)
ADVANTAGE = AdvantageConfig(
  alpha=1.0, sign_safe=False, by_std=True, baseline="mean", per_component=False
)
CARD = RewardCard(REWARD, ADVANTAGE)
SHARPNESS = 40.0
PREFIX = "<think> The boxes"

QUESTION_TYPES = (
  "object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation",
  "object_rel_distance", "object_rel_direction_easy", "obj_appearance_order", "camera_distance",
)  # fmt: skip


def group(generator: np.random.Generator, task: Task, samples: int = 8) -> list[Trajectory]:
  """Rollouts of one task with answers around the truth."""
  answers = [
    None if generator.uniform() < 0.15 else f"{float(task.answer) * spread:.1f}"
    for spread in generator.normal(1, 0.35, samples)
  ]
  return [trajectory(generator, task, g, answer) for g, answer in enumerate(answers)]


def prompt(task: Task) -> Prompt:
  """A prompt of which only the task and its images are real."""
  images = tuple(patched(read_pixels(one)) for one in task.media)
  sizes = tuple(image_size(one) for one in task.media)
  return Prompt(
    task, np.zeros(1, np.int32), np.zeros((1, 3), np.int32), 1, images, (), sizes, VILASR
  )


def result_table(generator: np.random.Generator) -> ResultTable:
  """The columns of a default run on made-up scores; one question type has few questions."""
  mean = {
    "start_greedy": 0.44,
    "start_sampled": 0.41,
    "start_best_temperature": 0.45,
    "end_greedy": 0.53,
    "end_sampled": 0.48,
    "median": 0.42,
    "end_other_image": 0.36,
  }
  sizes = dict.fromkeys(QUESTION_TYPES, 64) | {"obj_appearance_order": 3}
  scores = {
    name: {key: generator.beta(8 * a, 8 * (1 - a), n) for key, a in mean.items()}
    for name, n in sizes.items()
  }
  whole = {key: np.concatenate([scores[name][key] for name in sizes]) for key in mean}

  def paired(label: str, after: str, before: str, measure: str = "score") -> Paired:
    cell = paired_interval(whole[after], whole[before], seed=0)
    return Paired(label, after, before, measure, cell.mean, cell.low, cell.high)

  return ResultTable(
    columns=tuple(ResultColumn(key, key.replace("_", ", ", 1)) for key in mean),
    rows=tuple(
      ResultRow(name, n, {key: bootstrap_interval(scores[name][key], 0) for key in mean})
      for name, n in sizes.items()
    ),
    overall={key: bootstrap_interval(whole[key], 0) for key in mean},
    parsed=dict.fromkeys(mean, 0.99),
    summary=(
      ResultRow("reward", 320, {key: bootstrap_interval(1.2 * whole[key], 0) for key in mean}),
    ),
    paired=(
      paired("greedy score, end - start", "end_greedy", "start_greedy"),
      paired("greedy score, end - median answer", "end_greedy", "median"),
      paired("greedy score, end - end on other images", "end_greedy", "end_other_image"),
      paired("sampled score, end - start", "end_sampled", "start_sampled"),
      paired(
        "sampled score, end - start at its best temperature",
        "end_sampled",
        "start_best_temperature",
      ),
      paired("sampled reward, end - start", "end_sampled", "start_sampled", "reward"),
    ),
    notes=("Rooms of the held-out split only; training used other rooms.",),
  )


def finished_run(workdir: pathlib.Path, steps: int = 120, groups: int = 2) -> pathlib.Path:
  """A work directory as a run leaves it, with plausible numbers and every file of the report."""
  generator = np.random.default_rng(0)
  workdir.mkdir(parents=True, exist_ok=True)
  write_metrics(generator, workdir, steps)
  (workdir / "config.json").write_text(json.dumps({"seed": 0, "advantage": {"alpha": 1.0}}))
  (workdir / "timeline.json").write_text(json.dumps(timeline_record(step=steps)))
  write_results(result_table(generator), workdir, {})
  for step in (0, steps):
    tasks = [number_task(generator, f"room-{step + i}/chair.table") for i in range(groups)]
    rollouts = [group(generator, task) for task in tasks]
    scores = score(rollouts, tasks, REWARD, SHARPNESS)
    advantages_BG = np.asarray(advantage(scores, ADVANTAGE))
    prompts = [prompt(task) for task in tasks]
    groups_ = make_saved_groups(prompts, rollouts, scores, advantages_BG, step)
    save_groups(groups_, workdir)
  write_evaluation(generator, workdir, groups)
  return workdir


def write_metrics(generator: np.random.Generator, workdir: pathlib.Path, steps: int) -> None:
  """metrics.jsonl: the score rises, the reward falls, one value is not finite."""
  lines = []
  for step in range(steps):
    u = step / max(steps - 1, 1)
    noise = generator.normal(0, 1, 7)
    record = {"step": step, "stage": "grpo", "time_s": 4.1 * (step + 1)}
    record |= {
      "reward": 0.75 - 0.16 * u**0.7 + 0.03 * noise[0],
      "score": 0.41 + 0.09 * u**0.7 + 0.03 * noise[1],
      "format": min(1.0, 0.82 + 0.16 * u**0.4 + 0.02 * noise[2]),
      "logp_difference": 2e-5 * float(np.exp(0.3 * noise[3])),
      "response_tokens": 96 - 22 * u + 4 * noise[4],
      "drawing_share": 0.3 - 0.1 * u,
      "tokens_per_s": 2900 + 120 * noise[5],
      "entropy_estimate": 0.9 - 0.35 * u + 0.03 * noise[6],
      "sharpness": 1 + 99 / (1 + float(np.exp(-10 * (u - 0.5)))),
    }
    if step == 37:
      record |= {"entropy_estimate": None, "not_finite": ["entropy_estimate"]}
    lines.append(json.dumps(record))
  (workdir / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))


def write_evaluation(
  generator: np.random.Generator,
  workdir: pathlib.Path,
  groups: int,
  names: Sequence[str] = ("start, greedy", "end, greedy", "end, sampled"),
) -> None:
  """Saved groups and predictions: the start is 80 % off, the end 20 %, then 10 %, ..."""
  tasks = [number_task(generator, f"room-{900 + i}/chair.table") for i in range(groups)]
  rollouts = [
    [
      trajectory(generator, task, g, f"{float(task.answer) * factor:.4f}")
      for g, factor in enumerate((1.8, 1.2 - 0.1 * number, 1.3)[-len(names) :])
    ]
    for number, task in enumerate(tasks)
  ]
  scores = score(rollouts, tasks, REWARD, SHARPNESS)
  prompts = [prompt(task) for task in tasks]
  saved = make_saved_groups(prompts, rollouts, scores, names=names, response_prefix=PREFIX)
  save_groups(saved, workdir)
  if len(names) < 3:
    return
  lines = [
    json.dumps({"column": column, "task_id": task.task_id, "score": float(scores.score_BG[b, g])})
    for b, task in enumerate(tasks)
    for g, column in enumerate(("start_greedy", "end_greedy"))
  ]
  (workdir / "predictions.jsonl").write_text("".join(line + "\n" for line in lines))


def timeline_record(step: int) -> dict[str, object]:
  """timeline.json of two slots: images, prefill, two chunks; nothing was appended."""
  spans = (("encode_images", 0, 1), ("prefill", 1, 2), ("decode", 2, 4), ("decode", 4, 5))
  chunks = ((2, 4, [4, 4], [0, 0]), (4, 5, [1, 0], [2, 0]))
  return {
    "step": step,
    "total_s": 5.5,
    "programs": [{"program": p, "start_s": a, "end_s": b} for p, a, b in spans],
    "chunks": [
      {"start_s": a, "end_s": b, "group": 4, "active": active, "drawing": drawing}
      for a, b, active, drawing in chunks
    ],
  }
