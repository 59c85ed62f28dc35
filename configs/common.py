"""Every default, with its unit and the reason; the other configs state only what differs.

Shapes are those of the embedded policy: 168-pixel pictures, 14-pixel patches, 36 tokens each.
"""

from ml_collections import ConfigDict

CELL_PX = 28  # side of a merged token: 2 patches of 14


def get_config() -> ConfigDict:
  """Reinforcement learning of the embedded policy on procedural rooms."""
  cfg = ConfigDict()
  cfg.stage = "grpo"
  cfg.seed = 0
  cfg.init = "spatial_jax/assets/tiny"  # Hugging Face folder or work directory of a run
  cfg.lora = ConfigDict({"paths": (), "rank": 16, "alpha": 32.0})  # (): all parameters learn
  cfg.remat = True  # on two cores, layers are computed again faster than they are stored
  cfg.loop = loop(56)
  cfg.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: all devices that are left
  cfg.source = source()
  cfg.text = text()
  cfg.preprocess = preprocess()
  cfg.rollout = rollout()
  cfg.style = style()
  cfg.executor = ConfigDict({"workers": 1, "timeout_s": 20.0, "memory_mib": 1024})
  cfg.learn = learn(56)
  cfg.evaluation = evaluation()
  return cfg


def learn(steps: int) -> ConfigDict:
  """AP-GRPO on SNRA, gate on the hard score."""
  return ConfigDict(
    {
      "reward": {
        "number": "sigmoid",
        # A wrong letter gets 0.54, so that choices, hardly above chance, say half as much as
        # numbers: with 0 they were a third of the rollouts, two thirds of the squared advantages.
        "choice": "smooth",
        "schedule": {
          "kind": "sigmoid",
          # Reward of an answer 20 % off: 0.80 at 10, 0.34 at 40. At 1 it is 0.98, too flat to rank
          # guesses; at the paper's 100 it is 0.04. MRA gives 0.6.
          "k_min": 10.0,
          "k_max": 40.0,
          "midpoint": 0.25,  # of the run, which is short: most of it at the final sharpness
          "steepness": 10.0,  # three quarters of the way within a fifth of the run on either side
        },
        "discrete_sharpness": 1.0,  # of a choice, throughout the run
        "strict_mra": False,  # the benchmark's <=; ViLaSR trains with <
        "score_threshold": 0.0,  # the hard score that opens the gate: any above it
        "format_weight": 0.2,  # a tie-breaker among right answers, never a goal
        "gate": "format",
      },
      "advantage": {
        "alpha": 1.0,
        # Plain, an answer that earned nothing is never counted against: in a hundred steps,
        # unreadable answers went from one in a hundred to four.
        "sign_safe": True,
        # Without the division a gradient bought four times as much reward for the same noise
        # (measured at alpha 0, each response counting the same).
        "by_std": False,
      },
      "loss": {"clip_low": 0.2, "clip_high": 0.3, "kl_weight": 0.0, "normalise": "sequence"},
      "optimizer": low_noise(optimizer(7e-4, steps)),
      "keep_fraction": 0.5,  # holds 95 % of the squared advantages, takes 0.7 of an update's time
      "prefix_buckets": (160, 512),  # few: a trace of the update takes half a minute to compile
      # Prompts and what was drawn on them: 20 to 60 pictures in a default step, one trace.
      "vision": {"windows": (256, 1024, 2048), "frames": (64, 256, 512), "patches": (144,)},
      # Most answers are one number, 27 tokens, or two places, 75; a drawing of a box and then a
      # number are 150.
      "micro": {"rows": 8, "lengths": (32, 80, 160, 256)},
      "save_rollouts_every": 10,  # steps between two whose rollouts the report may show
      "saved_groups": 3,  # prompts of such a step
    }
  )


def evaluation() -> ConfigDict:
  """Held-out tasks of the run's own source, before and after."""
  return ConfigDict(
    {
      "tasks": 1024,  # with 512, the interval of the greedy difference is wider than the promise
      "train_tasks": 2000,  # what the median answer per question type is taken from
      "temperatures": (0.3, 0.5, 0.7),
      "best_of": 0,  # such samples cost as much as all else together
      "prompts": 256,  # per call
      "slots": 64,  # of them at once
      "gallery": 8,
      "required": False,  # the default run promises its differences, others show them
    }
  )


def loop(steps: int) -> ConfigDict:
  """How long, and how often it is saved."""
  return ConfigDict(
    {
      "steps": steps,
      "checkpoint_every": 10,  # steps; a kill loses at most so many
      "keep": 2,
      "log": {"tensorboard": False, "wandb": False},
    }
  )


def source() -> ConfigDict:
  """Procedural rooms of 4 to 10 objects, seen once."""
  return ConfigDict(
    {
      "kind": "procedural",  # or "rooms", "photos"
      "path": "",  # of the data, where it is not procedural
      "rooms": {
        "objects": (4, 10),
        "side_m": (3.0, 6.0),
        "l_shape_share": 0.25,
        "repeat_share": 0.5,
      },
      "camera": {
        "width_px": 168,
        "height_px": 168,
        "field_of_view_deg": 75.0,  # a phone held wide
        "frame_counts": (1,),
      },
      "questions": {
        "types": (
          "object_counting",
          "object_abs_distance",
          "object_size_estimation",
          "object_rel_distance",
          "object_rel_direction_easy",
          "object_rel_direction_medium",
          "object_rel_direction_hard",
          "camera_distance",
        ),
        "max_per_type": 4,
        "min_pixels": 200,  # of 168 x 168: a quarter of a 28-pixel cell, else another fills it
        "min_fraction": 0.5,
        "scope": "views",  # a picture of a procedural room need not show all of it
        "seconds_per_view": 2.0,
        "prefix": "",
      },
      "max_tasks_per_scene": 2,  # tasks of one room in a batch: pictures cost, variety pays
      # For directions, which one room in 20 offers; every room that is tried is rendered.
      "rare_type_retries": 2,
    }
  )


