"""Image and JSON files: pixels keep their content, damaged files are one line that names them."""

import io
import json
import pathlib
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, TiffImagePlugin

from spatial_jax.data.records import read_image, read_json
from spatial_jax.errors import DataError

WHITE = [255, 255, 255]


def pixels(path: pathlib.Path) -> np.ndarray:
  image = read_image(path)
  assert image.mode == "RGB"
  return np.asarray(image)


def encoded(form: str, mode: str = "RGB", **options) -> bytes:
  """An image of random pixels in a file format."""
  generator = np.random.default_rng(0)
  image = Image.fromarray(generator.integers(0, 256, (20, 30, 4), np.uint8)).convert(mode)
  file = io.BytesIO()
  image.save(file, form, **options)
  return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grey_png(bits: int, values: list[int], transparent: int) -> bytes:
  """A PNG of one row of eight grey pixels with a transparent grey level (chunk tRNS)."""
  packed = 0
  for value in values:
    packed = packed << bits | value
  row = packed.to_bytes(bits, "big")  # eight pixels of `bits` bits are `bits` bytes
  return (
    b"\x89PNG\r\n\x1a\n"
    + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0))
    + png_chunk(b"tRNS", struct.pack(">H", transparent))
    + png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    + png_chunk(b"IEND", b"")
  )


# --- transparency -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "tiff", "webp"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(tmp_path, form, mode):
  x = np.zeros((64, 64, 4), np.uint8)
  x[30:34] = [0, 0, 0, 255]  # black lines on a transparent background
  image = Image.fromarray(x)
  if mode == "P" and form != "tiff":
    image = image.quantize(8)
  elif mode != "P":
    image = image.convert(mode)
  image.save(tmp_path / f"plan.{form}", lossless=True)
  got = pixels(tmp_path / f"plan.{form}")
  assert got[0, 0].tolist() == WHITE
  assert got[32, 32].tolist() == [0, 0, 0]


@pytest.mark.parametrize("transparent", [0, 3, 255])
def test_the_transparent_entry_of_a_palette_becomes_white(tmp_path, transparent):
  image = Image.fromarray(np.full((4, 4), transparent, np.uint8), "P")
  image.putpalette([10, 20, 30] * 256)
  image.save(tmp_path / "a.gif", transparency=transparent)
  image.save(tmp_path / "a.png", transparency=transparent)
  assert (pixels(tmp_path / "a.gif") == 255).all()
  assert (pixels(tmp_path / "a.png") == 255).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", ["dark", "light"])
def test_the_transparent_grey_level_of_a_png_becomes_white(tmp_path, bits, transparent):
  dark, light = 0, (2**bits - 1) * 2 // 3 if bits > 1 else 1
  file = grey_png(bits, [dark, light] * 4, dark if transparent == "dark" else light)
  (tmp_path / "a.png").write_bytes(file)
  got = pixels(tmp_path / "a.png")[0, :2].tolist()
  other = [0] * 3 if transparent == "light" else [255 if bits == 1 else 170] * 3
  assert got == ([WHITE, other] if transparent == "dark" else [other, WHITE])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_opaque_pixels_keep_their_colours_exactly(tmp_path_factory, seed):
  path = tmp_path_factory.mktemp("image") / "a.png"
  generator = np.random.default_rng(seed)
  x = generator.integers(0, 256, (8, 8, 4), np.uint8)
  x[..., 3] = 255 * generator.integers(0, 2, (8, 8))
  Image.fromarray(x).save(path)
  np.testing.assert_array_equal(pixels(path), np.where(x[..., 3:] == 255, x[..., :3], 255))


# --- depth and colour spaces --------------------------------------------------------------------


@pytest.mark.parametrize("file", ["ramp.png", "ramp.tiff", "big_endian.tiff", "ramp.pgm", "a.jp2"])
def test_16_bit_pixels_are_scaled_to_8(tmp_path, file):
  ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))
  image = Image.fromarray(ramp.astype(">u2") if file == "big_endian.tiff" else ramp)
  image.save(tmp_path / file)
  got = pixels(tmp_path / file)
  assert len(np.unique(got)) == 64
  np.testing.assert_allclose(got[..., 1], ramp / 257, atol=0.5)


def test_16_bit_colour_is_scaled_to_8(tmp_path):
  row = struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 65535, 0, 0)
  (tmp_path / "a.png").write_bytes(
    b"\x89PNG\r\n\x1a\n"
    + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    + png_chunk(b"tRNS", struct.pack(">3H", 65535, 0, 0))
    + png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    + png_chunk(b"IEND", b"")
  )
  assert pixels(tmp_path / "a.png")[0].tolist() == [[0x12, 0x56, 0x9A], WHITE]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(tmp_path, dtype):
  Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "depth.tiff")
  with pytest.raises(DataError, match=r"depth\.tiff cannot be read .*no known range.*8-bit"):
    read_image(tmp_path / "depth.tiff")


