"""Writes parity.npz: what transformers computes for every parity case, so that tests need no torch.

python -m tests.golden.make_golden
"""

import pathlib

import numpy as np

from tests import hf_reference
from tests import policy_fixtures as fixtures

PATH = pathlib.Path(__file__).parent / "parity.npz"


def main() -> None:
  arrays = {}
  for tied in (True, False):
    cfg = fixtures.small_config(tied)
    hf = hf_reference.model(cfg, fixtures.small_params(cfg))
    for case in fixtures.cases():
      if case.tied == tied:
        reference = hf_reference.reference(case, cfg, hf)
        arrays |= {f"{case.name}/{key}": value for key, value in reference.items()}
        steps = fixtures.compared_steps(reference["margins"])
        print(f"{case.name}: {steps} steps, logits deviate by {reference['logits'].std():.2f}")
  np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
  main()
