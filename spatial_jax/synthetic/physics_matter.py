"""Problems of mechanics, thermodynamics and modern physics."""

import math

import numpy as np

from spatial_jax.synthetic.physics_problem import Problem, Shape, Template, line, pick, text

_G = 9.8  # m/s^2


def _incline(rng: np.random.Generator) -> Problem:
  angle = pick(rng, 15, 20, 25, 30, 35, 40)
  value = _G * math.sin(math.radians(angle))
  shapes = (
    line(0.1, 0.85, 0.9, 0.85, 0.9, 0.35, 0.1, 0.85),
    Shape("box", (0.5, 0.45, 0.63, 0.58)),
    text(0.42, 0.8, f"{angle:g} deg"),
  )
  return Problem(
    "incline", "Mechanics", "Dynamics", "Newton's second law",
    "A block slides down an incline without friction.",
    (("angle", f"{angle:g} degrees"), ("g", "9.8 m/s^2")),
    "What is its acceleration?", value, "m/s^2",
    f"Newton: net force along the slope. a = g sin {angle:g} = {value:.2f}.", shapes,
  )  # fmt: skip


def _pulley(rng: np.random.Generator) -> Problem:
  light = pick(rng, 1, 2, 3)
  heavy = light + pick(rng, 1, 2, 3, 4)
  value = _G * (heavy - light) / (heavy + light)
  shapes = (
    Shape("disc", (0.38, 0.1, 0.62, 0.34)),
    line(0.38, 0.22, 0.38, 0.7),
    line(0.62, 0.22, 0.62, 0.55),
    Shape("box", (0.3, 0.7, 0.46, 0.86)),
    Shape("box", (0.55, 0.55, 0.69, 0.69)),
    text(0.38, 0.93, f"{heavy:g} kg"),
    text(0.62, 0.77, f"{light:g} kg"),
  )
  return Problem(
    "pulley", "Mechanics", "Dynamics", "Newton's second law",
    "Two masses hang from a light pulley.",
    (("m1", f"{heavy:g} kg"), ("m2", f"{light:g} kg"), ("g", "9.8 m/s^2")),
    "What is their acceleration?", value, "m/s^2",
    f"Newton: net force. a = g ({heavy:g} - {light:g}) / ({heavy:g} + {light:g}) = {value:.2f}.",
    shapes,
  )  # fmt: skip


def _projectile(rng: np.random.Generator) -> Problem:
  speed, height = pick(rng, 2, 3, 4, 5, 6), pick(rng, 1.25, 2, 3, 5)
  time = math.sqrt(2 * height / _G)
  value = speed * time
  shapes = (
    line(0.08, 0.35, 0.35, 0.35, 0.35, 0.88, 0.92, 0.88),
    Shape("disc", (0.29, 0.27, 0.36, 0.34)),
    Shape("arrow", (0.38, 0.3, 0.56, 0.3)),
    text(0.5, 0.22, f"{speed:g} m/s"),
    text(0.22, 0.62, f"{height:g} m"),
  )
  return Problem(
    "projectile", "Mechanics", "Kinematics", "projectile motion",
    "A ball leaves a table horizontally.",
    (("speed", f"{speed:g} m/s"), ("height", f"{height:g} m"), ("g", "9.8 m/s^2")),
    "How far from the table does it land?", value, "m",
    f"Projectile motion: t = sqrt(2 * {height:g} / 9.8) = {time:.2f} s. "
    f"x = {speed:g} t = {value:.2f}.", shapes,
  )  # fmt: skip


def _piston(rng: np.random.Generator) -> Problem:
  before, after, volume = pick(rng, 100, 150, 200), pick(rng, 250, 300, 400), pick(rng, 2, 3, 6)
  value = before * volume / after
  shapes = (
    line(0.3, 0.15, 0.3, 0.85, 0.7, 0.85, 0.7, 0.15),
    Shape("box", (0.3, 0.35, 0.7, 0.43)),
    Shape("arrow", (0.5, 0.12, 0.5, 0.33)),
    text(0.5, 0.64, f"{volume:g} L, {before:g} kPa"),
    text(0.5, 0.93, f"to {after:g} kPa"),
  )
  return Problem(
    "piston", "Thermodynamics", "Ideal Gases and Kinetic Theory", "Boyle's law",
    "A piston compresses an ideal gas at constant temperature.",
    (("V1", f"{volume:g} L"), ("p1", f"{before:g} kPa"), ("p2", f"{after:g} kPa")),
    "What is the new volume?", value, "L",
    f"Boyle, ideal gas: V2 = p1 V1 / p2 = {before:g} * {volume:g} / {after:g} = {value:.3g}.",
    shapes,
  )  # fmt: skip


def _mixing(rng: np.random.Generator) -> Problem:
  m1, m2, t1, t2 = pick(rng, 1, 2), pick(rng, 1, 3), pick(rng, 60, 80, 90), pick(rng, 10, 20)
  value = (m1 * t1 + m2 * t2) / (m1 + m2)
  shapes = (
    Shape("box", (0.1, 0.3, 0.42, 0.75)),
    Shape("box", (0.58, 0.3, 0.9, 0.75)),
    text(0.26, 0.47, f"{m1:g} kg"),
    text(0.26, 0.6, f"{t1:g} °C"),
    text(0.74, 0.47, f"{m2:g} kg"),
    text(0.74, 0.6, f"{t2:g} °C"),
  )
  return Problem(
    "mixing", "Thermodynamics", "Specific Heat and Calorimetry", "heat gained is heat lost",
    "Hot and cold water are mixed.",
    (("m1", f"{m1:g} kg"), ("T1", f"{t1:g} degC"), ("m2", f"{m2:g} kg"), ("T2", f"{t2:g} degC")),
    "What is the final temperature?", value, "degC",
    f"Heat gained is heat lost: T = ({m1:g} * {t1:g} + {m2:g} * {t2:g}) / ({m1:g} + {m2:g}) = "
    f"{value:.3g}.",
    shapes,
  )  # fmt: skip


