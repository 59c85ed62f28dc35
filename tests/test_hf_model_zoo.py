"""Released configs: their parameter counts, against docs/policies.md and transformers."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from spatial_jax.hf import config
from spatial_jax.hf.model_zoo import NAMES, parameter_count, released
from spatial_jax.policy.qwen_vl import make_policy

DOCS = pathlib.Path(__file__).parent.parent / "docs" / "policies.md"


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_has_the_parameters_of_its_name_table(name):
  policy = make_policy(released(name), jnp.float32)
  leaves = jax.tree.leaves(jax.eval_shape(policy.init, jax.random.key(0)))
  assert sum(leaf.size for leaf in leaves) == parameter_count(policy.cfg)


def test_the_docs_list_every_released_config():
  rows = re.findall(r"^\| (Qwen\S+) \| ([\d,]+) \|", DOCS.read_text(), re.MULTILINE)
  assert {name: int(count.replace(",", "")) for name, count in rows} == {
    name: parameter_count(released(name)) for name in NAMES
  }


@pytest.mark.torch
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NAMES)
def test_transformers_counts_the_same_parameters(name, tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch (extra bench)")
  from transformers import AutoConfig, AutoModelForImageTextToText

  cfg = released(name)
  (tmp_path / "config.json").write_text(json.dumps(config.to_hf(cfg)))
  with torch.device("meta"):
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
  assert sum(weight.numel() for weight in model.parameters()) == parameter_count(cfg)
