"""The engine of a run: its policy's rollout programs, its words, its drawing workers."""

from spatial_jax import programs
from spatial_jax.data.text import IM_END
from spatial_jax.drawing.executor import Executor
from spatial_jax.policy.qwen_vl import Policy
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.engine import Engine, RolloutConfig


def make_engine(
  policy: Policy, conversation: Conversation, executor: Executor, cfg: RolloutConfig
) -> Engine:
  """An engine on the policy's mesh, its buckets such that the mesh's kernels can read them."""
  cfg = programs.rollout_buckets(cfg, programs.train_mesh(policy))
  stop_id = conversation.tokenizer.id(IM_END)
  return Engine(conversation, programs.rollout_programs(policy, cfg, stop_id), executor, cfg)
