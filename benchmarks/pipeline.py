"""Prompts per second of the data pipeline, beside what a training step consumes.

    python -m benchmarks.pipeline [--workers=2] [--run=runs/tiny]

1. Tasks with one 448 x 448 JPEG at the settings of the embedded policy (168 x 168 pixels). The step
   of the default run consumes 32 prompts; --run says how long its steps took.
2. Clips of 16 frames of a 640 x 480 mp4 at the settings of Qwen2-VL-2B.

Each is the median of 5 parts of the stream after a warm-up, worker processes included.
"""

import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from absl import app, flags
from PIL import Image
from rich.console import Console

from benchmarks import shapes
from spatial_jax.data.chat_template import CHATML
from spatial_jax.data.files import FilesConfig, open_files
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.pipeline import PipelineConfig, PromptBatch, prompt_batches
from spatial_jax.data.prompt_form import read_form
from spatial_jax.data.tokenizer import load_tokenizer
from spatial_jax.data.video import VideoConfig
from spatial_jax.hf.model_zoo import released, released_processor
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.stages.load import read_shape

WORKERS = flags.DEFINE_integer("workers", 2, "worker processes; 0: a thread", lower_bound=0)
RUN = flags.DEFINE_string("run", "", "work directory of the default run, for its seconds per step")
TINY = pathlib.Path(shapes.__file__).parent.parent / "spatial_jax" / "assets" / "tiny"
PROMPTS, PARTS = 32, 5
FILES = FilesConfig((), "", 0.1, (), "shuffled", 0.0, check_media=True)


def conversation(shape: QwenVLConfig, image: PreprocessConfig, video: VideoConfig) -> Conversation:
  """The think form, in the tokens of the embedded policy: their number hardly matters here."""
  return Conversation(load_tokenizer(TINY), read_form("think"), CHATML, image, video, shape)


def image_rows(folder: pathlib.Path) -> pathlib.Path:
  """64 questions about 64 images."""
  rng, lines = np.random.default_rng(0), []
  for number in range(64):
    small = rng.integers(0, 255, (28, 28, 3), np.uint8)
    Image.fromarray(small).resize((448, 448)).save(folder / f"{number}.jpg", quality=92)
    row = {"question": "How far is it, in meters?", "answer": 2.5, "images": [f"{number}.jpg"]}
    lines.append(json.dumps(row))
  (folder / "images.jsonl").write_text("\n".join(lines))
  return folder / "images.jsonl"


def clip_rows(folder: pathlib.Path) -> pathlib.Path:
  """16 questions about 4 videos of 10 seconds."""
  import av

  rng, lines = np.random.default_rng(0), []
  for number in range(4):
    with av.open(str(folder / f"{number}.mp4"), "w") as container:
      stream = container.add_stream("libx264", rate=24)
      stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
      room = Image.fromarray(rng.integers(0, 255, (40, 80, 3), np.uint8)).resize((1280, 640))
      pixels = np.asarray(room)
      for t in range(240):
        frame = av.VideoFrame.from_ndarray(
          np.ascontiguousarray(pixels[80:560, 2 * t : 2 * t + 640])
        )
        container.mux(stream.encode(frame))
      container.mux(stream.encode())
  for number in range(16):
    row = {"question": "How many chairs are there?", "answer": 3, "videos": [f"{number % 4}.mp4"]}
    lines.append(json.dumps(row | {"scene": str(number)}))
  (folder / "clips.jsonl").write_text("\n".join(lines))
  return folder / "clips.jsonl"


def per_second(stream: Iterator[PromptBatch], count: int) -> float:
  """Median prompts per second of the parts of a stream, without the first."""
  next(stream)
  seconds = []
  for _ in range(PARTS):
    start = time.perf_counter()
    next(stream)
    seconds.append(time.perf_counter() - start)
  return count / float(np.median(seconds))


def measure(rows: pathlib.Path, talk: Conversation, count: int) -> float:
  """Prompts per second from a file of rows."""
  source = open_files((rows,), FILES, lambda task: None)
  cfg = PipelineConfig(WORKERS.value, steps_ahead=1)
  return per_second(prompt_batches(source.dataset(0), talk.prompt, 0, 0, count, cfg), count)


def main(argv: list[str]) -> None:
  """Measures and prints."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  tiny_shape, shape = read_shape(TINY), released("Qwen2-VL-2B")
  image, video = released_processor(shape)
  ids = {"image_pad_id": tiny_shape.image_pad_id, "video_pad_id": tiny_shape.video_pad_id}
  shape = dataclasses.replace(shape, **ids)  # of the tokenizer
  clips = VideoConfig(False, 2.0, 16, 16, video.min_pixels, video.max_pixels)
  tiny = PreprocessConfig(14, 2, 2, 56 * 56, 168 * 168, image.mean, image.std)
  console = Console()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    found = measure(image_rows(folder), conversation(tiny_shape, tiny, clips), PROMPTS)
    text = f"images: {found:,.0f} prompts/s with {WORKERS.value} workers"
    metrics = pathlib.Path(RUN.value, "metrics.jsonl")
    if RUN.value:
      steps = [json.loads(line)["seconds"] for line in metrics.read_text().splitlines()]
      consumed = PROMPTS / float(np.median(steps))
      text += f"; a step consumes {consumed:.1f} prompts/s, {found / consumed:.0f} times less"
    console.print(text, highlight=False)
    found = measure(clip_rows(folder), conversation(shape, image, clips), 4)
    console.print(f"clips of 16 frames: {found:.1f} clips/s", highlight=False)


if __name__ == "__main__":
  app.run(main)
