"""The chat template of a model's folder, rendered as transformers renders it."""

import dataclasses
import json
import pickle

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from spatial_jax.config import ConfigError
from spatial_jax.data.chat_template import CHATML, CHATML_SOURCE, ChatTemplate, read_chat_template
from spatial_jax.errors import DataError
from spatial_jax.grammar import Grammar
from spatial_jax.hf.generation import NOTHING, Generation, read_generation, to_hf
from tests import rollout_fixtures as fixtures
from tests.rollout_fixtures import TOKENIZER

IMAGE, VIDEO = (
  "<|vision_start|><|image_pad|><|vision_end|>",
  "<|vision_start|><|video_pad|><|vision_end|>",
)

# The structure of the published templates, for text and vision content.
_PARTS = (
  "{%- macro parts(content) %}{%- if content is string %}{{- content }}{%- else %}"
  "{%- for item in content %}"
  "{%- if 'image' in item or item.type == 'image' %}"
  "{%- if add_vision_id %}Picture: {%- endif %}<|vision_start|><|image_pad|><|vision_end|>"
  "{%- elif 'video' in item or item.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
  "{%- elif 'text' in item %}{{- item.text }}{%- endif %}{%- endfor %}{%- endif %}{%- endmacro %}"
)
QWEN2_VL = (
  "{% set image_count = namespace(value=0) %}\n{% for message in messages %}\n"
  "  {% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
  "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
  "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
  "{% for content in message['content'] %}"
  "{% if content['type'] == 'image' or 'image' in content %}"
  "{% set image_count.value = image_count.value + 1 %}"
  "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
  "<|vision_start|><|image_pad|><|vision_end|>"
  "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
  "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
  "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_VL = (
  _PARTS + "{%- if tools %}{{- raise_exception('no tools') }}{%- endif %}\n"
  "{%- if messages[0].role == 'system' %}\n"
  "    {{- '<|im_start|>system\\n' + parts(messages[0].content) + '<|im_end|>\\n' }}\n"
  "{%- endif %}\n"
  "{%- for message in messages %}\n"
  "    {%- if message.role == 'user' %}\n"
  "        {{- '<|im_start|>user\\n' + parts(message.content) + '<|im_end|>\\n' }}\n"
  "    {%- elif message.role == 'assistant' %}\n"
  "        {{- '<|im_start|>assistant\\n' }}{% generation %}{{- parts(message.content) }}"
  "{{- '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}\n"
  "    {%- endif %}\n{%- endfor %}\n"
  "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
# Reasoning of earlier turns is dropped, and each turn begins with the tag.
QWEN3_THINKING = (
  _PARTS + "{%- set ns = namespace(last=messages|length - 1) %}"
  "{%- for message in messages[::-1] %}{%- if message.role == 'user' %}"
  "{%- set ns.last = messages|length - 1 - loop.index0 %}{%- break %}{%- endif %}{%- endfor %}"
  "{%- for message in messages %}{%- set content = parts(message.content) %}"
  "{%- if message.role == 'assistant' %}{%- if '</think>' in content %}"
  "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
  "{%- if loop.index0 > ns.last %}"
  "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + content }}"
  "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}"
  "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}"
  "{{- '<|im_end|>\\n' }}{%- endfor %}"
  "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"
)
FAMILIES = {
  "chatml": CHATML_SOURCE,
  "qwen2": QWEN2_VL,
  "qwen3": QWEN3_VL,
  "qwen3_thinking": QWEN3_THINKING,
}
DEFAULT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def rendered(source, messages):
  """The text that transformers makes of messages with vision content."""
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=TOKENIZER.inner, chat_template=source
  )
  return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def user(text):
  parts = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": text}]
  return {"role": "user", "content": parts}


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(
  ["\n### Question:\nHow far?\n\n", "  {{ x }} {% endfor %} ", "1 < 2 & \"'", " \n", ""]
)


@pytest.mark.parametrize("source", FAMILIES.values(), ids=FAMILIES)
@settings(deadline=None, max_examples=30)
@given(TEXTS, TEXTS)
def test_prompts_are_those_of_transformers(source, system, text):
  messages = [{"role": "system", "content": system}] if system else []
  expected = rendered(source, [*messages, user(text)])
  assert ChatTemplate(source, "").prompt(system, IMAGE + VIDEO + text) == expected


@pytest.mark.parametrize("source", FAMILIES.values(), ids=FAMILIES)
@settings(deadline=None, max_examples=30)
@given(TEXTS)
def test_observations_continue_the_text_of_transformers(source, text):
  template = ChatTemplate(source, "")
  turn = {"role": "assistant", "content": "I draw."}
  expected = rendered(source, [user("How far?"), turn, user(text)])
  first = template.prompt("", f"{IMAGE}{VIDEO}How far?").removesuffix(template.response_prefix)
  observation = template.observation(IMAGE + VIDEO + text)
  assert f"{first}I draw.<|im_end|>{observation}" == expected


def test_the_template_adds_its_own_system_message_and_response_prefix():
  prompts = {name: ChatTemplate(source, "").prompt("", "Q") for name, source in FAMILIES.items()}
  plain = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
  assert prompts == {
    "chatml": plain,
    "qwen2": DEFAULT + plain,
    "qwen3": plain,
    "qwen3_thinking": f"{plain}<think>\n",
  }
  assert ChatTemplate(QWEN2_VL, "").prompt("S", "Q") == (
    f"<|im_start|>system\nS<|im_end|>\n{plain}"
  )
  assert ChatTemplate(QWEN3_THINKING, "").response_prefix == "<think>\n"
  assert CHATML.response_prefix == ""


