"""AP-GRPO from the embedded policy on procedural rooms: the default run.

Source: Smooth Operator (arXiv:2601.07695: SNRA, AP-GRPO); ViLaSR (arXiv:2506.09965: drawing).
Expected: see the table in README.md. Time: 7 minutes on two CPU cores.
Command: ./launch/local.sh
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
  """The defaults are this run; its table says whether it kept its promises."""
  cfg = common.get_config()
  cfg.evaluation.required = True
  return cfg
