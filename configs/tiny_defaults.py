"""The settings of the embedded policy, which the other configs/tiny*.py begin with.

Its shapes: images of 168 pixels, patches of 14, 36 tokens per image. Values that do not depend on
the policy are in configs/common.py.
"""

from ml_collections import ConfigDict, FieldReference

from configs import common, losses, sources, supervised

CELL_PX = 28  # side of a merged token: 2 patches of 14


def get_config() -> ConfigDict:
  """Reinforcement learning of the embedded policy on procedural rooms.

  --config.loop.steps=200 is enough: warm-up, decay and sharpness follow it.
  """
  cfg, steps = ConfigDict(), FieldReference(56)
  cfg.stages = ("grpo",)  # run in this order
  # Image sizes, lengths and optimizer below are those of the embedded policy, 3.1 M parameters.
  cfg.max_parameters = 20_000_000
  cfg.seed = 0
  cfg.init = "spatial_jax/assets/tiny"  # Hugging Face folder or work directory of a run
  cfg.lora = ConfigDict({"paths": (), "rank": 16, "alpha": 32.0})  # (): no adapters
  cfg.remat = True  # on two cores recomputing layers is faster than storing them
  # Of parameters that are not trained. "compute" (bfloat16, on CPU float32) changes no activation,
  # because every use rounds to it; "float32" takes twice the memory, "bfloat16" half on CPU too.
  cfg.frozen_dtype = "compute"
  cfg.loop = common.loop(steps)
  cfg.loop.evaluate_every = 8  # steps
  cfg.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all remaining devices
  cfg.source = source()
  cfg.text = "tiny"  # prompt form: ViLaSR's conversation in few tokens; see docs/prompts.md
  cfg.preprocess = preprocess()
  cfg.video = video()
  cfg.rollout = rollout()
  cfg.style = style()
  cfg.executor = ConfigDict({"workers": 1, "timeout_s": 20.0, "memory_mib": 1024})
  cfg.pipeline = ConfigDict({"workers": 0, "steps_ahead": 2})  # a thread renders rooms
  cfg.sft = sft(60)
  cfg.reject = reject()
  cfg.dpo = dpo(40)
  cfg.learn = learn(steps)
  cfg.evaluation = evaluation()
  return cfg


def learn(steps: int | FieldReference) -> ConfigDict:
  """AP-GRPO on SNRA as the papers have them; alpha 0 is plain GRPO."""
  minibatches, epochs = FieldReference(1), FieldReference(1)
  steps = steps * minibatches * epochs  # the schedule counts updates
  return ConfigDict(
    {
      "reward": common.reward(),
      "advantage": common.advantage(),
      "loss": losses.grpo(),
      # The gradients of 256 rollouts are mostly noise, which AdamW turns into steps of full size.
      # At a rate of 1e-4 the score rises for 14 steps and falls again. A long second moment and a
      # long decay keep the noise small too. The embedding mostly learns which digits are frequent.
      "optimizer": supervised.optimizer(
        5e-5, steps, b2=0.99, decay_steps=steps * 3 // 4, frozen=("^vision/", "^decoder/embed/")
      ),
      "health": common.health(),
      "minibatches": minibatches,
      "epochs": epochs,
      "max_refills": 0,
      "mask_truncated": False,
      "keep_fraction": 1.0,  # all rollouts; 0.5 holds 95 % of the squared advantages
      "prefix_buckets": (160, 512),  # few: a trace of the update takes half a minute to compile
      # Prompts and drawings: 20 to 60 images in a default step, one trace.
      "vision": {"windows": (256, 1024, 2048), "frames": (64, 256, 512), "patches": (144,)},
      # Most answers are one number, 27 tokens, or two places, 75; a drawing of a box and then a
      # number are 150.
      "micro": {"rows": 8, "lengths": (32, 80, 160, 256)},
      # Of a KL term without adapters. "host" frees 2 bytes per trained parameter on the devices and
      # moves them there once per step; the log-probabilities have the same bits.
      "reference": "device",
      "save_rollouts_every": 10,  # steps
      "saved_groups": 3,  # of such a step
    }
  )


_FROZEN = ("^vision/", "^decoder/embed/")


def sft(steps: int) -> ConfigDict:
  """Demonstrations of the solver."""
  cfg = supervised.sft(3e-4, steps, _FROZEN)
  _imitate(cfg)
  return cfg


def _imitate(cfg: ConfigDict) -> None:
  """Small batches in which every token counts the same."""
  cfg.update({"batch": 32, "micro_rows": 8, "normalise": "token"})
  cfg.optimizer.b2 = 0.95


def reject() -> ConfigDict:
  """A few hundred sampled tasks, and some steps on what was kept."""
  cfg = supervised.reject(1e-4, 96)
  cfg.train = supervised.imitation(1e-4, 20, _FROZEN)
  _imitate(cfg.train)
  return cfg


def dpo(steps: int) -> ConfigDict:
  """Few short pairs."""
  cfg = supervised.dpo(2e-5, steps, _FROZEN)
  cfg.update({"batch": 32, "micro_rows": 8})
  cfg.optimizer.b2 = 0.95
  return cfg


