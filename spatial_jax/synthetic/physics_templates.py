"""The templates of `physics`: numbers -> problem, diagram and solution.

Coordinates of shapes are fractions of the image, the origin at the top left.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

_G = 9.8  # m/s^2
_K = 8.99e9  # N m^2 / C^2
_SOUND = 343.0  # m/s


class Shape(NamedTuple):
  """One part of a diagram."""

  kind: Literal["line", "box", "disc", "arrow", "text"]
  points: tuple[float, ...]  # x1, y1, x2, y2, ...; of a text its centre
  color: str = "black"
  text: str = ""


@dataclasses.dataclass(frozen=True)
class Problem:
  """One problem with its numbers."""

  name: str  # of the template
  category: str
  subfield: str
  principle: str
  scene: str  # what the diagram shows, without numbers
  given: tuple[tuple[str, str], ...]  # name and value with unit
  question: str
  value: float  # the answer
  unit: str
  solution: str  # the principle, the equation and the numbers, in one or two sentences
  shapes: tuple[Shape, ...]


class Template(NamedTuple):
  """A kind of problem."""

  category: str
  make: Callable[[np.random.Generator], Problem]


def _text(x: float, y: float, text: str) -> Shape:
  return Shape("text", (x, y), "blue", text)


def _line(*points: float) -> Shape:
  return Shape("line", points)


def _pick(rng: np.random.Generator, *values: float) -> float:
  return float(values[int(rng.integers(len(values)))])


# --- mechanics -----------------------------------------------------------------------------------


def _incline(rng: np.random.Generator) -> Problem:
  angle = _pick(rng, 15, 20, 25, 30, 35, 40)
  value = _G * math.sin(math.radians(angle))
  shapes = (
    _line(0.1, 0.85, 0.9, 0.85, 0.9, 0.35, 0.1, 0.85),
    Shape("box", (0.5, 0.45, 0.63, 0.58)),
    _text(0.42, 0.8, f"{angle:g} deg"),
  )
  return Problem(
    "incline", "Mechanics", "Dynamics", "Newton's second law",
    "A block slides down an incline without friction.",
    (("angle", f"{angle:g} degrees"), ("g", "9.8 m/s^2")),
    "What is its acceleration?", value, "m/s^2",
    f"Newton: net force along the slope. a = g sin {angle:g} = {value:.2f}.", shapes,
  )  # fmt: skip


def _pulley(rng: np.random.Generator) -> Problem:
  light = _pick(rng, 1, 2, 3)
  heavy = light + _pick(rng, 1, 2, 3, 4)
  value = _G * (heavy - light) / (heavy + light)
  shapes = (
    Shape("disc", (0.38, 0.1, 0.62, 0.34)),
    _line(0.38, 0.22, 0.38, 0.7),
    _line(0.62, 0.22, 0.62, 0.55),
    Shape("box", (0.3, 0.7, 0.46, 0.86)),
    Shape("box", (0.55, 0.55, 0.69, 0.69)),
    _text(0.38, 0.93, f"{heavy:g} kg"),
    _text(0.62, 0.77, f"{light:g} kg"),
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
  speed, height = _pick(rng, 2, 3, 4, 5, 6), _pick(rng, 1.25, 2, 3, 5)
  time = math.sqrt(2 * height / _G)
  value = speed * time
  shapes = (
    _line(0.08, 0.35, 0.35, 0.35, 0.35, 0.88, 0.92, 0.88),
    Shape("disc", (0.29, 0.27, 0.36, 0.34)),
    Shape("arrow", (0.38, 0.3, 0.56, 0.3)),
    _text(0.5, 0.22, f"{speed:g} m/s"),
    _text(0.22, 0.62, f"{height:g} m"),
  )
  return Problem(
    "projectile", "Mechanics", "Kinematics", "projectile motion",
    "A ball leaves a table horizontally.",
    (("speed", f"{speed:g} m/s"), ("height", f"{height:g} m"), ("g", "9.8 m/s^2")),
    "How far from the table does it land?", value, "m",
    f"Projectile motion: t = sqrt(2 h / g) = {time:.2f} s. x = {speed:g} t = {value:.2f}.", shapes,
  )  # fmt: skip


# --- electromagnetism ----------------------------------------------------------------------------


def _resistors(rng: np.random.Generator) -> Problem:
  one, two, three = (_pick(rng, 2, 3, 4, 6, 8, 12) for _ in range(3))
  value = one + two * three / (two + three)
  shapes = (
    _line(0.06, 0.5, 0.16, 0.5), Shape("box", (0.16, 0.45, 0.38, 0.55)),
    _line(0.38, 0.5, 0.5, 0.5), _line(0.5, 0.3, 0.5, 0.7), _line(0.5, 0.3, 0.58, 0.3),
    _line(0.5, 0.7, 0.58, 0.7), Shape("box", (0.58, 0.25, 0.8, 0.35)),
    Shape("box", (0.58, 0.65, 0.8, 0.75)), _line(0.8, 0.3, 0.88, 0.3, 0.88, 0.7, 0.8, 0.7),
    _line(0.88, 0.5, 0.96, 0.5),
    _text(0.27, 0.37, f"{one:g} ohm"), _text(0.69, 0.17, f"{two:g} ohm"),
    _text(0.69, 0.83, f"{three:g} ohm"),
  )  # fmt: skip
  return Problem(
    "resistors", "Electromagnetism", "Electric Circuits", "resistors in series and in parallel",
    "One resistor is in series with two in parallel.",
    (("R1", f"{one:g} ohm"), ("R2", f"{two:g} ohm"), ("R3", f"{three:g} ohm")),
    "What is the equivalent resistance?", value, "ohm",
    f"Resistors in series and in parallel. R = {one:g} + {two:g} * {three:g} / "
    f"({two:g} + {three:g}) = {value:.2f}.",
    shapes,
  )  # fmt: skip


def _charges(rng: np.random.Generator) -> Problem:
  one, two, gap = _pick(rng, 1, 2, 3, 4), _pick(rng, 1, 2, 3, 5), _pick(rng, 0.2, 0.3, 0.5, 1.0)
  value = _K * one * two * 1e-12 / gap**2
  shapes = (
    Shape("disc", (0.12, 0.43, 0.26, 0.57)),
    Shape("disc", (0.74, 0.43, 0.88, 0.57)),
    _line(0.26, 0.5, 0.74, 0.5),
    _text(0.19, 0.34, f"{one:g} uC"),
    _text(0.81, 0.34, f"{two:g} uC"),
    _text(0.5, 0.58, f"{gap:g} m"),
  )
  return Problem(
    "charges", "Electromagnetism", "Electrostatics", "Coulomb's law",
    "Two point charges are at rest.",
    (("q1", f"{one:g} uC"), ("q2", f"{two:g} uC"), ("distance", f"{gap:g} m")),
    "What is the force between them?", value, "N",
    f"Coulomb: F = k {one:g} * {two:g} uC^2 / {gap:g}^2 = {value:.3g}.", shapes,
  )  # fmt: skip


def _field(rng: np.random.Generator) -> Problem:
  charge, distance = _pick(rng, 1, 2, 4, 6, 8), _pick(rng, 0.3, 0.5, 1.0, 2.0)
  value = _K * charge * 1e-9 / distance**2
  shapes = (
    Shape("disc", (0.12, 0.43, 0.26, 0.57)),
    Shape("arrow", (0.78, 0.5, 0.94, 0.5), "red"),
    _line(0.26, 0.5, 0.76, 0.5),
    _text(0.19, 0.34, f"{charge:g} nC"),
    _text(0.5, 0.58, f"{distance:g} m"),
    _text(0.78, 0.4, "P"),
  )
  return Problem(
    "field", "Electromagnetism", "Electrostatics", "electric field of a point charge",
    "A point charge makes an electric field at P.",
    (("charge", f"{charge:g} nC"), ("distance", f"{distance:g} m")),
    "What is the field at P?", value, "N/C",
    f"Electric field of a point charge: E = k {charge:g} nC / {distance:g}^2 = {value:.3g}.",
    shapes,
  )  # fmt: skip


# --- thermodynamics ------------------------------------------------------------------------------


def _piston(rng: np.random.Generator) -> Problem:
  before, after, volume = _pick(rng, 100, 150, 200), _pick(rng, 250, 300, 400), _pick(rng, 2, 3, 6)
  value = before * volume / after
  shapes = (
    _line(0.3, 0.15, 0.3, 0.85, 0.7, 0.85, 0.7, 0.15),
    Shape("box", (0.3, 0.35, 0.7, 0.43)),
    Shape("arrow", (0.5, 0.12, 0.5, 0.33)),
    _text(0.5, 0.64, f"{volume:g} L, {before:g} kPa"),
    _text(0.5, 0.93, f"to {after:g} kPa"),
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
  m1, m2, t1, t2 = _pick(rng, 1, 2), _pick(rng, 1, 3), _pick(rng, 60, 80, 90), _pick(rng, 10, 20)
  value = (m1 * t1 + m2 * t2) / (m1 + m2)
  shapes = (
    Shape("box", (0.1, 0.3, 0.42, 0.75)),
    Shape("box", (0.58, 0.3, 0.9, 0.75)),
    _text(0.26, 0.47, f"{m1:g} kg"),
    _text(0.26, 0.6, f"{t1:g} C"),
    _text(0.74, 0.47, f"{m2:g} kg"),
    _text(0.74, 0.6, f"{t2:g} C"),
  )
  return Problem(
    "mixing", "Thermodynamics", "Specific Heat and Calorimetry", "heat gained is heat lost",
    "Hot and cold water are mixed.",
    (("m1", f"{m1:g} kg"), ("T1", f"{t1:g} C"), ("m2", f"{m2:g} kg"), ("T2", f"{t2:g} C")),
    "What is the final temperature?", value, "degC",
    f"Heat gained is heat lost: T = ({m1:g} * {t1:g} + {m2:g} * {t2:g}) / ({m1:g} + {m2:g}) = "
    f"{value:.3g}.",
    shapes,
  )  # fmt: skip


def _engine(rng: np.random.Generator) -> Problem:
  hot, work = _pick(rng, 400, 500, 800, 1000), _pick(rng, 100, 120, 150, 200)
  value = hot - work
  shapes = (
    Shape("box", (0.3, 0.08, 0.7, 0.22)),
    Shape("disc", (0.38, 0.38, 0.62, 0.62)),
    Shape("box", (0.3, 0.78, 0.7, 0.92)),
    Shape("arrow", (0.5, 0.22, 0.5, 0.38)),
    Shape("arrow", (0.5, 0.62, 0.5, 0.78)),
    Shape("arrow", (0.62, 0.5, 0.88, 0.5)),
    _text(0.3, 0.3, f"{hot:g} J"),
    _text(0.8, 0.4, f"{work:g} J"),
  )
  return Problem(
    "engine", "Thermodynamics", "Laws of Thermodynamics", "first law of thermodynamics",
    "A heat engine takes heat and does work in each cycle.",
    (("heat", f"{hot:g} J"), ("work", f"{work:g} J")),
    "How much heat does it give off?", value, "J",
    f"First law, heat engine: Q = {hot:g} - {work:g} = {value:g}.", shapes,
  )  # fmt: skip


# --- waves ---------------------------------------------------------------------------------------


def _standing(rng: np.random.Generator) -> Problem:
  length, loops = _pick(rng, 0.6, 0.9, 1.2, 1.5, 2.4), int(_pick(rng, 1, 2, 3, 4))
  value = 2 * length / loops
  wave = tuple(_curve(0.1, 0.9, 0.45, sign * 0.16, loops / 2, 40) for sign in (1.0, -1.0))
  shapes = (*wave, _line(0.1, 0.75, 0.9, 0.75), _text(0.5, 0.83, f"{length:g} m"))
  return Problem(
    "standing", "Wave/Acoustics", "Resonance and Harmonics", "standing wave",
    "A standing wave is on a string with both ends fixed.",
    (("length", f"{length:g} m"), ("loops", f"{loops}")),
    "What is the wavelength?", value, "m",
    f"Standing wave with {loops} loops: wavelength = 2 * {length:g} / {loops} = {value:.3g}.",
    shapes,
  )  # fmt: skip


def _curve(x1: float, x2: float, y: float, height: float, periods: float, count: int) -> Shape:
  points: list[float] = []
  for u in np.linspace(0, 1, count):
    points += [x1 + (x2 - x1) * float(u), y - height * math.sin(2 * math.pi * periods * float(u))]
  return Shape("line", tuple(points))


def _echo(rng: np.random.Generator) -> Problem:
  delay = _pick(rng, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0)
  value = _SOUND * delay / 2
  shapes = (
    _line(0.88, 0.1, 0.88, 0.9),
    Shape("disc", (0.1, 0.44, 0.22, 0.56)),
    Shape("arrow", (0.25, 0.44, 0.85, 0.44)),
    Shape("arrow", (0.85, 0.56, 0.25, 0.56)),
    _text(0.52, 0.68, f"{delay:g} s"),
  )
  return Problem(
    "echo", "Wave/Acoustics", "Sound", "speed of sound",
    "A shout comes back as an echo from a wall.",
    (("delay", f"{delay:g} s"), ("speed of sound", "343 m/s")),
    "How far is the wall?", value, "m",
    f"Speed of sound, echo: d = 343 * {delay:g} / 2 = {value:.4g}.", shapes,
  )  # fmt: skip


def _wave(rng: np.random.Generator) -> Problem:
  wavelength, frequency = _pick(rng, 0.2, 0.5, 0.8, 1.2, 2.0), _pick(rng, 2, 4, 5, 10)
  value = wavelength * frequency
  shapes = (
    _curve(0.08, 0.92, 0.4, 0.16, 2, 48),
    _line(0.08, 0.66, 0.5, 0.66),
    _text(0.29, 0.74, f"{wavelength:g} m"),
    _text(0.7, 0.84, f"{frequency:g} Hz"),
  )
  return Problem(
    "wave", "Wave/Acoustics", "Wave Properties", "wave speed",
    "A transverse wave travels along a rope.",
    (("wavelength", f"{wavelength:g} m"), ("frequency", f"{frequency:g} Hz")),
    "What is its speed?", value, "m/s",
    f"Wave speed: v = wavelength * f = {wavelength:g} * {frequency:g} = {value:.3g}.", shapes,
  )  # fmt: skip


# --- optics --------------------------------------------------------------------------------------


def _lens(rng: np.random.Generator) -> Problem:
  focal = _pick(rng, 5, 10, 12, 15)
  distance = focal * _pick(rng, 1.5, 2, 3, 4)
  value = 1 / (1 / focal - 1 / distance)
  shapes = (
    Shape("disc", (0.44, 0.15, 0.56, 0.85)),
    _line(0.05, 0.5, 0.95, 0.5),
    Shape("arrow", (0.15, 0.5, 0.15, 0.28)),
    _text(0.3, 0.58, f"{distance:g} cm"),
    _text(0.7, 0.42, f"f = {focal:g} cm"),
  )
  return Problem(
    "lens", "Optics", "Geometrical Optics", "thin lens equation",
    "An object stands in front of a converging lens.",
    (("f", f"{focal:g} cm"), ("object distance", f"{distance:g} cm")),
    "How far from the lens is the image?", value, "cm",
    f"Thin lens: 1 / b = 1 / {focal:g} - 1 / {distance:g}, so b = {value:.3g}.", shapes,
  )  # fmt: skip


def _mirror(rng: np.random.Generator) -> Problem:
  radius = _pick(rng, 20, 24, 30, 40)
  distance = radius / 2 * _pick(rng, 1.5, 2, 3)
  value = 1 / (2 / radius - 1 / distance)
  points: list[float] = []
  for u in np.linspace(-1, 1, 24):
    points += [0.86 - 0.12 * float(u) ** 2, 0.5 + 0.36 * float(u)]
  shapes = (
    Shape("line", tuple(points)),
    _line(0.05, 0.5, 0.95, 0.5),
    Shape("arrow", (0.2, 0.5, 0.2, 0.28)),
    _text(0.5, 0.58, f"{distance:g} cm"),
    _text(0.5, 0.86, f"R = {radius:g} cm"),
  )
  return Problem(
    "mirror", "Optics", "Geometrical Optics", "mirror equation",
    "An object stands in front of a concave mirror.",
    (("R", f"{radius:g} cm"), ("object distance", f"{distance:g} cm")),
    "How far from the mirror is the image?", value, "cm",
    f"Mirror equation: 1 / b = 2 / {radius:g} - 1 / {distance:g}, so b = {value:.3g}.", shapes,
  )  # fmt: skip


def _slits(rng: np.random.Generator) -> Problem:
  wavelength, gap = _pick(rng, 450, 500, 600, 650), _pick(rng, 0.1, 0.2, 0.25, 0.5)
  screen = _pick(rng, 1, 1.5, 2)
  value = wavelength * 1e-9 * screen / (gap * 1e-3) * 1e3
  shapes = (
    _line(0.3, 0.1, 0.3, 0.42), _line(0.3, 0.47, 0.3, 0.53), _line(0.3, 0.58, 0.3, 0.9),
    _line(0.88, 0.1, 0.88, 0.9), _line(0.3, 0.45, 0.88, 0.35), _line(0.3, 0.55, 0.88, 0.35),
    _text(0.14, 0.3, f"{gap:g} mm"), _text(0.58, 0.8, f"{screen:g} m"),
    _text(0.3, 0.96, f"{wavelength:g} nm"),
  )  # fmt: skip
  return Problem(
    "slits", "Optics", "Wave Optics", "double slit interference",
    "Light passes a double slit and falls on a screen.",
    (
      ("wavelength", f"{wavelength:g} nm"),
      ("slit distance", f"{gap:g} mm"),
      ("screen", f"{screen:g} m"),
    ),
    "What is the distance of the fringes?", value, "mm",
    f"Double slit interference: fringe = wavelength L / d = {wavelength:g} nm * {screen:g} m / "
    f"{gap:g} mm = {value:.3g}.",
    shapes,
  )  # fmt: skip


# --- modern physics ------------------------------------------------------------------------------


def _decay(rng: np.random.Generator) -> Problem:
  start, half, times = _pick(rng, 16, 40, 80, 160), _pick(rng, 2, 5, 8), int(_pick(rng, 1, 2, 3, 4))
  value = start / 2**times
  curve: list[float] = []
  for u in np.linspace(0, 1, 32):
    curve += [0.14 + 0.76 * float(u), 0.85 - 0.65 * 0.5 ** (times * float(u))]
  shapes = (
    _line(0.14, 0.12, 0.14, 0.85, 0.92, 0.85),
    Shape("line", tuple(curve), "red"),
    _text(0.32, 0.14, f"{start:g} g"),
    _text(0.6, 0.4, f"T = {half:g} d"),
    _text(0.84, 0.93, f"{half * times:g} d"),
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
  work = _pick(rng, 2.0, 2.3, 2.8, 3.2)
  photon = work + _pick(rng, 0.5, 1.0, 1.5, 2.2)
  value = photon - work
  shapes = (
    Shape("box", (0.15, 0.68, 0.85, 0.82)),
    Shape("arrow", (0.12, 0.15, 0.45, 0.66), "orange"),
    Shape("arrow", (0.5, 0.66, 0.72, 0.3)),
    _text(0.32, 0.18, f"{photon:.2g} eV"),
    _text(0.5, 0.9, f"W = {work:g} eV"),
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
  beta, time = _pick(rng, 0.5, 0.6, 0.8, 0.9), _pick(rng, 1, 2, 4, 5)
  value = time / math.sqrt(1 - beta**2)
  shapes = (
    Shape("box", (0.3, 0.4, 0.62, 0.6)),
    Shape("arrow", (0.64, 0.5, 0.88, 0.5)),
    _text(0.76, 0.4, f"{beta:g} c"),
    _text(0.46, 0.5, f"{time:g} s"),
  )
  return Problem(
    "dilation", "Modern Physics", "Relativity", "time dilation",
    "A clock flies past an observer.",
    (("speed", f"{beta:g} c"), ("proper time", f"{time:g} s")),
    "How much time passes for the observer?", value, "s",
    f"Time dilation: t = {time:g} / sqrt(1 - {beta:g}^2) = {value:.3g}.", shapes,
  )  # fmt: skip


TEMPLATES = (
  *(Template("Mechanics", make) for make in (_incline, _pulley, _projectile)),
  *(Template("Electromagnetism", make) for make in (_resistors, _charges, _field)),
  *(Template("Thermodynamics", make) for make in (_piston, _mixing, _engine)),
  *(Template("Wave/Acoustics", make) for make in (_standing, _echo, _wave)),
  *(Template("Optics", make) for make in (_lens, _mirror, _slits)),
  *(Template("Modern Physics", make) for make in (_decay, _photoelectric, _dilation)),
)
