"""Measures the table of `synthetic/numerical3d_balance.py`: how often a candidate is kept.

    python -m experiments.numerical3d_balance --rooms=3000 --workers=2

It collects all candidates of rooms of the highest seed, which is never built by default. The
target is that equally many answers lie in each range of equal ratio. Reaching it exactly throws
nearly all candidates away, so the common answers are kept more often than that, as long as the best
constant scores `--score` or less.
"""

import argparse
import multiprocessing
from collections.abc import Iterator

import numpy as np

from spatial_jax.report.dataset_statistics import best_constant
from spatial_jax.synthetic.numerical3d import MAX_PER_TYPE, TYPES, candidates, visibilities
from spatial_jax.synthetic.numerical3d_balance import EDGES
from spatial_jax.synthetic.numerical3d_rooms import (
  MAX_ROOMS,
  MAX_SEEDS,
  numerical3d_scene,
  numerical3d_views,
)

_ROUNDS = 40
_YIELD = 0.36  # tasks per room and type; more of one type would be too many of it

Answers = dict[str, list[float]]  # type -> answers of the candidates of one room, in random order


def main() -> None:
  """Prints one line per type: probabilities, tasks per room, score of the best constant."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rooms", type=int, default=3000)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--score", type=float, default=0.36, help="of the best constant")
  arguments = parser.parse_args()
  first = (MAX_SEEDS - 1) * MAX_ROOMS
  with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
    rooms = list(pool.imap(room_answers, range(first, first + arguments.rooms), chunksize=20))
  for name in TYPES:
    answers = [room.get(name, []) for room in rooms]
    flat = flat_keep(name, answers)
    keep, kept = spread(name, answers, flat, arguments.score)
    score, per_room = best_constant(kept).score, len(kept) / len(rooms)
    print(f'  "{name}": {tuple(float(f"{value:.2g}") for value in keep)},')
    print(f"  # {per_room:.3f} tasks per room, best constant {score:.3f}", flush=True)


def room_answers(number: int) -> Answers:
  """The answers of all candidates of a room."""
  scene = numerical3d_scene(number)
  views = scene and numerical3d_views(scene, number)
  if scene is None or views is None:
    return {}
  found = candidates(*visibilities(scene, views), number)
  return {name: [float(draft.answer) for draft in drafts] for name, drafts in found.items()}


def flat_keep(name: str, answers: list[list[float]]) -> np.ndarray:
  """Probabilities that spread the answers evenly over the logarithm, the largest one 1."""
  edges = np.array(EDGES[name])
  target = np.log(edges[1:] / edges[:-1])
  keep = np.ones(len(target))
  for seed in range(_ROUNDS):
    found = np.histogram(simulate(name, answers, keep, seed), edges)[0] + 0.5
    keep *= np.sqrt(target / target.sum() / (found / found.sum()))
    keep /= keep.max()
  return keep


def spread(
  name: str, answers: list[list[float]], flat: np.ndarray, score: float
) -> tuple[np.ndarray, np.ndarray]:
  """The most candidates that keep the best constant at `score`: probabilities, kept answers."""
  best = flat, simulate(name, answers, flat, 0)
  for scale in np.geomspace(0.3, 1 / flat.min(), 100):
    keep = np.minimum(1.0, flat * scale)
    kept = simulate(name, answers, keep, 0)
    if len(kept) > _YIELD * len(answers) or best_constant(kept).score > score:
      break
    best = keep, kept
  return best


def simulate(name: str, answers: list[list[float]], keep: np.ndarray, seed: int) -> np.ndarray:
  """The answers that `numerical3d.choose` would keep."""
  rng = np.random.default_rng(seed)

  def kept() -> Iterator[float]:
    for room in answers:
      bins = np.searchsorted(EDGES[name], room, side="right") - 1
      inside = (bins >= 0) & (bins < len(keep))
      chance = np.where(inside, keep[np.clip(bins, 0, len(keep) - 1)], 0.0)
      yield from np.array(room)[rng.random(len(room)) < chance][: MAX_PER_TYPE[name]].tolist()

  return np.array(list(kept()))


if __name__ == "__main__":
  main()
