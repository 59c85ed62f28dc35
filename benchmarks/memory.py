"""Which released models can be trained on which devices: the tables of docs/memory.md.

python -m benchmarks.memory            prints them
python -m benchmarks.memory --write    writes them into docs/memory.md
"""

import functools
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from configs import tiny_defaults
from spatial_jax.config import build
from spatial_jax.hf.model_zoo import released
from spatial_jax.machines import GIB, MACHINES, Machine
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.rollout.memory import MemoryPlan
from spatial_jax.train_config import TrainConfig, plan_for


class Lengths(NamedTuple):
  """Sizes of a step."""

  prompt: int  # tokens, images included
  response: int  # tokens, drawn images included
  prompts: int
  group: int
  image_tokens: int  # of one image
  prompt_images: int
  drawn_images: int  # of all rollouts of a prompt, distinct


class Training(NamedTuple):
  """What is trained."""

  name: str
  frozen: tuple[str, ...]
  lora: tuple[str, ...]


TRAINING = {
  "LoRA": Training("LoRA", (), (r"^decoder/layers/.*/kernel$",)),
  "decoder": Training("decoder", ("^vision/",), ()),
  "full": Training("full", (), ()),
}


def tensor_size(shape: QwenVLConfig, machine: Machine) -> int:
  """Devices over which the weights are sharded for sampling: at most the KV heads."""
  sizes = [n for n in (1, 2, 4) if shape.decoder.kv_heads % n == 0 and n <= machine.count]
  return sizes[-1]


def config_of(
  shape: QwenVLConfig, training: Training, machine: Machine, lengths: Lengths
) -> ConfigDict:
  """`configs/tiny_defaults.py` with the sizes of the model and of the step."""
  tensor = tensor_size(shape, machine)
  devices = machine.count // tensor  # over which rows are sharded
  images = lengths.prompts * (lengths.prompt_images + lengths.drawn_images)

  def vision(key: str, count: int) -> dict[str, tuple[int, ...]]:
    windows = count * lengths.image_tokens // shape.vision.window_blocks**2
    patches = lengths.image_tokens * shape.vision.merge_size**2
    sizes = {"windows": (windows,), "frames": (count,), "patches": (patches,)}
    return {f"{key}.{name}": value for name, value in sizes.items()}

  cfg = tiny_defaults.get_config()
  cfg.update_from_flattened_dict(
    {
      "mesh.data": 1,
      "mesh.fsdp": devices,
      "mesh.tensor": tensor,
      "preprocess.patch_size": shape.vision.patch_size,
      "lora.paths": training.lora,
      "lora.rank": 32,
      "lora.alpha": 64.0,
      "rollout.prompts": lengths.prompts,
      "rollout.group": lengths.group,
      "rollout.slots": lengths.prompts,
      "rollout.prefill": (devices,),
      "rollout.append": (devices,),
      "rollout.gather_fractions": (0.25,),
      "rollout.prompt_buckets": (lengths.prompt,),
      "rollout.observation_buckets": (lengths.image_tokens + 128,),
      "rollout.suffix_block_edges": (),
      "rollout.stop.max_response_tokens": lengths.response - 1,
      "rollout.feature_buffer_tokens": images * lengths.image_tokens,
      **vision("rollout.vision", devices),
      "learn.prefix_buckets": (lengths.prompt,),
      "learn.micro.rows": 1,
      "learn.micro.lengths": (lengths.response,),
      **vision("learn.vision", images),
      "learn.loss.kl.weight": 0.01,
      "learn.optimizer.frozen": training.frozen,
    }
  )
  return cfg


class Option(NamedTuple):
  """A setting that saves memory."""

  name: str
  settings: dict[str, str]


# From the one that costs nothing to those that round.
OPTIONS = (
  Option("host", {"learn.reference": "host"}),
  Option("mu", {"learn.optimizer.mu_dtype": "bfloat16"}),
  Option("grads", {"learn.optimizer.gradient_dtype": "bfloat16"}),
)


class Cell(NamedTuple):
  """One model on one machine."""

  plan: MemoryPlan
  options: tuple[str, ...]

  @property
  def fits(self) -> bool:
    return self.plan.total <= self.plan.device

  def __str__(self) -> str:
    rollouts = max(self.plan.rollouts, self.plan.resharding) / GIB
    update = max(self.plan.update, self.plan.reference_logprobs) / GIB
    sizes = f"{rollouts:.1f} / {update:.1f}"
    return " ".join((sizes, *self.options)) if self.fits else f"no: {sizes}"


@functools.cache
def cell(model: str, training: str, machine: str, lengths: Lengths) -> Cell:
  """The plan with the fewest options that fits, or with all of them."""
  shape, devices = released(model), MACHINES[machine]
  config = config_of(shape, TRAINING[training], devices, lengths)
  rows = lengths.prompts * lengths.group
  used: tuple[str, ...] = ()
  found = Cell(plan_for(build(TrainConfig, dict(config)), shape, devices), used)
  while found.plan.rollouts > devices.usable and rows > lengths.group:
    rows //= 2
    config.update_from_flattened_dict({"rollout.rows": rows})
    used = (f"rows={rows}",)
    found = Cell(plan_for(build(TrainConfig, dict(config)), shape, devices), used)
  for option in OPTIONS if not TRAINING[training].lora else ():
    if found.fits:
      break
    config.update_from_flattened_dict(option.settings)
    used = (*used, option.name)
    found = Cell(plan_for(build(TrainConfig, dict(config)), shape, devices), used)
  return found


# --- the tables of docs/memory.md --------------------------------------------------------------

MODELS = ("Qwen2-VL-2B", "Qwen2.5-VL-3B", "Qwen2.5-VL-7B", "Qwen3-VL-8B")
TABLES = {
  "short": Lengths(2048, 1024, 8, 8, image_tokens=256, prompt_images=6, drawn_images=8),
  "vilasr": Lengths(5120, 13312, 8, 8, image_tokens=256, prompt_images=16, drawn_images=16),
}
DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "memory.md"


def row(model: str, training: str, lengths: Lengths) -> str:
  """One line of a table."""
  cells = (str(cell(model, training, machine, lengths)) for machine in MACHINES)
  return f"| {model} | {training} | {' | '.join(cells)} |"


def table(lengths: Lengths) -> str:
  """A table in Markdown."""
  lines = [row(model, training, lengths) for model in MODELS for training in TRAINING]
  head = f"| model | trained | {' | '.join(MACHINES)} |"
  return "\n".join((head, "| --- | --- |" + " --- |" * len(MACHINES), *lines))


def with_tables(text: str) -> str:
  """The document with the tables computed again, between their marks."""
  for name, lengths in TABLES.items():
    marks = f"<!-- {name} -->", f"<!-- end {name} -->"
    before, rest = text.split(marks[0])
    text = f"{before}{marks[0]}\n{table(lengths)}\n{marks[1]}{rest.split(marks[1])[1]}"
  return text


def main(arguments: Sequence[str]) -> None:
  """Prints the document, or writes it with --write."""
  text = with_tables(DOCUMENT.read_text())
  if "--write" in arguments:
    DOCUMENT.write_text(text)
  else:
    print(text)


if __name__ == "__main__":
  main(sys.argv[1:])
