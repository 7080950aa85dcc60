"""What users' image sets look like: some hundred small files and folders, made here, each with what must come of it.

Either exactly the right pixels and labels, or one line that names the file. The truth is the array a file was made
from; for lossy formats it is what Pillow decodes.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (2, 6, 8), np.uint8)
COLOUR = RANDOM.integers(0, 256, (2, 6, 8, 3), np.uint8)


@dataclass(frozen=True, kw_only=True)
class Case:
    """make(folder) writes something and returns what is opened. images: (N, C, H, W) that it must give, or error: what
    the one line must say beside the name of the file; remark: what must be remarked on."""

    name: str
    make: Callable[[Path], Path]
    images: np.ndarray | None = None
    labels: list | None = None
    error: str | None = None
    remark: str | None = None
    size: int | None = None
    use_labels: bool = True


def first_last(images: np.ndarray) -> np.ndarray:
    """(N, H, W) or (N, H, W, C) as (N, C, H, W)."""
    return images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def in_folder(contents: Mapping[str, bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for name, data in contents.items():
            (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "set" / name).write_bytes(data)
        return folder / "set"

    return make


def in_zip(contents: Mapping[str, bytes], method: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "set.zip", "w", method) as archive:
            for name, data in contents.items():
                archive.writestr(name, data)
        return folder / "set.zip"

    return make


def containers(contents: Mapping[str, bytes]) -> dict[str, Callable[[Path], Path]]:
    return {
        "folder": in_folder(contents),
        "stored": in_zip(contents, zipfile.ZIP_STORED),
        "deflated": in_zip(contents, zipfile.ZIP_DEFLATED),
    }


def png(image: np.ndarray) -> bytes:
    return encoded(Image.fromarray(image), "png")


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def palette_image(image: np.ndarray) -> tuple[Image.Image, np.ndarray]:
    """A palette picture, and the RGB pixels that it shows."""
    found = Image.fromarray(image).quantize(16)
    return found, np.asarray(found.convert("RGB"))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    import zlib

    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png16() -> bytes:
    """16-bit RGB, which Pillow cannot write."""
    import zlib

    rows = RANDOM.integers(0, 65536, (6, 8, 3), np.uint16).astype(">u2")
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def netpbm(magic: str, maximum: int, samples: np.ndarray, comment: str = "") -> bytes:
    kind = ">u2" if maximum > 255 else "u1"
    return f"{magic}\n{comment}8 6\n{maximum}\n".encode() + samples.astype(kind).tobytes()


def modes() -> Iterator[Case]:
    """Every mode in every format that can hold it, in three containers."""
    exact: dict[str, list[tuple[bytes, np.ndarray]]] = {}
    refused: dict[str, tuple[bytes, str]] = {}
    remarked: dict[str, str] = {}
    for i in range(2):
        grey, colour = Image.fromarray(GREY[i]), Image.fromarray(COLOUR[i])
        palette, shown = palette_image(COLOUR[i])
        for suffix, options in {
            "png": {}, "bmp": {}, "tif": {}, "tiff": {"compression": "tiff_lzw"}, "ppm": {},
            "webp": {"lossless": True, "exact": True}, "jp2": {"irreversible": False},
        }.items():  # fmt: skip
            kind = {"tif": "tiff", "jp2": "jpeg2000"}.get(suffix, suffix)
            exact.setdefault(f"rgb.{suffix}", []).append((encoded(colour, kind, **options), COLOUR[i]))
            if suffix != "webp":
                exact.setdefault(f"grey.{suffix}", []).append((encoded(grey, kind, **options), GREY[i]))
        for suffix in ("png", "bmp", "tiff", "gif"):
            exact.setdefault(f"palette.{suffix}", []).append((encoded(palette, suffix), shown))
        four = Image.fromarray(GREY[i] // 16)
        four.putpalette([v for v in range(0, 256, 17) for _ in range(3)])
        as_shown = (GREY[i] // 16 * 17)[..., None].repeat(3, 2)
        exact.setdefault("palette4.png", []).append((encoded(four, "png", bits=4), as_shown))
        exact.setdefault("grey.pgm", []).append((netpbm("P5", 255, GREY[i], "# a comment 99\n"), GREY[i]))
        plain = b"P2\n8 6\n255\n" + b" ".join(b"%d" % value for value in GREY[i].ravel())
        exact.setdefault("plain.pgm", []).append((plain, GREY[i]))
        for suffix, options in {"jpg": {"quality": 90}, "webp": {"quality": 90}, "avif": {"quality": 90}}.items():
            data = encoded(colour, {"jpg": "jpeg"}.get(suffix, suffix), **options)
            exact.setdefault(f"lossy.{suffix}", []).append((data, by_pillow(data)))
        data = encoded(grey, "jpeg")
        exact.setdefault("grey.jpe", []).append((data, np.asarray(Image.open(io.BytesIO(data)))))
        exact.setdefault("jpeg-named.png", []).append((data, np.asarray(Image.open(io.BytesIO(data)))))
        cmyk = encoded(colour.convert("CMYK"), "jpeg")
        exact.setdefault("cmyk.jpg", []).append((cmyk, by_pillow(cmyk)))
        frames = [colour, colour.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
        for suffix in ("tiff", "webp", "png"):
            options = {"lossless": True, "exact": True} if suffix == "webp" else {}
            data = encoded(frames[0], suffix, save_all=True, append_images=frames[1:], **options)
            exact.setdefault(f"frames.{suffix}", []).append((data, COLOUR[i]))
        exif = Image.Exif()
        exif[0x0112] = 6
        exact.setdefault("turned.png", []).append((encoded(colour, "png", exif=exif), COLOUR[i]))
    for suffix in ("jpg", "webp", "avif"):
        remarked[f"lossy.{suffix}"] = "lossy format"
    for name in ("grey.jpe", "jpeg-named.png"):
        remarked[name] = "lossy format (JPEG)"
    remarked["cmyk.jpg"] = "CMYK were converted"
    for suffix in ("tiff", "webp", "png"):
        remarked[f"frames.{suffix}"] = "several frames or pages"
    remarked["turned.png"] = "EXIF orientation"
    remarked["grey.jp2"] = remarked["rgb.jp2"] = "lossy format (JPEG2000)"

    alpha = np.concatenate([COLOUR[0], GREY[0][..., None]], 2)
    rgba, la = Image.fromarray(alpha), Image.fromarray(alpha[..., 2:])
    deep = RANDOM.integers(0, 65536, (6, 8), np.uint16)
    palette, _ = palette_image(COLOUR[0])
    turned = Image.Exif()
    turned[0x0112] = 3
    exact["fourth-byte.bmp"] = [(encoded(rgba, "bmp"), COLOUR[0])]  # reserved: of no meaning in this format
    for suffix in ("png", "tiff", "webp", "avif", "jp2"):
        kind = {"jp2": "jpeg2000"}.get(suffix, suffix)
        refused[f"rgba.{suffix}"] = (encoded(rgba, kind), "an alpha channel")
    refused |= {
        "la.png": (encoded(la, "png"), "an alpha channel"),
        "la.tiff": (encoded(la, "tiff"), "an alpha channel"),
        "bit.png": (encoded(Image.fromarray(GREY[0]).convert("1"), "png"), "one bit per pixel"),
        "bit.tiff": (encoded(Image.fromarray(GREY[0]).convert("1"), "tiff"), "one bit per pixel"),
        "bit.pbm": (encoded(Image.fromarray(GREY[0]).convert("1"), "ppm"), "one bit per pixel"),
        "deep.png": (encoded(Image.fromarray(deep), "png"), "16"),
        "deep.tiff": (encoded(Image.fromarray(deep), "tiff"), "16"),
        "deep.jp2": (encoded(Image.fromarray(deep), "jpeg2000"), "16"),
        "deep.pgm": (netpbm("P5", 65535, deep), "16"),
        "deep.ppm": (netpbm("P6", 65535, deep[..., None].repeat(3, 2)), "values up to 65535"),
        "deep-rgb.png": (png16(), "16 bits per channel"),
        "scaled.ppm": (netpbm("P6", 100, COLOUR[0] % 101), "values up to 100"),
        "scaled.pgm": (netpbm("P5", 15, GREY[0] % 16), "values up to 15"),
        "float.tiff": (encoded(Image.fromarray(GREY[0].astype(np.float32) / 255), "tiff"), "float values"),
        "int.tiff": (encoded(Image.fromarray(GREY[0].astype(np.int32)), "tiff"), "16 or 32 bits"),
        "lab.tiff": (encoded(Image.fromarray(COLOUR[0], mode="LAB"), "tiff"), "Lab"),
        "see-through-palette.png": (encoded(palette, "png", transparency=3), "transparent"),
        "see-through-palette.gif": (encoded(palette, "gif", transparency=3), "transparent"),
        "see-through-grey.png": (encoded(Image.fromarray(GREY[0]), "png", transparency=7), "transparent"),
        "see-through-rgb.png": (encoded(Image.fromarray(COLOUR[0]), "png", transparency=(1, 2, 3)), "transparent"),
        "turned.tiff": (encoded(Image.fromarray(COLOUR[0]), "tiff", exif=turned), "stored turned"),
        "photo.heic": (b"\0\0\0\x18ftypheic", "no format that is read here"),
        "drawing.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no format that is read here"),
        "figure.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no format that is read here"),
    }
    for name, pair in exact.items():
        stem, suffix = name.split(".")
        contents = {f"{stem}{i}.{suffix}": data for i, (data, _) in enumerate(pair)}
        images = first_last(np.stack([pixels for _, pixels in pair]))
        for container, make in containers(contents).items():
            yield Case(name=f"{name}-{container}", make=make, images=images, remark=remarked.get(name))
    for name, (data, why) in refused.items():
        for container, make in containers({"good.png": png(COLOUR[0]), name: data}).items():
            yield Case(name=f"{name}-{container}", make=make, error=f"{name}: |{why}")
        yield Case(name=f"{name}-cropped", make=in_folder({name: data}), error=f"{name}: |{why}", size=4)


def damage() -> Iterator[Case]:
    """Files that are cut, empty or something else, after a good one."""
    good = {
        "a.png": png(COLOUR[0]), "a.jpg": encoded(Image.fromarray(COLOUR[0]), "jpeg"),
        "a.gif": encoded(palette_image(COLOUR[0])[0], "gif"), "a.bmp": encoded(Image.fromarray(COLOUR[0]), "bmp"),
        "a.tiff": encoded(Image.fromarray(COLOUR[0]), "tiff"), "a.webp": encoded(Image.fromarray(COLOUR[0]), "webp"),
        "a.ppm": encoded(Image.fromarray(COLOUR[0]), "ppm"), "a.avif": encoded(Image.fromarray(COLOUR[0]), "avif"),
        "a.jp2": encoded(Image.fromarray(COLOUR[0]), "jpeg2000"), "a.npy": npy(COLOUR[0]),
    }  # fmt: skip
    kinds: dict[str, Callable[[bytes], bytes]] = {
        "cut": lambda data: data[: len(data) * 2 // 3],
        "head": lambda data: data[:11],
        "empty": lambda data: b"",
        "page": lambda data: b"<!DOCTYPE html><html><title>404</title></html>",
        "pointer": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "zeros": lambda data: bytes(len(data)),
    }
    for name, data in good.items():
        for kind, damaged in kinds.items():
            contents = {f"z{name}": damaged(data), "good.png": png(COLOUR[0])}
            yield Case(name=f"{kind}-{name}", make=in_folder(contents), error=f"z{name}: |")
    yield Case(
        name="first-of-three-bad",
        make=in_folder({"a.png": b"x", "b.png": png(COLOUR[0]), "c.png": b"y", "d.png": png(COLOUR[0])}),
        error="2 image file(s) cannot be used|a.png|c.png",
    )
    yield Case(name="all-bad", make=in_folder({f"{i}.png": b"x" for i in range(5)}), error="5 image file(s)|0.png")
    other = {"a.png": png(COLOUR[0]), "b.png": png(COLOUR[1][:4]), "c.png": png(GREY[0])}
    yield Case(name="sizes", make=in_folder(other), error="2 image file(s)|b.png: size (3, 4, 8)|c.png: size (1, 6, 8)")


def flipped(contents: Mapping[str, bytes], at: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = in_zip(contents, zipfile.ZIP_STORED)(folder)
        data = bytearray(path.read_bytes())
        data[at] ^= 16
        path.write_bytes(data)
        return path

    return make


def patched(contents: Mapping[str, bytes], offset: int, value: bytes) -> Callable[[Path], Path]:
    """Change a field in every header of the archive: offset counts from the end of the version in the local header."""

    def make(folder: Path) -> Path:
        path = in_zip(contents, zipfile.ZIP_STORED)(folder)
        data = bytearray(path.read_bytes())
        for mark, start in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            at = data.find(mark)
            while at >= 0:
                data[at + start + offset : at + start + offset + len(value)] = value
                at = data.find(mark, at + 4)
        path.write_bytes(data)
        return path

    return make


def raw(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def archives() -> Iterator[Case]:
    two = {"a.png": png(COLOUR[0]), "b.png": png(COLOUR[1])}
    images = first_last(COLOUR)
    yield Case(name="zip-flip", make=flipped(two, 60), error="a.png: cannot be unpacked|Bad CRC")
    yield Case(name="zip-locked", make=patched(two, 0, b"\1\0"), error="set.zip|2 of 2 files are encrypted|a.png")
    yield Case(name="zip-deflate64", make=patched(two, 2, b"\x09\0"), error="a.png: cannot be unpacked")
    yield Case(name="zip-empty", make=in_zip({}, 0), error="set.zip: no images found")
    yield Case(name="zip-cut", make=lambda folder: cut(in_zip(two, 0)(folder)), error="set.zip: not a readable zip")
    for name in ("x.zip", "x.npz", "x.npy"):
        yield Case(name=f"zero-{name}", make=raw(name, b""), error=f"{name}: |an empty file")
        yield Case(name=f"page-{name}", make=raw(name, b"<html>404"), error=f"{name}: |a web page")
        pointer = b"version https://git-lfs.github.com/spec/v1\n"
        yield Case(name=f"pointer-{name}", make=raw(name, pointer), error=f"{name}: |Git LFS pointer")
        yield Case(name=f"garbage-{name}", make=raw(name, b"\x93hello" * 9), error=f"{name}: |not a")
    yield Case(name="unknown", make=raw("x.rar", b"Rar!"), error="x.rar: not an image set")

    def twice(folder: Path) -> Path:
        import warnings

        with warnings.catch_warnings(), zipfile.ZipFile(folder / "set.zip", "w") as archive:
            warnings.simplefilter("ignore")
            for data in two.values():
                archive.writestr("a.png", data)
        return folder / "set.zip"

    yield Case(name="zip-twice", make=twice, error="set.zip|a.png|more than once")
    upper = lambda folder: in_zip(two, 0)(folder).rename(folder / "SET.ZIP")  # noqa: E731
    yield Case(name="zip-upper", make=upper, images=images)
    backslashes = {"cat\\1.png": png(COLOUR[0]), "dog\\2.png": png(COLOUR[1])}
    yield Case(name="zip-windows", make=in_zip(backslashes, 0), images=images, labels=[0, 1])


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-30])
    return path


def classes(names: list[str], extra: Mapping[str, bytes] | None = None) -> dict[str, bytes]:
    """Images in the order of `names`, which is sorted."""
    return {name: png(GREY[0] // (i + 1)) for i, name in enumerate(names)} | dict(extra or {})


def layouts() -> Iterator[Case]:
    """Which files count, and what their labels are."""

    def grey(count: int) -> np.ndarray:
        return np.stack([GREY[0] // (i + 1) for i in range(count)])[:, None]

    labelled = ["ant/1.png", "bee/1.png", "bee/2.png"]
    wanted: dict[str, tuple[list[str], list | None]] = {
        "flat": (["1.png", "2.png"], None),
        "classes": (labelled, [0, 1, 1]),
        "one-top": ([f"top/{name}" for name in labelled], [0, 1, 1]),
        "two-tops": ([f"data/train/{name}" for name in labelled], [0, 1, 1]),
        "one-class": (["ant/1.png", "ant/2.png"], None),
        "numbers": ([f"{n}/a.png" for n in ("0", "1", "10", "11", "2")], [0, 1, 3, 4, 2]),
        "padded-numbers": ([f"{n}/a.png" for n in ("00", "01", "02")], [0, 1, 2]),
        "deep": (["ant/x/1.png", "bee/y/z/2.png"], [0, 1]),
    }
    for name, (names, labels) in wanted.items():
        for container, make in containers(classes(names)).items():
            yield Case(name=f"{name}-{container}", make=make, images=grey(len(names)), labels=labels)
    hidden = {
        ".ipynb_checkpoints/1-checkpoint.png": png(GREY[1]), "bee/._1.png": b"resource", "__MACOSX/ant/._1.png": b"x",
        ".Trash-0/files/9.png": png(GREY[1]), "ant/.hidden.png": png(GREY[1]),
    }  # fmt: skip
    for container, make in containers(classes(labelled, hidden)).items():
        yield Case(name=f"hidden-{container}", make=make, images=grey(3), labels=[0, 1, 1], remark="hidden")
    notes = classes(["1.png", "2.png"], {"notes.txt": b"hello", "Thumbs.db": b"x"})
    for container, make in containers(notes).items():
        yield Case(name=f"notes-{container}", make=make, images=grey(2), remark="2 file(s) are no images by")
    stray = classes(["ant/1.png", "bee/2.png", "stray.png"])
    splits = classes(["train/ant/1.png", "val/ant/2.png"])
    other_splits = classes(["Train/ant/1.png", "Val2017/ant/2.png"])
    for container in ("folder", "stored"):
        yield Case(name=f"stray-{container}", make=containers(stray)[container], error="stray.png|outside the class")
        yield Case(
            name=f"stray-unlabelled-{container}", make=containers(stray)[container], images=grey(3), use_labels=False
        )
        yield Case(name=f"splits-{container}", make=containers(splits)[container], error="/train|the splits train, val")
        other = containers(other_splits)[container]
        yield Case(name=f"other-splits-{container}", make=other, error="the splits Train, Val2017")

    def linked_class(folder: Path) -> Path:
        in_folder(classes(["real/1.png"]))(folder)
        (folder / "set/real").rename(folder / "elsewhere")
        in_folder({"ant/1.png": png(GREY[0])})(folder)
        (folder / "set/bee").symlink_to(folder / "elsewhere")
        return folder / "set"

    def dangling(folder: Path) -> Path:
        in_folder(classes(["1.png", "2.png"]))(folder)
        (folder / "set/3.png").symlink_to(folder / "nowhere.png")
        return folder / "set"

    def loop(folder: Path) -> Path:
        in_folder(classes(["ant/1.png", "bee/2.png"]))(folder)
        (folder / "set/bee/again").symlink_to(folder / "set")
        return folder / "set"

    def foreign_manifest(folder: Path) -> Path:
        return in_folder(classes(["1.png", "2.png"], {"manifest.json": b'{"name": "a web app"}'}))(folder)

    def pipe(folder: Path) -> Path:
        in_folder(classes(["1.png", "2.png"]))(folder)
        os.mkfifo(folder / "set/3.png")
        return folder / "set"

    def no_utf8(folder: Path) -> Path:
        in_folder(classes(["1.png"]))(folder)
        (folder / "set" / os.fsdecode(b"\xff.png")).write_bytes(png(GREY[0] // 2))
        return folder / "set"

    yield Case(name="pipe", make=pipe, images=grey(2), remark="pipes or devices")
    yield Case(name="no-utf8", make=no_utf8, images=grey(2))
    only = {".a/1.png": png(GREY[0]), "part1.zip": b"PK"}
    yield Case(
        name="nothing-to-see",
        make=in_folder(only),
        error="set: no images found|first: part1.zip|hidden and not counted, first: .a",
    )
    yield Case(name="line-break", make=in_folder({"a\nb.png": b"x"}), error="a\\nb.png: cannot be decoded")
    yield Case(name="linked-class", make=linked_class, images=np.stack([GREY[0]] * 2)[:, None], labels=[0, 1])
    yield Case(name="dangling", make=dangling, error="3.png|lead nowhere")
    yield Case(name="loop", make=loop, images=grey(2), labels=[0, 1], remark="links back to a folder above")
    yield Case(name="foreign-manifest", make=foreign_manifest, images=grey(2), remark="no images by")
    if os.geteuid() == 0:
        yield Case(name="folder-gone", make=lambda folder: folder / "gone", error="no image set at")


def listings() -> Iterator[Case]:
    """Variants of dataset.json."""
    names = ["00000/a.png", "00000/b.png"]
    images = np.stack([GREY[0], GREY[0] // 2])[:, None]
    good: dict[str, tuple[bytes, list | None]] = {
        "indices": (json.dumps({"labels": [[names[1], 4], [names[0], 2]]}).encode(), [2, 4]),
        "vectors": (
            json.dumps({"labels": [[n, [0.5, 1]] for n in names]}).encode(),
            [[0.5, 1], [0.5, 1]],
        ),
        "null": (b'{"labels": null}', None),
        "bom": (b"\xef\xbb\xbf" + json.dumps({"labels": [[n, 1] for n in names]}).encode(), [1, 1]),
        "dots": (json.dumps({"labels": [[f"./{n}", 1] for n in names]}).encode(), [1, 1]),
        "windows": (json.dumps({"labels": [[n.replace("/", "\\"), 1] for n in names]}).encode(), [1, 1]),
        "whole-floats": (json.dumps({"labels": [[n, 3.0] for n in names]}).encode(), [3, 3]),
        "more-names": (json.dumps({"labels": [[n, 1] for n in [*names, "gone.png"]]}).encode(), [1, 1]),
    }
    for name, (data, labels) in good.items():
        remark = "in dataset.json and not in the set" if name == "more-names" else None
        contents = classes(names, {"dataset.json": data})
        for container, make in containers(contents).items():
            yield Case(name=f"json-{name}-{container}", make=make, images=images, labels=labels, remark=remark)
    below = {f"top/{name}": data for name, data in classes(names, {"dataset.json": good["indices"][0]}).items()}
    yield Case(name="json-below", make=in_folder(below), images=images, labels=[2, 4])
    first, second = names
    bad: dict[str, tuple[object, str]] = {
        "list": ([[first, 1], [second, 2]], "found a list"),
        "keys": ({"label": []}, "found the keys label"),
        "table": ({"labels": {first: 1}}, "a list of [file, label]"),
        "triples": ({"labels": [[first, 1, 2]]}, "a list of [file, label]"),
        "one-null": ({"labels": [[first, None], [second, 1]]}, "null"),
        "class-names": ({"labels": [[first, "cat"], [second, "dog"]]}, "cat"),
        "ragged": ({"labels": [[first, [1, 2]], [second, [1]]]}, "differ in kind or length"),
        "mixed": ({"labels": [[first, [1, 2]], [second, 1]]}, "differ in kind or length"),
        "true": ({"labels": [[first, True], [second, 1]]}, "true"),
        "negative": ({"labels": [[first, -1], [second, 1]]}, "no class index"),
        "fraction": ({"labels": [[first, 0.5], [second, 1]]}, "no class index"),
        "column": ({"labels": [[first, [1]], [second, [0]]]}, "labels are a column"),
        "missing": ({"labels": [[first, 1]]}, "no label for 1 of 2 images"),
        "two": ({"labels": [[first, 1], [first, 2], [second, 1]]}, "two labels"),
        "infinite": ({"labels": [[first, [float("inf"), 1]], [second, [1, 1]]]}, "finite"),
    }
    for name, (content, why) in bad.items():
        contents = classes(names, {"dataset.json": json.dumps(content).encode()})
        yield Case(name=f"json-{name}", make=in_folder(contents), error=f"dataset.json|{why}")
    for name, data in {"broken": b'{"labels": [[', "latin": b'{"labels": "\xe9"}', "empty": b""}.items():
        contents = classes(names, {"dataset.json": data})
        yield Case(name=f"json-{name}", make=in_folder(contents), error="dataset.json|no JSON")
    folders = [f"{n}/a.png" for n in ("0", "1", "10", "2")]
    old = {"labels": [[name, i] for i, name in enumerate(folders)]}
    contents = classes(folders, {"dataset.json": json.dumps(old).encode()})
    yield Case(name="json-old-order", make=in_folder(contents), error="dataset.json|order of their names")


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def arrays() -> Iterator[Case]:
    """npz and npy files, stored and compressed."""

    def written(name: str, save: Callable[..., None], **contents: np.ndarray) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            save(folder / name, **contents)
            return folder / name

        return make

    whole, grey = first_last(COLOUR), GREY[:, None]
    tags = np.array([1, 0])
    for way, save in {"stored": np.savez, "compressed": np.savez_compressed}.items():
        good: dict[str, tuple[dict[str, np.ndarray], np.ndarray, list | None]] = {
            "nhwc": ({"arr_0": COLOUR, "arr_1": tags}, whole, [1, 0]),
            "nchw": ({"images": np.ascontiguousarray(whole), "labels": tags}, whole, [1, 0]),
            "nhw": ({"images": GREY}, grey, None),
            "nhw1": ({"images": GREY[..., None]}, grey, None),
            "fortran": ({"images": np.asfortranarray(COLOUR)}, whole, None),
            "floats": ({"images": GREY, "labels": np.array([1.0, 0.0])}, grey, [1, 0]),
            "vectors": ({"images": GREY, "labels": np.eye(2)}, grey, [[1, 0], [0, 1]]),
            "no-class": ({"images": GREY, "labels": np.array([-1, -1])}, grey, None),
        }
        for name, (contents, images, labels) in good.items():
            make = written("set.npz", save, **contents)
            yield Case(name=f"npz-{name}-{way}", make=make, images=images, labels=labels)
        bad: dict[str, tuple[dict[str, np.ndarray], str]] = {
            "one-image": ({"images": COLOUR[0]}, "one image with its channels last"),
            "one-rgba": ({"images": np.zeros((6, 8, 4), np.uint8)}, "one image with its channels last"),
            "unit-floats": ({"images": GREY / 255}, "found float64"),
            "channels": ({"images": np.zeros((2, 6, 8, 4), np.uint8)}, "found uint8 (2, 6, 8, 4)"),
            "both-ways": ({"images": np.zeros((2, 3, 8, 3), np.uint8)}, "channels first or last"),
            "no-images": ({"images": GREY[:0]}, "found uint8 (0, 6, 8)"),
            "other-keys": ({"x": GREY}, "found x"),
            "strings": ({"images": GREY, "labels": np.array(["cat", "dog"])}, "labels are <U3"),
            "negative": ({"images": GREY, "labels": np.array([-1, 0])}, "no class index"),
            "fraction": ({"images": GREY, "labels": np.array([0.5, 0])}, "no class index"),
            "column": ({"images": GREY, "labels": np.array([[1], [0]])}, "labels are a column (2, 1)"),
            "nan": ({"images": GREY, "labels": np.array([np.nan, 0])}, "finite"),
            "count": ({"images": GREY, "labels": np.array([0, 1, 2])}, "2 images but labels (3,)"),
            "pickle": ({"images": np.array([{}, {}], dtype=object)}, "found object"),
        }
        for name, (contents, why) in bad.items():
            yield Case(name=f"npz-{name}-{way}", make=written("set.npz", save, **contents), error=f"set.npz|{why}")
        short = lambda folder, save=save: damaged_member(written("set.npz", save, images=COLOUR)(folder))  # noqa: E731
        yield Case(name=f"npz-damaged-{way}", make=short, error="set.npz")
    yield Case(name="npz-empty", make=raw("set.npz", encoded_zip({})), error="set.npz|found nothing")
    yield Case(name="npy", make=raw("set.npy", npy(GREY)), images=grey)
    yield Case(name="npy-cut", make=raw("set.npy", npy(GREY)[:-9]), error="set.npy|truncated")
    yield Case(name="npy-one", make=raw("set.npy", npy(COLOUR[0])), error="set.npy|one image")
    for container, make in containers({"a.npy": npy(COLOUR[0]), "b.npy": npy(COLOUR[1])}).items():
        yield Case(name=f"npy-files-{container}", make=make, images=whole)
    latents = RANDOM.normal(size=(2, 4, 6, 8)).astype(np.float32)
    contents = {f"{i}.npy": npy(latent) for i, latent in enumerate(latents)}
    yield Case(name="npy-latents", make=in_folder(contents), images=latents)
    contents = {"a.npy": npy(latents[0]), "b.png": png(COLOUR[0])}
    yield Case(name="npy-among-png", make=in_folder(contents), error="b.png: size")
    contents = {"a.npy": npy(COLOUR[0].astype(np.int64)), "b.png": png(COLOUR[0])}
    yield Case(name="npy-int", make=in_folder(contents), error="a.npy: holds int64")
    body = GREY.tobytes()
    for name, data, why in (
        ("good", b"\0\0\x08\x03" + struct.pack(">3I", 2, 6, 8) + body, None),
        ("cut", b"\0\0\x08\x03" + struct.pack(">3I", 2, 6, 8) + body[:-1], "truncated"),
        ("head", b"\0\0\x08\x03\0", "not an IDX file"),
        ("gzip", b"\x1f\x8b\x08\0cut", "not a whole gzip file"),
    ):
        file = "t-images-idx3-ubyte" + (".gz" if name == "gzip" else "")
        error = None if why is None else f"{file}|{why}"
        yield Case(name=f"idx-{name}", make=raw(file, data), images=grey if why is None else None, error=error)


def encoded_zip(contents: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def damaged_member(path: Path) -> Path:
    """The archive's first data bytes are overwritten: its checksum no longer holds."""
    data = bytearray(path.read_bytes())
    data[200:204] = bytes(255 - byte for byte in data[200:204])
    path.write_bytes(data)
    return path


def cases() -> list[Case]:
    found = [*modes(), *damage(), *archives(), *layouts(), *listings(), *arrays()]
    assert len({case.name for case in found}) == len(found)
    return found
