"""The wire format: messages between executor and drawing worker over pipes, without pickle.

| header bytes: uint32 | payload bytes: uint64 | header, JSON | payload: pixels of all images |

request   {"style": {...}, "images": [{"shape": [h, w, 3], "operations": [[...], ...]}]}
result    {"shapes": [[h, w, 3], ...]}  or  {"fault": "MemoryError: ..."}
"""

import dataclasses
import json
import math
import struct
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

from spatial_jax.drawing.canvas import DrawnImage, Style
from spatial_jax.types import Operation

LENGTHS = struct.Struct("<IQ")


def send(stream: IO[bytes], header: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
  """Writes one message. Raises OSError if the other process has ended."""
  encoded = json.dumps(header).encode()
  stream.write(LENGTHS.pack(len(encoded), sum(array.nbytes for array in arrays)))
  stream.write(encoded)
  for array in arrays:
    stream.write(np.ascontiguousarray(array).data)
  stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytes]:
  """Reads one message. Raises EOFError if the other process has ended."""
  header_bytes, payload_bytes = LENGTHS.unpack(_exactly(stream, LENGTHS.size))
  header = json.loads(_exactly(stream, header_bytes))
  return header, _exactly(stream, payload_bytes)


def request(images: Sequence[DrawnImage], style: Style) -> tuple[dict[str, Any], list[np.ndarray]]:
  """Returns header and arrays of a request to paint the operations of the images."""
  described = [
    {
      "shape": image.pixels.shape,
      "operations": [[o.tool, o.image, o.points_4, o.label] for o in image.operations],
    }
    for image in images
  ]
  header = {"style": dataclasses.asdict(style), "images": described}
  return header, [image.pixels for image in images]


def read_request(header: dict[str, Any], payload: bytes) -> tuple[list[DrawnImage], Style]:
  """Returns the images and the style of a request: the inverse of `request`."""
  described = header["images"]
  pixels = arrays(payload, [image["shape"] for image in described])
  operations = [
    tuple(
      Operation(tool, index, tuple(points), label)
      for tool, index, points, label in image["operations"]
    )
    for image in described
  ]
  style = header["style"]
  images = [DrawnImage(p, o) for p, o in zip(pixels, operations, strict=True)]
  return images, Style(
    style["line_px"], style["dot_px"], style["font_px"], tuple(style["label_offset_px"])
  )


def arrays(payload: bytes, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
  """Splits the payload into uint8 arrays of the given shapes, which share its memory."""
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