def evaluation() -> ConfigDict:
  """Held-out tasks of the source of the run, answered by the start and the end policy."""
  return ConfigDict(
    {
      "progress_tasks": 96,  # during training, of the first ones
      "tasks": 384,  # the 95 % interval of a greedy difference is +-0.04
      "train_tasks": 2000,  # for the median answer per question type
      "temperatures": (0.3, 0.5, 0.7),
      "best_of": 0,  # 8 samples cost as much as the rest of the evaluation
      "pass_at": 0,
      "other_images": True,
      "prompts": 192,  # per call of the engine
      "slots": 64,  # of them at once
      "gallery": 8,
    }
  )


def source() -> ConfigDict:
  """Procedural rooms of 4 to 10 objects, one image each."""
  cfg = sources.source()
  cfg.kind = "procedural"
  cfg.camera.width_px = cfg.camera.height_px = 168
  cfg.mazes.size_px = cfg.physics.size_px = 168
  cfg.mazes.update({"cells": 3, "path_cells": (2, 4), "lines": 3, "crossings": 2})
  return cfg


def preprocess() -> ConfigDict:
  """As in Qwen2.5-VL, but images have 168 x 168 pixels."""
  return ConfigDict(
    {
      "patch_size": 14,
      "merge_size": 2,
      "temporal_size": 2,
      "min_pixels": 56 * 56,
      "max_pixels": 168 * 168,
      "mean": (0.48145466, 0.4578275, 0.40821073),
      "std": (0.26862954, 0.26130258, 0.27577711),
    }
  )


def video() -> ConfigDict:
  """Two frames a second as in Qwen2.5-VL, in the size of images."""
  return ConfigDict(
    {
      "as_images": False,
      "fps": 2.0,
      "min_frames": 4,
      "max_frames": 16,
      "min_pixels": 56 * 56,
      "max_pixels": 168 * 168,
    }
  )


def style() -> ConfigDict:
  """Drawing sizes for images of 168 pixels; ViLaSR's 4, 4, 10, (8, 6) are for 448."""
  return ConfigDict({"line_px": 2, "dot_px": 3, "font_px": 10, "label_offset_px": (3, 1)})


def rollout() -> ConfigDict:
  """Rollouts of a step; demonstrated turns have up to 70 tokens."""
  return ConfigDict(
    {
      "prompts": 32,  # twice as many steps of half the size learned less
      "group": 8,
      "slots": 32,  # groups on the devices at once: all groups of a step
      "rows": 0,  # rollouts that sample at once; 0: all rollouts of the slots
      "prefill": (32,),  # prompts per call
      "append": (8,),  # observations per call; a step can have 30 to 60 of them
      "decode_steps": 16,  # tokens per call; a row that stopped waits for the end of the call
      # Half of the answers are short; second turns and the longest answers are few.
      "gather_fractions": (0.5, 0.25, 0.125),
      "schedule": "logical",  # repeatable to the bit; "eager" takes drawings as they come
      "drawing_delay": 1,  # decode calls until a drawing has to be ready
      "weights": "compute",  # or "int8", if reading the weights bounds the speed of decoding
      "sampling": {
        "temperature": 1.0,
        "greedy": False,
        "top_k": 0,
        "top_p": 1.0,  # the whole distribution: truncated samples are off-policy
        "min_p": 0.0,
        "max_tokens_per_turn": 0,  # the limit below
      },
      "max_tokens_per_turn": 128,  # nearly twice a demonstrated turn
      "stop": {  # of a whole rollout
        "max_turns": 2,
        "max_images": 8,
        "max_image_tokens": 512,
        "max_response_tokens": 255,
        "near_duplicate_px": 0.0,
      },
      "stop_tokens": ("<|im_end|>",),
      "stop_strings": (),
      "limits": common.limits(),
      "prompt_buckets": (160, 512),
      "observation_buckets": (64, 128, 256),
      "suffix_block_edges": (96,),  # a first turn; without it attention reads twice the cache
      "feature_buffer_tokens": 8192,  # 227 images of 36 tokens, 6 MiB
      "vision": {
        # One 168-pixel image is 4 windows of 3 x 3 tokens, one frame of 144 patches.
        # Few sizes: each is a trace, and a trace costs seconds to half a minute.
        "windows": (64, 128, 256, 1024, 2048),
        "frames": (16, 32, 64, 256, 512),
        "patches": (144,),
      },
    }
  )


def policy() -> ConfigDict:
  """The embedded policy's shape: 3 M parameters; ids of special tokens come with the tokenizer."""
  return ConfigDict(
    {
      "family": "qwen2_5_vl",
      "vision": {
        "layers": 4,
        "width": 128,
        "heads": 4,
        "mlp_width": 352,
        "patch_size": 14,
        "merge_size": 2,
        "temporal_size": 2,
        "window_px": 84,  # 3 x 3 merged tokens: 168-pixel images divide into 4 windows
        "full_layers": (1, 3),
        "norm_eps": 1e-6,
        "norm": "rms",
        "mlp": "gated",
        "patch_bias": False,
        "table_side": 0,
        "deepstack": (),
      },
      "decoder": {
        "layers": 4,
        "width": 192,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 32,
        "mlp_width": 512,
        "vocabulary": 1024,
        "rope_theta": 10000.0,
        "rope_sections": (4, 6, 6),
        "norm_eps": 1e-6,
        "tied": True,
        "rope_interleaved": False,
        "qkv_bias": True,
        "qk_norm": False,
      },
    }
  )