def text() -> ConfigDict:
  """The words around questions and drawings: ViLaSR's grammar, asked for in few tokens."""
  return ConfigDict(
    {
      "system": "",
      "image_line": "image {index} ({width} x {height})\n",
      "question": "{question}\nThink, draw if it helps, then answer:",
      "number_suffix": "\nAnswer with a number.",
      "choice_suffix": "\nAnswer with the option's letter.",
      "observation": "image {index} ({width} x {height})\n",
      "more": "Draw again or answer:",
      "final": "Now answer:",
      # A drawing earns this small policy nothing, so that it stops drawing unless the response is
      # begun for it. Choices are not: the policy was never taught to draw for one.
      "response_prefix": "<think> I mark the",
      "response_prefix_fraction": 0.1,
    }
  )


def preprocess() -> ConfigDict:
  """As in Qwen2.5-VL but for the budget: one picture is 168 x 168 pixels."""
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


def style() -> ConfigDict:
  """Drawing sizes for pictures of 168 pixels; ViLaSR's 4, 4, 10, (8, 6) are for 448."""
  return ConfigDict({"line_px": 2, "dot_px": 3, "font_px": 10, "label_offset_px": (3, 1)})


def rollout() -> ConfigDict:
  """Rollouts of a step; most tokens of a demonstrated turn are 70."""
  return ConfigDict(
    {
      "prompts": 32,  # of twice as many steps of half the size, noise took over
      "group": 8,
      "slots": 32,  # groups on the devices at once: here all of a step
      "rows": 0,  # rollouts of these groups that sample at once; 0: all of them
      "prefill": (32,),  # prompts read by one call
      "append": (8,),  # observations read by one call: a batch draws 30 to 60 times
      "decode_steps": 16,  # tokens per call; what a row that stopped waits for
      "gather_fractions": (
        0.5,
        0.25,
        0.125,
      ),  # half are short answers; second turns and the longest are few
      "schedule": "logical",  # repeatable to the bit; "eager" takes drawings as they come
      "drawing_delay": 1,  # chunks that a drawing has time for
      "weights": "compute",  # or "int8": for devices whose memory decoding waits for
      "sampling": {
        "temperature": 1.0,
        "greedy": False,
        "top_k": 0,
        "top_p": 1.0,  # the whole distribution: truncated samples are off-policy
        "min_p": 0.0,
        "max_tokens_per_turn": 0,  # no fewer than below
      },
      "max_tokens_per_turn": 128,  # nearly twice a demonstrated turn
      "stop": {
        "max_turns": 2,
        "max_images": 8,
        "max_image_tokens": 512,
        "max_response_tokens": 255,
      },  # in all
      "stop_tokens": ("<|im_end|>",),
      "stop_strings": (),
      "limits": {  # of one turn; what is beyond them is an error of the turn, not of the run
        "blocks": 4,
        "block_chars": 2000,
        "depth": 8,
        "operations": 8,
        "label_chars": 40,
        "digits": 6,
      },
      "prompt_buckets": (160, 512),
      "observation_buckets": (64, 128, 256),
      "suffix_block_edges": (96,),  # a first turn; half a step's time was spent on empty slots
      "feature_buffer_tokens": 8192,  # 227 pictures of 36 tokens, 6 MiB
      "vision": {
        # One 168-pixel picture is 4 windows of 3 x 3 tokens, one frame of 144 patches.
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
        "window_px": 84,  # 3 x 3 merged tokens: 168-pixel pictures divide into 4 windows
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


def optimizer(learning_rate: float, steps: int) -> ConfigDict:
  """AdamW; a late linear decay, so that a run can be prolonged by resuming before it."""
  return ConfigDict(
    {
      "learning_rate": learning_rate,
      "schedule": "constant",
      "warmup_steps": min(20, steps // 5),
      "total_steps": steps,
      "decay_steps": 0,
      "b1": 0.9,
      "b2": 0.95,
      "eps": 1e-8,
      "weight_decay": 0.01,
      "max_grad_norm": 1.0,
      "scale_by_param_rms": False,
      "gains": (),
      "gain_rate": 0.0,
      "frozen": (),
    }
  )


def low_noise(cfg: ConfigDict) -> ConfigDict:
  """For gradients that are mostly noise, those of 256 rollouts.

  Adam moves a parameter whose gradient is noise as fast as any other, at random; a long memory and
  an epsilon of the size of such gradients hold it back. Frozen are queries, keys, gates and up
  projections, which hold half of the noise and less than a third of the signal (40 gradients of the
  default run); the embedding, whose gradient mostly learns which digits are frequent; and the
  tower, which has learned to see before. Of the last norm one common factor learns, the policy's
  inverse temperature; the rest of its gradient is noise.
  """
  cfg.b2 = 0.99
  cfg.scale_by_param_rms = True
  cfg.gains = ("^decoder/norm/",)
  cfg.gain_rate = 0.03
  cfg.decay_steps = cfg.total_steps // 2  # what noise has moved comes to rest
  cfg.eps = 1e-5
  cfg.frozen = ("vision/", "decoder/embed/", "attn/[qk]/", "mlp/(gate|up)/")
  return cfg
