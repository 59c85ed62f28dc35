"""The held-out split of rendered rooms and of VSI-Bench's rooms; `data.files` splits user data."""

import zlib

# Procedural rooms with this number or a higher one are never trained on, by any config.
HELD_OUT_SEED = 1_000_000_000
_PART = 5  # one of five real rooms is held out


def is_held_out(scene_id: str) -> bool:
  """Whether a real room is held out; depends on its id alone, not on the other rooms."""
  return zlib.crc32(scene_id.encode()) % _PART == 0