def test_a_template_can_be_sent_to_a_worker():
  template = ChatTemplate(QWEN3_THINKING, "x")
  before = template.prompt("S", "Q")
  assert pickle.loads(pickle.dumps(template)).prompt("S", "Q") == before


# --- files ---------------------------------------------------------------------------------------


def write(folder, name, content):
  (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_the_first_file_with_a_template_is_read(tmp_path):
  assert read_chat_template(tmp_path) == CHATML
  write(tmp_path, "tokenizer_config.json", {"eos_token": "<|im_end|>"})
  assert read_chat_template(tmp_path) == CHATML
  named = [{"name": "tool", "template": "?"}, {"name": "default", "template": QWEN2_VL}]
  write(tmp_path, "tokenizer_config.json", {"chat_template": named})
  assert read_chat_template(tmp_path).source == QWEN2_VL
  write(tmp_path, "tokenizer_config.json", {"chat_template": CHATML_SOURCE})
  assert read_chat_template(tmp_path).source == CHATML_SOURCE
  write(tmp_path, "chat_template.json", {"chat_template": QWEN3_VL})
  assert read_chat_template(tmp_path).source == QWEN3_VL
  write(tmp_path, "chat_template.jinja", QWEN3_THINKING)
  template = read_chat_template(tmp_path)
  assert template == ChatTemplate(QWEN3_THINKING, str(tmp_path / "chat_template.jinja"))


LLAMA = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
NO_END = CHATML_SOURCE.replace("<|im_end|>\n", "{{ eos_token }}\n")
ONE_TURN = "<|im_start|>user\n{{ messages[-1].content }}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
  ("name", "content", "problem"),
  [
    ("chat_template.jinja", "{% for x in", "cannot be used"),
    ("chat_template.jinja", "{{ raise_exception('only tools') }}", "only tools"),
    ("chat_template.jinja", "{{ ''.__class__.__mro__ }}", "cannot be used"),
    ("chat_template.jinja", "", "does not write the system message"),
    ("chat_template.jinja", LLAMA, "no <|im_start|>assistant line"),
    ("chat_template.jinja", NO_END, "does not end with <|im_end|>"),
    ("chat_template.jinja", ONE_TURN, "does not write the system message and the question once"),
    ("chat_template.jinja", b"\xff", "cannot be read"),
    ("chat_template.json", "{", "cannot be read"),
    ("chat_template.json", "[]", "cannot be read"),
    ("chat_template.json", {"chat_template": 3}, "int, not a text"),
    ("tokenizer_config.json", {"chat_template": [{"name": "tool", "template": ""}]}, "'default'"),
    ("tokenizer_config.json", {"chat_template": ["x"]}, "cannot be read"),
  ],
)
def test_an_unusable_template_is_refused_in_one_line_with_its_file(
  tmp_path, name, content, problem
):
  if isinstance(content, bytes):
    (tmp_path / name).write_bytes(content)
  else:
    write(tmp_path, name, content)
  with pytest.raises(DataError) as caught:
    read_chat_template(tmp_path)
  message = str(caught.value)
  assert message.startswith(str(tmp_path / name))
  assert problem in message
  assert "\n" not in message


# --- generation settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("record", "expected"),
  [
    ({}, NOTHING),
    ({"eos_token_id": 7, "pad_token_id": 3}, Generation((7,), None, None, None)),
    (
      {"eos_token_id": [7, 3], "temperature": 1e-6, "top_p": 0.8, "top_k": 20},
      Generation((7, 3), 1e-6, 0.8, 20),
    ),
    ({"eos_token_id": None, "temperature": 1}, Generation((), 1, None, None)),
  ],
)
def test_generation_settings(tmp_path, record, expected):
  assert read_generation(tmp_path) == NOTHING
  write(tmp_path, "generation_config.json", record)
  assert read_generation(tmp_path) == expected
  write(tmp_path, "generation_config.json", to_hf(expected))
  assert read_generation(tmp_path) == expected


@pytest.mark.parametrize(
  ("content", "problem"),
  [
    ("{", "cannot be read"),
    ("[]", "cannot be read"),
    ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
    ({"eos_token_id": [1, -1]}, "eos_token_id is"),
    ({"top_p": "high"}, "top_p is 'high'"),
    ({"top_k": 1.5}, "top_k is 1.5"),
  ],
)
def test_unusable_generation_settings_are_named(tmp_path, content, problem):
  write(tmp_path, "generation_config.json", content)
  with pytest.raises(DataError, match=r"generation_config\.json") as caught:
    read_generation(tmp_path)
  assert problem in str(caught.value)


# --- in a conversation ---------------------------------------------------------------------------


def with_template(source, grammar):
  form = dataclasses.replace(fixtures.FORM, grammar=grammar)
  template = ChatTemplate(source, "model/chat_template.jinja")
  return dataclasses.replace(fixtures.conversation(), form=form, template=template)


@pytest.mark.parametrize(("tag", "answer"), [("", ""), ("observe", "answer"), ("", "answer")])
def test_a_form_without_the_reasoning_of_a_thinking_model_is_refused(tag, answer):
  with pytest.raises(ConfigError, match=r"model/chat_template\.jinja begins .* <think>") as caught:
    with_template(QWEN3_THINKING, Grammar(tag, False, answer, False))
  assert "\n" not in str(caught.value)
  with_template(QWEN3_THINKING, Grammar("think", False, answer, False))
  with_template(QWEN2_VL, Grammar(tag, False, answer, False))
