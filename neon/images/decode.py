"""One image file to pixels: the one place that decides what a file's mode means.

Exactly 8-bit grey and RGB are taken as they are stored, palettes without transparency through their palette. CMYK (some
photographs of ImageNet) is converted by Pillow without a colour profile. Of several frames or pages the first is taken;
an EXIF orientation is not applied. These three and lossy formats are remarked on. Everything else is refused by name.
"""

from __future__ import annotations

import io
import re
import struct

import numpy as np
from PIL import Image

from fid.files import read_array_header
from neon.images.crop import center_crop
from neon.images.image_set import Remarks, UnreadableImagesError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
"""Of Pillow's formats those that hold one plain picture and begin with a mark of their own. EPS would start Ghostscript
on the file's program."""
SUFFIXES = {
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".pfm", ".avif", ".avifs", ".jp2", ".j2k", ".jpc", ".jpx", ".jpf", ".j2c", ".npy",
}  # fmt: skip
REFUSED_SUFFIXES = {
    ".heic", ".heif", ".jxl", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".psd", ".svg", ".eps", ".ps", ".rgba", ".ico",
    ".icns", ".dds", ".wmf", ".emf", ".xbm", ".xpm", ".fits", ".fit", ".qoi", ".tga", ".pcx", ".sgi", ".rgb", ".bw",
}  # fmt: skip
"""Pictures, by their name, that are not read: they are counted, and refused, not left out."""
MODES = {
    "1": "one bit per pixel",
    "LA": "grey with an alpha channel",
    "La": "grey with an alpha channel",
    "PA": "a palette with an alpha channel",
    "RGBA": "an alpha channel",
    "RGBa": "an alpha channel",
    "RGBX": "a fourth channel",
    "F": "float values",
    "I": "16 or 32 bits per channel",
    "YCbCr": "YCbCr",
    "LAB": "Lab",
    "HSV": "HSV",
}
ORIENTATION = 0x0112


