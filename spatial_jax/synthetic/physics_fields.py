"""Problems of electromagnetism, waves and optics."""

import numpy as np

from spatial_jax.synthetic.physics_problem import Problem, Shape, Template, curve, line, pick, text

_K = 8.99e9  # N m^2 / C^2
_SOUND = 343.0  # m/s


def _resistors(rng: np.random.Generator) -> Problem:
  one, two, three = (pick(rng, 2, 3, 4, 6, 8, 12) for _ in range(3))
  value = one + two * three / (two + three)
  shapes = (
    line(0.06, 0.5, 0.16, 0.5), Shape("box", (0.16, 0.45, 0.38, 0.55)),
    line(0.38, 0.5, 0.5, 0.5), line(0.5, 0.3, 0.5, 0.7), line(0.5, 0.3, 0.58, 0.3),
    line(0.5, 0.7, 0.58, 0.7), Shape("box", (0.58, 0.25, 0.8, 0.35)),
    Shape("box", (0.58, 0.65, 0.8, 0.75)), line(0.8, 0.3, 0.88, 0.3, 0.88, 0.7, 0.8, 0.7),
    line(0.88, 0.5, 0.96, 0.5),
    text(0.27, 0.37, f"{one:g} ohm"), text(0.69, 0.17, f"{two:g} ohm"),
    text(0.69, 0.83, f"{three:g} ohm"),
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
  one, two, gap = pick(rng, 1, 2, 3, 4), pick(rng, 1, 2, 3, 5), pick(rng, 0.2, 0.3, 0.5, 1.0)
  value = _K * one * two * 1e-12 / gap**2
  shapes = (
    Shape("disc", (0.12, 0.43, 0.26, 0.57)),
    Shape("disc", (0.74, 0.43, 0.88, 0.57)),
    line(0.26, 0.5, 0.74, 0.5),
    text(0.19, 0.34, f"{one:g} uC"),
    text(0.81, 0.34, f"{two:g} uC"),
    text(0.5, 0.58, f"{gap:g} m"),
  )
  return Problem(
    "charges", "Electromagnetism", "Electrostatics", "Coulomb's law",
    "Two point charges are at rest.",
    (("q1", f"{one:g} uC"), ("q2", f"{two:g} uC"), ("distance", f"{gap:g} m")),
    "What is the force between them?", value, "N",
    f"Coulomb: F = k {one:g} * {two:g} uC^2 / {gap:g}^2 = {value:.3g}.", shapes,
  )  # fmt: skip


def _field(rng: np.random.Generator) -> Problem:
  charge, distance = pick(rng, 1, 2, 4, 6, 8), pick(rng, 0.3, 0.5, 1.0, 2.0)
  value = _K * charge * 1e-9 / distance**2
  shapes = (
    Shape("disc", (0.12, 0.43, 0.26, 0.57)),
    Shape("arrow", (0.78, 0.5, 0.94, 0.5), "red"),
    line(0.26, 0.5, 0.76, 0.5),
    text(0.19, 0.34, f"{charge:g} nC"),
    text(0.5, 0.58, f"{distance:g} m"),
    text(0.78, 0.4, "P"),
  )
  return Problem(
    "field", "Electromagnetism", "Electrostatics", "electric field of a point charge",
    "A point charge makes an electric field at P.",
    (("charge", f"{charge:g} nC"), ("distance", f"{distance:g} m")),
    "What is the field at P?", value, "N/C",
    f"Electric field of a point charge: E = k {charge:g} nC / {distance:g}^2 = {value:.3g}.",
    shapes,
  )  # fmt: skip


def _standing(rng: np.random.Generator) -> Problem:
  length, loops = pick(rng, 0.6, 0.9, 1.2, 1.5, 2.4), int(pick(rng, 1, 2, 3, 4))
  value = 2 * length / loops
  wave = tuple(curve(0.1, 0.9, 0.45, sign * 0.16, loops / 2, 40) for sign in (1.0, -1.0))
  shapes = (*wave, line(0.1, 0.75, 0.9, 0.75), text(0.5, 0.83, f"{length:g} m"))
  return Problem(
    "standing", "Wave/Acoustics", "Resonance and Harmonics", "standing wave",
    "A standing wave is on a string with both ends fixed.",
    (("length", f"{length:g} m"), ("loops", f"{loops}")),
    "What is the wavelength?", value, "m",
    f"Standing wave with {loops} loops: wavelength = 2 * {length:g} / {loops} = {value:.3g}.",
    shapes,
  )  # fmt: skip


def _echo(rng: np.random.Generator) -> Problem:
  delay = pick(rng, 0.4, 0.6, 0.8, 1.0, 1.4, 2.0)
  value = _SOUND * delay / 2
  shapes = (
    line(0.88, 0.1, 0.88, 0.9),
    Shape("disc", (0.1, 0.44, 0.22, 0.56)),
    Shape("arrow", (0.25, 0.44, 0.85, 0.44)),
    Shape("arrow", (0.85, 0.56, 0.25, 0.56)),
    text(0.52, 0.68, f"{delay:g} s"),
  )
  return Problem(
    "echo", "Wave/Acoustics", "Sound", "speed of sound",
    "A shout comes back as an echo from a wall.",
    (("delay", f"{delay:g} s"), ("speed of sound", "343 m/s")),
    "How far is the wall?", value, "m",
    f"Speed of sound, echo: d = 343 * {delay:g} / 2 = {value:.4g}.", shapes,
  )  # fmt: skip


def _wave(rng: np.random.Generator) -> Problem:
  wavelength, frequency = pick(rng, 0.2, 0.5, 0.8, 1.2, 2.0), pick(rng, 2, 4, 5, 10)
  value = wavelength * frequency
  shapes = (
    curve(0.08, 0.92, 0.4, 0.16, 2, 48),
    line(0.08, 0.66, 0.5, 0.66),
    text(0.29, 0.74, f"{wavelength:g} m"),
    text(0.7, 0.84, f"{frequency:g} Hz"),
  )
  return Problem(
    "wave", "Wave/Acoustics", "Wave Properties", "wave speed",
    "A transverse wave travels along a rope.",
    (("wavelength", f"{wavelength:g} m"), ("frequency", f"{frequency:g} Hz")),
    "What is its speed?", value, "m/s",
    f"Wave speed: v = wavelength * f = {wavelength:g} * {frequency:g} = {value:.3g}.", shapes,
  )  # fmt: skip


def _lens(rng: np.random.Generator) -> Problem:
  focal = pick(rng, 5, 10, 12, 15)
  distance = focal * pick(rng, 1.5, 2, 3, 4)
  value = 1 / (1 / focal - 1 / distance)
  shapes = (
    Shape("disc", (0.44, 0.15, 0.56, 0.85)),
    line(0.05, 0.5, 0.95, 0.5),
    Shape("arrow", (0.15, 0.5, 0.15, 0.28)),
    text(0.3, 0.58, f"{distance:g} cm"),
    text(0.7, 0.42, f"f = {focal:g} cm"),
  )
  return Problem(
    "lens", "Optics", "Geometrical Optics", "thin lens equation",
    "An object stands in front of a converging lens.",
    (("f", f"{focal:g} cm"), ("object distance", f"{distance:g} cm")),
    "How far from the lens is the image?", value, "cm",
    f"Thin lens: 1 / b = 1 / {focal:g} - 1 / {distance:g}, so b = {value:.3g}.", shapes,
  )  # fmt: skip


def _mirror(rng: np.random.Generator) -> Problem:
  radius = pick(rng, 20, 24, 30, 40)
  distance = radius / 2 * pick(rng, 1.5, 2, 3)
  value = 1 / (2 / radius - 1 / distance)
  points: list[float] = []
  for u in np.linspace(-1, 1, 24):
    points += [0.86 - 0.12 * float(u) ** 2, 0.5 + 0.36 * float(u)]
  shapes = (
    Shape("line", tuple(points)),
    line(0.05, 0.5, 0.95, 0.5),
    Shape("arrow", (0.2, 0.5, 0.2, 0.28)),
    text(0.5, 0.58, f"{distance:g} cm"),
    text(0.5, 0.86, f"R = {radius:g} cm"),
  )
  return Problem(
    "mirror", "Optics", "Geometrical Optics", "mirror equation",
    "An object stands in front of a concave mirror.",
    (("R", f"{radius:g} cm"), ("object distance", f"{distance:g} cm")),
    "How far from the mirror is the image?", value, "cm",
    f"Mirror equation: 1 / b = 2 / {radius:g} - 1 / {distance:g}, so b = {value:.3g}.", shapes,
  )  # fmt: skip


def _slits(rng: np.random.Generator) -> Problem:
  wavelength, gap = pick(rng, 450, 500, 600, 650), pick(rng, 0.1, 0.2, 0.25, 0.5)
  screen = pick(rng, 1, 1.5, 2)
  value = wavelength * 1e-9 * screen / (gap * 1e-3) * 1e3
  shapes = (
    line(0.3, 0.1, 0.3, 0.42), line(0.3, 0.47, 0.3, 0.53), line(0.3, 0.58, 0.3, 0.9),
    line(0.88, 0.1, 0.88, 0.9), line(0.3, 0.45, 0.88, 0.35), line(0.3, 0.55, 0.88, 0.35),
    text(0.14, 0.3, f"{gap:g} mm"), text(0.58, 0.8, f"{screen:g} m"),
    text(0.3, 0.96, f"{wavelength:g} nm"),
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


# Category -> its templates, functions from random numbers to a problem.
FIELDS: dict[str, tuple[Template, ...]] = {
  "Electromagnetism": (_resistors, _charges, _field),
  "Wave/Acoustics": (_standing, _echo, _wave),
  "Optics": (_lens, _mirror, _slits),
}