def _engine(rng: np.random.Generator) -> Problem:
  hot, work = pick(rng, 400, 500, 800, 1000), pick(rng, 100, 120, 150, 200)
  value = hot - work
  shapes = (
    Shape("box", (0.3, 0.08, 0.7, 0.22)),
    Shape("disc", (0.38, 0.38, 0.62, 0.62)),
    Shape("box", (0.3, 0.78, 0.7, 0.92)),
    Shape("arrow", (0.5, 0.22, 0.5, 0.38)),
    Shape("arrow", (0.5, 0.62, 0.5, 0.78)),
    Shape("arrow", (0.62, 0.5, 0.88, 0.5)),
    text(0.3, 0.3, f"{hot:g} J"),
    text(0.8, 0.4, f"{work:g} J"),
  )
  return Problem(
    "engine", "Thermodynamics", "Laws of Thermodynamics", "first law of thermodynamics",
    "A heat engine takes heat and does work in each cycle.",
    (("heat", f"{hot:g} J"), ("work", f"{work:g} J")),
    "How much heat does it give off?", value, "J",
    f"First law, heat engine: Q = {hot:g} - {work:g} = {value:g}.", shapes,
  )  # fmt: skip


def _decay(rng: np.random.Generator) -> Problem:
  start, half, times = pick(rng, 16, 40, 80, 160), pick(rng, 2, 5, 8), int(pick(rng, 1, 2, 3, 4))
  value = start / 2**times
  curve: list[float] = []
  for u in np.linspace(0, 1, 32):
    curve += [0.14 + 0.76 * float(u), 0.85 - 0.65 * 0.5 ** (times * float(u))]
  shapes = (
    line(0.14, 0.12, 0.14, 0.85, 0.92, 0.85),
    Shape("line", tuple(curve), "red"),
    text(0.32, 0.14, f"{start:g} g"),
    text(0.7, 0.22, f"T = {half:g} d"),
    text(0.84, 0.93, f"{half * times:g} d"),
  )
  return Problem(
    "decay", "Modern Physics", "Nuclear", "radioactive decay",
    "A radioactive sample decays.",
    (("mass", f"{start:g} g"), ("half-life", f"{half:g} d"), ("time", f"{half * times:g} d")),
    "What mass is left?", value, "g",
    f"Radioactive decay: half-life {half:g}, {times} times. m = {start:g} / 2^{times} = "
    f"{value:.3g}.",
    shapes,
  )  # fmt: skip


def _photoelectric(rng: np.random.Generator) -> Problem:
  work = pick(rng, 2.0, 2.3, 2.8, 3.2)
  photon = work + pick(rng, 0.5, 1.0, 1.5, 2.2)
  value = photon - work
  shapes = (
    Shape("box", (0.15, 0.68, 0.85, 0.82)),
    Shape("arrow", (0.12, 0.15, 0.45, 0.66), "orange"),
    Shape("arrow", (0.5, 0.66, 0.72, 0.3)),
    text(0.32, 0.18, f"{photon:.2g} eV"),
    text(0.5, 0.9, f"W = {work:g} eV"),
  )
  return Problem(
    "photoelectric", "Modern Physics", "Quantum Phenomena", "photoelectric effect",
    "Light falls on a metal and frees electrons.",
    (("photon energy", f"{photon:.2g} eV"), ("work function", f"{work:g} eV")),
    "What is the largest kinetic energy of an electron?", value, "eV",
    f"Photoelectric effect: E = photon - work function = {photon:.2g} - {work:g} = {value:.2g}.",
    shapes,
  )  # fmt: skip


def _dilation(rng: np.random.Generator) -> Problem:
  beta, time = pick(rng, 0.5, 0.6, 0.8, 0.9), pick(rng, 1, 2, 4, 5)
  value = time / math.sqrt(1 - beta**2)
  shapes = (
    Shape("box", (0.3, 0.4, 0.62, 0.6)),
    Shape("arrow", (0.64, 0.5, 0.88, 0.5)),
    text(0.76, 0.4, f"{beta:g} c"),
    text(0.46, 0.5, f"{time:g} s"),
  )
  return Problem(
    "dilation", "Modern Physics", "Relativity", "time dilation",
    "A clock flies past an observer.",
    (("speed", f"{beta:g} c"), ("proper time", f"{time:g} s")),
    "How much time passes for the observer?", value, "s",
    f"Time dilation: t = {time:g} / sqrt(1 - {beta:g}^2) = {value:.3g}.", shapes,
  )  # fmt: skip


# Category -> its templates, functions from random numbers to a problem.
MATTER: dict[str, tuple[Template, ...]] = {
  "Mechanics": (_incline, _pulley, _projectile),
  "Thermodynamics": (_piston, _mixing, _engine),
  "Modern Physics": (_decay, _photoelectric, _dilation),
}
