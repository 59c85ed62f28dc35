"""Writes a policy as a Hugging Face folder that transformers loads: weights, tokenizer, pixels."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp

from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.tokenizer import END_OF_TEXT, IM_END, Tokenizer
from spatial_jax.hf import processor, weights
from spatial_jax.policy.config import QwenVLConfig
from spatial_jax.types import Params

# Qwen2.5-VL's conversation: roles between <|im_start|> and <|im_end|>, one pad token per picture.
CHAT_TEMPLATE = (
  "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
  "{% if message['content'] is string %}{{ message['content'] }}"
  "{% else %}{% for part in message['content'] %}"
  "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
  "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
  "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


TOKENIZER_CONFIG = {
  "tokenizer_class": "PreTrainedTokenizerFast",
  "eos_token": IM_END,
  "pad_token": END_OF_TEXT,
  "padding_side": "left",
  "clean_up_tokenization_spaces": False,
}


def publish(
  params: Params,
  cfg: QwenVLConfig,
  tokenizer: Tokenizer,
  preprocess: PreprocessConfig,
  out: pathlib.Path,
) -> None:
  """Writes the folder; weights in bfloat16, half the size of what trained them.

  Args:
    params: stacked.
    cfg, tokenizer, preprocess: of the policy.
    out: made when missing; files in it are replaced.
  """
  out.mkdir(parents=True, exist_ok=True)
  weights.save(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), cfg, out)
  (out / weights.WEIGHTS).chmod(0o644)  # the writer makes it private; the folder is to be shared
  write_files(tokenizer, preprocess, out, None)


def write_files(
  tokenizer: Tokenizer, preprocess: PreprocessConfig, out: pathlib.Path, like: pathlib.Path | None
) -> None:
  """Everything beside the weights: tokenizer, template, pixels, how to generate.

  Args:
    tokenizer, preprocess: of the policy; their own files are always written.
    out: there already.
    like: a Hugging Face folder whose other files take the place of ours, where there is one.
  """
  _write(out / "tokenizer_config.json", TOKENIZER_CONFIG)
  (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
  generation = {
    "eos_token_id": tokenizer.id(IM_END),
    "pad_token_id": tokenizer.id(END_OF_TEXT),
    "do_sample": False,
  }
  _write(out / "generation_config.json", generation)
  ours = (weights.CONFIG, weights.INDEX, "tokenizer.json", processor.IMAGES)
  for path in sorted(like.iterdir()) if like else ():
    if path.is_file() and path.name not in ours and path.suffix != ".safetensors":
      shutil.copy(path, out / path.name)
  tokenizer.inner.save(str(out / "tokenizer.json"))
  _write(out / processor.IMAGES, processor.to_hf(preprocess))


def _write(path: pathlib.Path, record: dict) -> None:
  path.write_text(json.dumps(record, indent=2) + "\n")
