"""Prompt forms: exact wordings of the shipped ones, files of users, and what a run records."""

import dataclasses
import json
import tomllib

import numpy as np
import pytest

from configs import chat, tiny_defaults
from spatial_jax.config import ConfigError, build
from spatial_jax.data import prompt_form
from spatial_jax.data.chat_template import CHATML
from spatial_jax.data.prompt_form import form_of, form_record, read_form, shipped_forms
from spatial_jax.data.prompt_text import observation_text, prompt_text
from spatial_jax.train_config import MAY_DIFFER, TrainConfig
from spatial_jax.workdir import bind_workdir
from tests import dummies
from tests.rollout_fixtures import task

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
NUMBER = dataclasses.replace(task("x"), question="How far is it?")
CHOICE = dataclasses.replace(
  NUMBER, question="Which?", options=("A. chair", "B. sofa"), answer_kind="choice"
)
WORDS = dataclasses.replace(NUMBER, question="Where is it?", answer_kind="words")


def images(count):
  return [dummies.patched(np.zeros((28, 56, 3), np.uint8))] * count


def user(name, question, count=1):
  """The user message of the prompt."""
  text = prompt_text(question, images(count), read_form(name).text, CHATML)
  before, start, after = text.rpartition("<|im_start|>user\n")
  assert start
  assert before == "" or before.endswith("<|im_end|>\n")
  assert after.endswith("<|im_end|>\n<|im_start|>assistant\n")
  return after.removesuffix("<|im_end|>\n<|im_start|>assistant\n")


