"""Writes parity.npz: the outputs of transformers for the parity cases, so that tests need no torch.

python -m tests.golden.make_golden
"""

import numpy as np

from tests import hf_reference
from tests import policy_fixtures as fixtures
from tests.test_policy_parity import GOLDEN, PATH


def main() -> None:
  arrays = {}
  for name, cfg in fixtures.family_configs().items():
    hf = hf_reference.model(cfg, fixtures.small_params(cfg))
    for case in fixtures.cases():
      if case.config == name:
        reference = hf_reference.reference(case, hf)
        if name in GOLDEN:
          arrays |= {f"{case.name}/{key}": value for key, value in reference.items()}
        steps = fixtures.compared_steps(reference["margins"])
        print(f"{case.name}: {steps} steps, logits have std {reference['logits'].std():.2f}")
  np.savez_compressed(PATH, **arrays)


if __name__ == "__main__":
  main()