def test_an_inverted_16_bit_tiff_is_refused(tmp_path):
  """White is 0 in this file; Pillow would return the negative image."""
  info = TiffImagePlugin.ImageFileDirectory_v2()
  Image.fromarray(np.ones((4, 4), np.uint16)).save(tmp_path / "a.tiff", tiffinfo=info)
  data = (tmp_path / "a.tiff").read_bytes()
  entry = struct.pack("<HHI", 262, 3, 1)  # photometric interpretation, one short
  assert data.count(entry) == 1
  at = data.index(entry) + len(entry)
  (tmp_path / "a.tiff").write_bytes(data[:at] + b"\0" + data[at + 1 :])
  with pytest.raises(DataError, match="photometric interpretation 0"):
    read_image(tmp_path / "a.tiff")


@pytest.mark.parametrize("form", ["jpeg", "tiff"])
def test_cmyk_keeps_black_and_white(tmp_path, form):
  x = np.zeros((16, 16, 3), np.uint8)
  x[:, 8:] = 255
  Image.fromarray(x).convert("CMYK").save(tmp_path / f"a.{form}", form)
  got = pixels(tmp_path / f"a.{form}")
  assert got[:, :6].max() < 10
  assert got[:, 10:].min() > 245


@pytest.mark.parametrize(("mode", "form"), [("1", "png"), ("L", "png"), ("YCbCr", "jpeg")])
def test_other_modes_are_read(tmp_path, mode, form):
  (tmp_path / "a").write_bytes(encoded(form, mode))
  assert pixels(tmp_path / "a").shape == (20, 30, 3)


# --- orientation --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, mode, orientation):
  upright = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
  stored = {
    1: upright,
    2: upright[:, ::-1],
    3: upright[::-1, ::-1],
    4: upright[::-1],
    5: upright.T,
    6: np.rot90(upright),
    7: upright[::-1, ::-1].T,
    8: np.rot90(upright, -1),
  }[orientation]
  if mode == "I;16":
    image = Image.fromarray(np.ascontiguousarray(stored.astype(np.uint16) * 257))
  else:
    image = Image.fromarray(np.ascontiguousarray(stored)).convert(mode)
  exif = Image.Exif()
  exif[274] = orientation
  image.save(tmp_path / "a.png", exif=exif)
  np.testing.assert_array_equal(pixels(tmp_path / "a.png")[..., 0], upright)


# --- files that cannot be read ------------------------------------------------------------------


def test_a_png_with_too_much_text_is_named(tmp_path):
  """Pillow raises a ValueError for more than 1 MiB of compressed text."""
  info = PngImagePlugin.PngInfo()
  info.add_text("workflow", "x" * (3 << 20), zip=True)
  Image.new("RGB", (64, 64), "red").save(tmp_path / "text.png", pnginfo=info)
  with pytest.raises(DataError, match=r"text\.png cannot be read as an image \(.*MAX_TEXT_CHUNK"):
    read_image(tmp_path / "text.png")


FORMATS = {
  "png": encoded("png", "RGBA"),
  "jpeg": encoded("jpeg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"),
  "gif": encoded("gif"),
  "tiff": encoded("tiff", "LA"),
  "webp": encoded("webp", "RGBA"),
  "bmp": encoded("bmp"),
  "ppm": encoded("ppm"),
}


@settings(deadline=None, max_examples=150)
@given(
  st.sampled_from(sorted(FORMATS)),
  st.floats(0, 1),
  st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
)
@pytest.mark.filterwarnings("ignore")  # Pillow warns about some damaged files and reads them
def test_a_damaged_file_is_read_or_named(tmp_path_factory, form, kept, changes):
  data = bytearray(FORMATS[form])
  for place, value in changes:
    data[place % len(data)] = value
  path = tmp_path_factory.mktemp("damaged") / f"a.{form}"
  path.write_bytes(data[: round(kept * len(data))])
  message = str(path)
  try:
    assert read_image(path).mode == "RGB"
  except DataError as error:
    message = str(error)
  assert message.startswith(str(path))
  assert "\n" not in message


@pytest.mark.parametrize("read", [read_image, read_json])
def test_missing_files_folders_and_empty_files_are_named(tmp_path, read):
  (tmp_path / "empty").touch()
  for name, problem in (("gone", "does not exist"), ("", "is a folder"), ("empty", "is empty")):
    with pytest.raises(DataError, match=problem) as caught:
      read(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_json_is_read_with_and_without_a_byte_order_mark(tmp_path):
  for encoding in ("utf-8", "utf-8-sig"):
    (tmp_path / "a.json").write_text(json.dumps({"chair": "ä"}), encoding=encoding)
    assert read_json(tmp_path / "a.json") == {"chair": "ä"}


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"[" * 100_000], ids=["cut", "bytes", "deep"])
def test_what_is_not_json_is_named(tmp_path, data):
  (tmp_path / "a.json").write_bytes(data)
  with pytest.raises(DataError, match=r"a\.json cannot be read as JSON") as caught:
    read_json(tmp_path / "a.json")
  assert "\n" not in str(caught.value)
