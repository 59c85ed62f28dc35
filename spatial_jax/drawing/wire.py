"""Messages between executor and worker: length-prefixed, a JSON header and raw bytes, no pickle.

| header bytes: uint32 | payload bytes: uint64 | header, JSON | payload: pixels behind one another |

request   {"style": {...}, "pictures": [{"shape": [h, w, 3], "operations": [[...], ...]}]}
answer    {"shapes": [[h, w, 3], ...]}  or  {"fault": "MemoryError: ..."}
"""

import dataclasses
import json
import math
import struct
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from spatial_jax.drawing.canvas import Picture, Style
from spatial_jax.types import Operation

LENGTHS = struct.Struct("<IQ")


def send(stream: IO[bytes], header: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
  """Writes one message. Raises OSError (I/O) when the other side is gone."""
  encoded = json.dumps(header).encode()
  stream.write(LENGTHS.pack(len(encoded), sum(array.nbytes for array in arrays)))
  stream.write(encoded)
  for array in arrays:
    stream.write(np.ascontiguousarray(array).data)
  stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
  """Reads one message. Raises EOFError (I/O) when the other side is gone."""
  header_bytes, payload_bytes = LENGTHS.unpack(_exactly(stream, LENGTHS.size))
  header = json.loads(_exactly(stream, header_bytes))
  return header, _exactly(stream, payload_bytes)


def request(pictures: Sequence[Picture], style: Style) -> tuple[dict[str, Any], list[np.ndarray]]:
  """Pictures to be painted as header and arrays."""
  described = [
    {
      "shape": picture.pixels.shape,
      "operations": [[o.tool, o.image, o.points_4, o.label] for o in picture.drawn],
    }
    for picture in pictures
  ]
  header = {"style": dataclasses.asdict(style), "pictures": described}
  return header, [picture.pixels for picture in pictures]


def read_request(header: dict[str, Any], payload: bytes) -> tuple[list[Picture], Style]:
  """The inverse of `request`."""
  described = header["pictures"]
  pixels = arrays(payload, [picture["shape"] for picture in described])
  operations = [
    tuple(
      Operation(tool, image, tuple(points), label) for tool, image, points, label in p["operations"]
    )
    for p in described
  ]
  style = header["style"]
  pictures = [Picture(p, o) for p, o in zip(pixels, operations, strict=True)]
  return pictures, Style(
    style["line_px"], style["dot_px"], style["font_px"], tuple(style["label_offset_px"])
  )


def arrays(payload: bytes, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
  """Cuts the payload into uint8 arrays of the given shapes; they share its memory."""
  ends = np.cumsum([0, *(math.prod(shape) for shape in shapes)])
  flat = np.frombuffer(payload, np.uint8)
  return [
    flat[start:end].reshape(shape)
    for start, end, shape in zip(ends[:-1], ends[1:], shapes, strict=True)
  ]


def _exactly(stream: IO[bytes], count: int) -> bytes:
  data = stream.read(count)
  if len(data) < count:
    raise EOFError(f"the stream ended after {len(data)} of {count} bytes")
  return data
