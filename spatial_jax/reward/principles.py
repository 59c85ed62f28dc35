"""Keywords of the 25 subfields of PhyX, for the identification of the physical principle.

The text of a response names the principle of a subfield if no other subfield has more of its
keywords in it. A list of all keywords therefore names none.

Source: the subfields are PhyX's (arXiv:2505.15929, which writes "Relational Motion" for rotational
motion); the keywords are ours.
"""

import re

KEYWORDS: dict[str, tuple[str, ...]] = {
  # Optics
  "Optical Instrument": (
    "magnification", "eyepiece", "objective", "telescope", "microscope", "focal length",
  ),
  "Wave Optics": (
    "interference", "diffraction", "path difference", "fringe", "double slit", "grating",
    "thin film", "polarization",
  ),
  "Geometrical Optics": (
    "refraction", "reflection", "snell", "thin lens", "mirror equation", "lens equation",
    "critical angle", "image distance", "object distance",
  ),
  # Electromagnetism
  "Electromagnetic Wave": (
    "electromagnetic wave", "poynting",
    "speed of light", "radiation pressure", "electric field amplitude",
  ),
  "Electric Circuits": (
    "ohm", "kirchhoff", "in series",
    "in parallel", "equivalent resistance", "resistor", "capacitor",
    "current divider", "voltage",
  ),
  "Magnetism": (
    "magnetic field", "lorentz force", "biot-savart", "ampere", "right-hand rule", "magnetic force",
  ),
  "Electromagnetic Induction": (
    "faraday", "lenz", "induced", "magnetic flux", "emf", "inductance",
  ),
  "Electrostatics": (
    "coulomb", "electric field", "gauss", "electric potential", "point charge", "superposition",
  ),
  # Mechanics
  "Momentum and Collisions": (
    "momentum", "collision", "impulse", "elastic", "inelastic", "recoil",
  ),
  "Work and Energy": (
    "conservation of energy", "kinetic energy", "potential energy", "work-energy", "work done",
    "power",
  ),
  "Statics": (
    "equilibrium", "torque", "net force is zero", "lever arm", "tension", "center of gravity",
  ),
  "Dynamics": (
    "newton", "net force", "friction", "f = ma", "free body", "normal force", "acceleration",
  ),
  "Relational Motion": (
    "angular velocity", "angular acceleration",
    "moment of inertia", "rotational", "angular momentum",
    "centripetal",
  ),
  "Kinematics": (
    "projectile", "constant acceleration", "initial velocity", "time of flight", "free fall",
    "horizontal velocity", "displacement",
  ),
  # Waves and acoustics
  "Sound": (
    "speed of sound", "doppler", "decibel", "sound intensity", "echo", "beat frequency",
  ),
  "Resonance and Harmonics": (
    "standing wave", "harmonic", "resonance", "node", "antinode", "fundamental frequency",
  ),
  "Wave Properties": (
    "wavelength", "wave speed", "amplitude", "wave equation", "transverse", "period",
  ),
  # Thermodynamics
  "Specific Heat and Calorimetry": (
    "specific heat", "calorimetry", "heat gained",
    "heat lost", "latent heat", "thermal equilibrium",
  ),
  "Temperature and Heat Transfer": (
    "thermal conductivity", "conduction", "convection", "radiation", "heat flow",
    "thermal expansion",
  ),
  "Ideal Gases and Kinetic Theory": (
    "ideal gas", "pv = nrt", "boyle", "charles", "kinetic theory", "number of moles", "piston",
  ),
  "Laws of Thermodynamics": (
    "first law", "second law", "entropy", "carnot", "isothermal", "adiabatic", "heat engine",
    "internal energy",
  ),
  # Modern physics
  "Particle": (
    "quark", "lepton", "particle decay", "conservation of charge", "baryon", "antiparticle",
  ),
  "Nuclear": (
    "half-life", "decay", "radioactive", "binding energy", "nucleus", "nuclear", "fission",
  ),
  "Relativity": (
    "time dilation", "length contraction", "lorentz factor", "rest frame", "relativistic",
    "proper time",
  ),
  "Quantum Phenomena": (
    "photoelectric", "work function", "photon", "planck", "de broglie", "uncertainty",
    "energy level", "compton",
  ),
}  # fmt: skip
_MOST_TIES = 2  # subfields with the most keywords: kinematics and dynamics share many
_ALIASES = {"rotational motion": "Relational Motion"}


def subfield_of(name: str) -> str | None:
  """Returns the subfield of a name in any case, None if it is none of the 25."""
  wanted = name.strip().lower()
  by_name = {known.lower(): known for known in KEYWORDS}
  return by_name.get(wanted) or _ALIASES.get(wanted)


def keyword_counts(text: str) -> dict[str, int]:
  """Returns for each subfield how many of its keywords the text contains."""
  text = " ".join(text.lower().split())
  return {name: sum(_contains(text, word) for word in words) for name, words in KEYWORDS.items()}


def names_principle(text: str, subfield: str, principle: str = "") -> bool:
  """Returns whether a text names the principle of a problem.

  Args:
    text: the reasoning of a response.
    subfield: one of the 25; another name is judged by `principle` alone.
    principle: name of the principle that the problem states ("Snell's law"), "" for none.
  """
  counts = keyword_counts(text)
  known = subfield_of(subfield)
  most = max(counts.values())
  if sum(count > 0 for count in counts.values()) > len(counts) // 2:
    return False  # a list of keywords
  best = [name for name, count in counts.items() if count == most]
  if most > 0 and known in best and len(best) <= _MOST_TIES:
    return True
  return bool(principle) and _contains(" ".join(text.lower().split()), principle.lower())


def _contains(text: str, words: str) -> bool:
  """Whether the words stand in the text; the last one may have an ending ("resistors")."""
  return re.search(rf"(?<![a-z]){re.escape(words)}", text) is not None
