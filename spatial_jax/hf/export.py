"""Writes the files of a Hugging Face folder besides the weights, so that transformers loads it."""

import json
import pathlib
import shutil
from typing import Any

from spatial_jax.data import chat_template as chat_template_lib
from spatial_jax.data.chat_template import ChatTemplate
from spatial_jax.data.image import PreprocessConfig
from spatial_jax.data.tokenizer import END_OF_TEXT, FILE, IM_END, Tokenizer
from spatial_jax.hf import processor
from spatial_jax.workdir import write_text

TOKENIZER_CONFIG = {
  "tokenizer_class": "PreTrainedTokenizerFast",
  "eos_token": IM_END,
  "pad_token": END_OF_TEXT,
  "padding_side": "left",
  "clean_up_tokenization_spaces": False,
}
# Files of the base policy that stay true after training. Weights of any format, the model card and
# the image settings are not among them.
KEPT_FILES = (
  *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
  *("merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json"),
  *(processor.VIDEO_FILE, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"),
)


def write_files(
  tokenizer: Tokenizer,
  template: ChatTemplate,
  preprocess: PreprocessConfig,
  out: pathlib.Path,
  base: pathlib.Path | None,
) -> None:
  """Writes all files except the weights: tokenizer, chat template, image and generation settings.

  Args:
    tokenizer, template, preprocess: of the policy.
    out: an existing folder.
    base: Hugging Face folder of the base policy. Its KEPT_FILES replace the defaults.
  """
  _write(out / "tokenizer_config.json", TOKENIZER_CONFIG)
  write_text(out / chat_template_lib.FILE, template.source)
  generation = {
    "eos_token_id": tokenizer.id(IM_END),
    "pad_token_id": tokenizer.id(END_OF_TEXT),
    "do_sample": False,
  }
  _write(out / "generation_config.json", generation)
  if base is not None:
    for path in (base / name for name in KEPT_FILES):
      if path.is_file():
        shutil.copyfile(path, out / path.name)
    if video := processor.nested_settings(base).get("video_processor"):
      _write(out / processor.VIDEO_FILE, video)
  write_text(out / FILE, tokenizer.inner.to_str(pretty=True))
  _write(out / processor.IMAGE_FILE, processor.to_hf(preprocess))


def _write(path: pathlib.Path, record: dict[str, Any]) -> None:
  write_text(path, json.dumps(record, indent=2) + "\n")
