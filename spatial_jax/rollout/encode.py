"""Task -> prompt that a run can use; a small record that worker processes receive."""

import dataclasses

from spatial_jax.data.vision_packing import bucket
from spatial_jax.rollout.config import RolloutConfig
from spatial_jax.rollout.conversation import Conversation
from spatial_jax.rollout.image_feature_cache import check_room
from spatial_jax.types import Prompt, Task


@dataclasses.dataclass(frozen=True, eq=False)
class PromptEncoder:
  """Encodes tasks, and refuses those that the shapes of the rollouts do not hold."""

  conversation: Conversation
  cfg: RolloutConfig

  def __call__(self, task: Task) -> Prompt:
    """Returns the prompt of a task.

    Raises:
      DataError: if media cannot be read, or the prompt is longer or has more or larger images than
        the largest buckets hold; the message names the task.
    """
    prompt = self.conversation.prompt(task)
    name = f"tokens in the prompt of task {task.task_id}; raise config.rollout.prompt_buckets: they"
    bucket(len(prompt.token_ids_T), self.cfg.prompt_buckets, name)
    check_room(prompt, self.cfg, self.conversation.policy.vision.window_blocks)
    return prompt
