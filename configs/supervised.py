"""Defaults of the optimizer and of the supervised stages: SFT, rejection sampling, DPO."""

from ml_collections import ConfigDict, FieldReference


def demonstrations(learning_rate: float, steps: int, frozen: tuple[str, ...]) -> ConfigDict:
  """What SFT and DPO share."""
  updates = FieldReference(steps)
  return ConfigDict(
    {
      "steps": updates,
      "batch": 32,  # ViLaSR's number of devices, one demonstration each
      "tokens": None,
      "micro_rows": None,
      "pack": True,
      "optimizer": optimizer(learning_rate, updates, b2=0.999, warmup=10, frozen=frozen),
    }
  )


def imitation(
  learning_rate: float, steps: int, frozen: tuple[str, ...] = ("^vision/",)
) -> ConfigDict:
  """What SFT and rejection sampling share."""
  cfg = demonstrations(learning_rate, steps, frozen)
  cfg.optimizer.schedule = "cosine"
  cfg.normalise = "sequence"
  return cfg


def sft(
  learning_rate: float, steps: int = 3000, frozen: tuple[str, ...] = ("^vision/",)
) -> ConfigDict:
  """ViLaSR's cold start: 33,000 demonstrations, three times."""
  cfg = imitation(learning_rate, steps, frozen)
  cfg.update({"path": "", "draw_fraction": 1.0, "correct_fraction": 0.0})  # "": config.source
  return cfg


def reject(learning_rate: float, tasks: int = 40000, steps: int = 700) -> ConfigDict:
  """ViLaSR's reflective rejection sampling: 7,800 kept demonstrations, three times."""
  return ConfigDict(
    {
      "path": "",
      "tasks": tasks,
      "keep": {
        "min_score": 0.5,
        "executable": True,
        "reflective": True,
        "min_turns": 1,
        "per_task": 1,
      },
      "train": imitation(learning_rate, steps),
    }
  )


def dpo(
  learning_rate: float, steps: int = 1000, frozen: tuple[str, ...] = ("^vision/",)
) -> ConfigDict:
  """Pairs of a right and a wrong answer, as in vsGRPO; its settings are not stated."""
  cfg = demonstrations(learning_rate, steps, frozen)
  cfg.update(
    {
      "path": "",  # config.source
      "pairs": "corrupted",
      "loss": {"kind": "sigmoid", "beta": 0.1, "label_smoothing": 0.0},
      "sampled_tasks": 1000,
      "min_gap": 0.1,
    }
  )
  return cfg


def optimizer(
  learning_rate: float,
  steps: int | FieldReference,
  b2: float = 0.95,
  decay_steps: int | FieldReference = 0,
  frozen: tuple[str, ...] = (),
  warmup: int = 5,
) -> ConfigDict:
  """AdamW: linear warm-up over steps / `warmup`, then constant, then a linear decay if any."""
  return ConfigDict(
    {
      "kind": "adamw",
      "learning_rate": learning_rate,
      "rates": (),  # "^vision/=0.1": a tenth of the rate
      "schedule": "constant",
      "warmup_steps": steps // warmup,
      "total_steps": steps * 1,  # a reference of its own: it can be set without loop.steps
      "decay_steps": decay_steps,  # the last ones
      "b1": 0.9,
      "b2": b2,
      "eps": 1e-8,
      # "bfloat16" saves 2 bytes per trained parameter; the steps differ by the rounding, 0.4 %.
      "mu_dtype": "float32",
      # "bfloat16" saves 2 bytes more during the update; 64 microbatches lose about 1 % of an entry.
      "gradient_dtype": "float32",
      "weight_decay": 0.01,
      "max_grad_norm": 1.0,
      "scale_by_param_rms": False,
      "frozen": frozen,
      "ema_decay": 0.0,
    }
  )