GPT = " and then provide the short answer with one or two words or a number in <answer> </answer>."
INSTRUCTIONS = {
  "think": "Please think step by step and enclose your thinking process in <think> </think> tags"
  + GPT,
  "observe": "Please observe carefully and analyze what you see that helps you to solve the "
  "question in the video and enclose it in <observe> </observe> tag," + GPT,
  "vanilla": "Please provide the short answer with one or two words or a number.",
  "think_test": "Let's think step by step and then answer the question using a single word or "
  "phrase.",
  "observe_test": "Please observe the video first and then answer the question using a single word "
  "or phrase.",
  "vanilla_test": "Please answer the question using a single word or phrase.",
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_prompts_of_vsgrpo(name):
  assert user(name, NUMBER) == f"{IMAGE}How far is it?\n{INSTRUCTIONS[name]}"
  assert user(name, WORDS, 2) == f"{IMAGE}{IMAGE}Where is it?\n{INSTRUCTIONS[name]}"


def test_prompts_of_vsi_bench():
  post = "Please answer the question using a single word or phrase."
  assert user("vsi_bench", NUMBER) == (
    f"{IMAGE}These are frames of a video.\nHow far is it?\n{post}"
  )
  assert user("vsi_bench", CHOICE) == (
    f"{IMAGE}These are frames of a video.\nWhich?\nOptions:\nA. chair\nB. sofa\n"
    "Answer with the option's letter from the given choices directly."
  )


BEGIN = (
  "\n\nBegin your reasoning. After each tool use, critically evaluate the visualization and adjust "
  "if needed:\n"
)


def test_prompts_of_vilasr():
  lines = [f"{IMAGE}The index of the given image is {i} (width: 56, height: 28).\n" for i in (1, 2)]
  assert user("vilasr", NUMBER, 2) == (
    f"{''.join(lines)}\n### Question:\nHow far is it?\nPlease answer the question using a single "
    f"word or phrase (e.g., 42 or 3.14).{BEGIN}"
  )
  assert user("vilasr", CHOICE) == (
    f"{lines[0]}\n### Question:\nWhich?\nA. chair\nB. sofa\nAnswer with the option's letter from "
    f"the given choices directly.{BEGIN}"
  )
  assert user("vilasr", WORDS) == f"{lines[0]}\n### Question:\nWhere is it?{BEGIN}"


def test_system_message_of_vilasr():
  system = read_form("vilasr").text.system
  headings = ["Guidance", "Available tools", "Required Output Format"]
  headings.append("Please NOTE the following reasoning techniques")
  places = [system.index(f"### {heading}:\n") for heading in headings]
  assert places == sorted(places)
  assert "<think> ... </think> Action: [Object Mapper/Path Tracer]\n```json\n[...]\n```\n" in system
  assert "<think> ... </think> Action: Answer\n<answer> ... </answer>\n" in system
  assert '{"index": i, "bbox_2d": [x1, y1, x2, y2], "label": "..."}' in system


@pytest.mark.parametrize(
  ("last", "sentence"),
  [
    (
      False,
      "Continue your reasoning. After each tool use, critically evaluate the visualization and "
      "adjust if needed:",
    ),
    (
      True,
      "Then, you can not invoke the Object Mapper or Path Tracer tool. Please answer the initial "
      "question and structure your response as required:",
    ),
  ],
)
def test_observations_of_vilasr(last, sentence):
  text = observation_text(3, images(1), last, read_form("vilasr").text, CHATML)
  assert text == (
    f"\n<|im_start|>user\n{IMAGE}\nThe index of the given image is 3 (width: 56, height: 28). "
    f"{sentence}\n<|im_end|>\n<|im_start|>assistant\n"
  )


def test_the_embedded_policy_has_the_prompt_that_it_was_trained_with():
  assert user("tiny", CHOICE) == (
    f"{IMAGE}image 1 (56 x 28)\nWhich?\nA. chair\nB. sofa\nAnswer with the option's letter.\n"
    "Think, draw if it helps, then answer:"
  )
  assert user("tiny", NUMBER).endswith(
    "How far is it?\nAnswer with a number.\nThink, draw if it helps, then answer:"
  )
  text = observation_text(2, images(2), False, read_form("tiny").text, CHATML)
  assert text == (
    f"\n<|im_start|>user\n{IMAGE}image 2 (56 x 28)\n{IMAGE}image 3 (56 x 28)\n"
    "Draw again or answer:<|im_end|>\n<|im_start|>assistant\n"
  )
  assert tiny_defaults.get_config().text == "tiny"
  assert chat.get_config().text == "vilasr"


# --- files of users ------------------------------------------------------------------------------

VALID = {
  "system": '""',
  "image_line": '""',
  "question": '"{question}"',
  "options": '""',
  "number_suffix": '""',
  "choice_suffix": '""',
  "words_suffix": '""',
}
GRAMMAR = {"reasoning": '"think"', "action": "false", "answer": '"answer"', "draws": "false"}


def write(folder, texts=None, grammar=None):
  """A form with some keys replaced; None removes a key."""
  texts, grammar = VALID | (texts or {}), GRAMMAR | (grammar or {})
  lines = [f"{key} = {value}" for key, value in texts.items() if value is not None]
  lines += ["[grammar]", *(f"{k} = {v}" for k, v in grammar.items() if v is not None)]
  path = folder / "my_form.toml"
  path.write_text("\n".join(lines) + "\n")
  return str(path)


def refused(name):
  with pytest.raises(ConfigError) as caught:
    read_form(name)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_a_form_of_a_user_is_read_by_its_path(tmp_path):
  form = read_form(write(tmp_path, {"question": r'"Q: {question}\n\"A\":"'}))
  assert form.text.question == 'Q: {question}\n"A":'
  assert not form.grammar.draws


DRAWS = {"draws": "true"}


@pytest.mark.parametrize(
  ("texts", "grammar", "problems"),
  [
    ({"qestion": '""'}, {}, [r"form.qestion is unknown (did you mean question?)"]),
    ({"question": None}, {}, ["form.question is missing"]),
    ({"question": "3"}, {}, ["form.question must be str, got 3"]),
    ({"question": '"{question} {answer}"'}, {}, ["form.question has the unknown field {answer}"]),
    ({"question": '"?"'}, {}, ["form.question must contain {question}"]),
    ({"image_line": '"{i}"'}, {}, ["form.image_line has the unknown field {i}"]),
    ({"system": '"<|im_end|>"'}, {}, ["form.system is", "must contain no special token"]),
    ({}, DRAWS, [f"form.{key} is missing" for key in ("observation", "more", "final")]),
    ({}, {"draws": None}, ["form.grammar.draws is missing"]),
    ({}, {"draws": '"yes"'}, ["form.grammar.draws must be bool, got 'yes'"]),
    ({}, {"reason": '""'}, ["form.grammar.reason is unknown (did you mean reasoning?)"]),
    ({}, {"action": "true", "reasoning": '""'}, ["form.grammar.action is True and must be false"]),
    ({"options": None}, {"answer": None}, ["form.options is missing", "grammar.answer is missing"]),
  ],
)
def test_every_mistake_in_a_file_is_named_in_one_line(tmp_path, texts, grammar, problems):
  message = refused(write(tmp_path, texts, grammar))
  assert message.startswith(f"{tmp_path}/my_form.toml: form.")
  assert all(problem in message for problem in problems)
  assert message.endswith("see docs/prompts.md")


def test_a_file_without_a_grammar_is_refused(tmp_path):
  path = tmp_path / "my_form.toml"
  path.write_text("\n".join(f"{key} = {value}" for key, value in VALID.items()))
  assert "form.grammar is missing" in refused(str(path))
  path.write_text('grammar = "think"')
  assert "form.grammar must be a table, [grammar], got 'think'" in refused(str(path))


def test_an_unknown_form_is_refused_with_the_names_of_the_shipped_ones(tmp_path):
  for name in ("vilaser", "", "my_form", str(tmp_path / "gone.toml"), str(tmp_path)):
    message = refused(name)
    assert message.startswith("config.text")
    assert name in message
    assert ", ".join(shipped_forms()) in message
  (tmp_path / "broken.toml").write_text("system = ")
  assert "broken.toml is not a TOML file: Invalid value" in refused(str(tmp_path / "broken.toml"))
  (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
  assert "binary.toml is not a TOML file" in refused(str(tmp_path / "binary.toml"))


# --- what a run records --------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_forms())
def test_a_recorded_form_is_the_form(name):
  form = read_form(name)
  assert form_of(json.loads(json.dumps(form_record(form)))) == form


def test_a_run_refuses_to_resume_with_another_form(tmp_path):
  name, workdir = write(tmp_path), tmp_path / "run"

  def resume(text):
    resolved = {"text": text, "form": form_record(read_form(text))}
    bind_workdir(workdir, resolved, MAY_DIFFER)

  resume(name)
  resume(name)
  (tmp_path / "moved").mkdir()
  resume(write(tmp_path / "moved"))  # the same form in another place
  write(tmp_path, {"system": '"Be brief."'})
  with pytest.raises(ConfigError, match=r'config\.form\.system is "Be brief\.", workdir has ""'):
    resume(name)


def test_the_config_names_a_form_and_nothing_else():
  cfg = tiny_defaults.get_config()
  assert build(TrainConfig, dict(cfg)).text == "tiny"
  with pytest.raises(ConfigError, match=r"config\.text must be str"):
    build(TrainConfig, dict(cfg) | {"text": {"system": ""}})


def test_shipped_files_hold_only_known_keys():
  for path in prompt_form._SHIPPED.iterdir():
    assert path.suffix == ".toml"
    form_of(tomllib.loads(path.read_text()))