def decode(name: str, data: bytes, remarks: Remarks, size: int | None = None) -> np.ndarray:
    """(C, H, W) uint8 pixels of an image file with C = 1 or 3, or the array of a .npy file.

    size: crop to size x size RGB as ImageNet is prepared (neon/images/crop.py).
    Raises UnreadableImagesError with one sentence that names the file.
    """
    if name.lower().endswith(".npy"):
        return decode_array(name, data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        problem = _depth_problem(image, data)
        if problem is None:
            _remark(name, image, data, remarks)
            image.load()
    except Exception as error:  # Pillow's decoders raise anything on damaged bytes
        raise UnreadableImagesError([f"{name}: {_reason(data, error)}"]) from error
    if problem is not None:
        raise UnreadableImagesError([f"{name}: {problem}; convert it to 8 bits per channel first"])
    return pixels(name, image, remarks, size)


def pixels(name: str, image: Image.Image, remarks: Remarks, size: int | None = None) -> np.ndarray:
    """(C, H, W) uint8 of a picture that Pillow has opened. Raises UnreadableImagesError for any mode but those of the
    module's first paragraph."""
    mode = image.mode
    if "transparency" in image.info or (image.palette is not None and image.palette.mode == "RGBA"):
        problem = f"has transparent pixels (mode {mode} with transparency): draw it on a background first"
        raise UnreadableImagesError([f"{name}: {problem}"])
    if mode == "CMYK":
        remarks.add("in CMYK were converted to RGB by Pillow, without a colour profile", name)
    elif mode not in ("L", "RGB", "P"):
        reason = MODES.get(mode, "16 bits per channel" if mode.startswith("I;16") else "not 8-bit grey or RGB")
        raise UnreadableImagesError([f"{name}: is of mode {mode} ({reason}); convert it to 8-bit grey or RGB first"])
    image = image if mode == "L" else image.convert("RGB")
    array = np.asarray(image if size is None else center_crop(image.convert("RGB"), size))
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def decode_array(name: str, data: bytes) -> np.ndarray:
    """The array of a .npy file: latents of a float type, (C, H, W) as they are stored ((1, C, H, W) too), or one uint8
    image (H, W), (H, W, C) or (C, H, W) with C = 1 or 3, as (C, H, W)."""
    try:
        header = read_array_header(io.BytesIO(data))
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UnreadableImagesError([f"{name}: {_reason(data, error)}"]) from error
    shape = header.shape
    if array.size and array.ndim >= 2:
        if array.dtype in (np.float16, np.float32, np.float64) and np.prod(shape[:-3]) == 1:
            return array.reshape(-1, *shape[-2:])
        if array.dtype == np.uint8 and array.ndim == 2:
            return array[None]
        is_last, is_first = (array.ndim == 3 and shape[axis] in (1, 3) for axis in (-1, 0))
        if array.dtype == np.uint8 and is_last != is_first:
            return np.ascontiguousarray(array.transpose(2, 0, 1)) if is_last else array
    expected = "one uint8 image with 1 or 3 channels, or float latents (C, H, W)"
    raise UnreadableImagesError([f"{name}: holds {array.dtype} {shape}; expected {expected}"])


def _depth_problem(image: Image.Image, data: bytes) -> str | None:
    """What Pillow would drop without a word: the low bits of deeper channels, and a fourth channel."""
    bits, tags = 8, getattr(image, "tag_v2", {})
    if image.format == "PNG":
        bits = data[24]
    elif image.format == "PPM" and data[1:2] in b"2356":
        words = re.sub(rb"#[^\n]*", b"", data[:4096]).split(maxsplit=4)
        if image.mode in ("L", "RGB") and int(words[3]) != 255:
            return f"has values up to {int(words[3])} instead of 255"
    elif image.format == "TIFF":
        depth = tags.get(258, (1,))
        bits = max(depth if isinstance(depth, tuple) else (depth,))
        if tags.get(ORIENTATION, 1) != 1:
            return "is a TIFF that is stored turned (its Orientation is not 1): turn it"
        if image.mode == "RGB" and tags.get(277, 3) > 3:
            return f"has {tags.get(277)} channels"
    elif image.format == "JPEG2000":
        at = data.find(b"\xff\x4f\xff\x51")
        bits = (data[at + 42] & 0x7F) + 1 if at >= 0 else 8
    elif image.format == "AVIF":
        at = data.find(b"pixi")
        bits = data[at + 9] if at >= 0 else 8
    if bits > 8 and image.mode in ("L", "RGB", "P"):
        return f"has {bits} bits per channel"
    return None


def _remark(name: str, image: Image.Image, data: bytes, remarks: Remarks) -> None:
    if getattr(image, "n_frames", 1) > 1:
        image.seek(0)
        remarks.add("have several frames or pages, of which the first is used", name)
    if image.getexif().get(ORIENTATION, 1) not in (0, 1):
        remarks.add("have an EXIF orientation, which is not applied: pixels are taken as they are stored", name)
    kind = image.format
    if kind == "TIFF" and str(image.info.get("compression")) in ("jpeg", "tiff_jpeg", "webp"):
        kind = "JPEG in TIFF"
    elif kind not in ("JPEG", "MPO", "AVIF", "JPEG2000") and not (kind == "WEBP" and not _is_lossless_webp(data)):
        return
    remarks.add(f"are of a lossy format ({kind}): its artefacts change a distance", name)


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the first picture of a WebP file is coded without loss: its chunk is VP8L, not "VP8 "."""
    at = 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8L"
        at += 24 if kind == b"ANMF" else 8 + length + length % 2  # an animation's frame holds chunks of its own
    return False


def _reason(data: bytes, error: Exception) -> str:
    head = data[:64].lstrip().lower()
    if not data:
        return "is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull`"
    if head.startswith((b"<!doctype", b"<html")):
        return "is a web page, not an image"
    if "cannot identify image file" in str(error):
        return f"cannot be decoded: it is of no format that is read here (it begins with {data[:8].hex(' ')})"
    if isinstance(error, struct.error | IndexError | KeyError | EOFError):
        return "cannot be decoded: the file ends before its data do, or is damaged"
    return f"cannot be decoded ({str(error).partition(chr(10))[0] or type(error).__name__})"
