"""Images and videos of foreign rows: paths as published, or the contents of an image file.

"a.jpg", {"path": "a.jpg"}                      ──► "a.jpg"
bytes, {"bytes": ...}, base64, "data:image/..." ──► bytes
"""

import base64
import binascii
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spatial_jax.data.formats.fields import as_text, shown
from spatial_jax.data.rows import RowProblem
from spatial_jax.types import IMAGE_MARK, VIDEO_MARK

_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")
_WEB = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SCENES = (  # names of scans: ScanNet, ARKitScenes, ScanNet++
  re.compile(r"scene\d{4}_\d{2}"),
  re.compile(r"4\d{7}"),
  re.compile(r"[0-9a-f]{10}"),
)


def image_of(value: Any, field: str) -> str | bytes:
  """The path of an image, or the contents of its file.

  Raises:
    RowProblem: naming `field`, if it is neither.
  """
  if isinstance(value, Mapping):
    content, path = value.get("bytes"), value.get("path") or value.get("image")
    return image_of(content if content else path, field)
  if isinstance(value, bytes):
    return _checked(value, field)
  text = as_text(value, field)
  if _DATA_URI.match(text):
    return image_of_base64(text, field)
  return path_of(text, field)


def image_of_base64(value: Any, field: str) -> bytes:
  """The contents of an image file from base64; raises RowProblem if it is no image."""
  text = "".join(_DATA_URI.sub("", as_text(value, field)).split())  # some encoders wrap lines
  try:
    content = base64.b64decode(text, validate=True)
  except (binascii.Error, ValueError) as error:
    raise RowProblem(field, f"is not an image in base64 ({shown(text)})") from error
  return _checked(content, field)


def images_of_base64(value: Any, field: str) -> list[bytes]:
  """One image, or a JSON list of images, in base64."""
  text = as_text(value, field)
  if not text.startswith("["):
    return [image_of_base64(text, field)]
  try:
    items = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise RowProblem(field, f"is not a list of images in base64 ({shown(text)})") from error
  return [image_of_base64(item, f"{field}[{i}]") for i, item in enumerate(items)]


def images_of(value: Any, field: str) -> list[str | bytes]:
  """One image or a list of images; None gives []."""
  if value is None:
    return []
  if isinstance(value, list):
    return [image_of(item, f"{field}[{i}]") for i, item in enumerate(value)]
  return [image_of(value, field)]


def videos_of(value: Any, field: str) -> list[Any]:
  """The paths of one video or of a list of videos; a list of frames is {"frames": [paths]}."""
  if value is None:
    return []
  items = value if isinstance(value, list) else [value]
  return [_video(item, f"{field}[{i}]") for i, item in enumerate(items)]


def _video(value: Any, field: str) -> str | dict[str, list[str]]:
  if isinstance(value, Mapping):
    return _video(value.get("video") or value.get("path"), field)
  if isinstance(value, list):
    return {"frames": [path_of(item, f"{field}[{i}]") for i, item in enumerate(value)]}
  return path_of(value, field)


def path_of(value: Any, field: str) -> str:
  """A path without "./" in front; raises RowProblem for an address of the web."""
  text = as_text(value, field).removeprefix("file://")
  if _WEB.match(text):
    raise RowProblem(field, f"is {shown(text)}, a remote address; download it and give its path")
  if "\0" in text or len(text) > 4096:
    raise RowProblem(field, f"is {shown(text)} and must be a path")
  return text.removeprefix("./") or "."


def scene_of(media: Sequence[str | bytes]) -> str | None:
  """The scene of a row: the name of its scan, or of its folder of frames, or of its file.

  "scannet/scene0011_00.mp4" and "scene0011_00/color/7.jpg" are of scene0011_00, as in VSI-Bench,
  so that rows of several data sets about one scan are held out together.

  Args:
    media: paths as `image_of` and `videos_of` return them.

  Returns:
    None if the first is not a path.
  """
  if not media or not isinstance(media[0], str):
    return None
  path = pathlib.PurePosixPath(media[0])
  for part in (*path.parts[:-1], path.stem):
    if any(name.fullmatch(part) for name in _SCENES):
      return part
  folders = {str(pathlib.PurePosixPath(item).parent) for item in media if isinstance(item, str)}
  if len(media) > 1 and len(folders) == 1 and folders != {"."}:
    return folders.pop()
  return str(path.with_suffix("")) if path.name else None


def with_matching_marks(question: str, images: int, videos: int) -> str:
  """The question; its marks are removed if they are not one for each image and video.

  For sources that place all media in front of the text, whatever marks it has.
  """
  if (question.count(IMAGE_MARK), question.count(VIDEO_MARK)) == (images, videos):
    return question
  return without_marks(question)


def without_marks(question: str) -> str:
  """The question without <image> and <video>."""
  return question.replace(IMAGE_MARK, "").replace(VIDEO_MARK, "").strip()


def image_suffix(content: bytes) -> str | None:
  """The suffix of an image file by its first bytes; None if it is no image."""
  if content.startswith(b"\xff\xd8\xff"):
    return ".jpg"
  if content.startswith(b"\x89PNG\r\n\x1a\n"):
    return ".png"
  if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
    return ".webp"
  if content.startswith((b"GIF87a", b"GIF89a")):
    return ".gif"
  return ".bmp" if content.startswith(b"BM") else None


def _checked(content: bytes, field: str) -> bytes:
  if image_suffix(content) is None:
    known = "JPEG, PNG, WebP, GIF or BMP"
    raise RowProblem(field, f"is not the contents of a {known} file ({shown(content)})")
  return content
