"""A corpus of broken inputs, made on the spot from good ones: slides, feature files, tables, masks, archives."""

import gzip
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from made_slides import paint_tissue, write_pyramid
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Change = Callable[[bytes], bytes]

# Shares of a file that are left of it.
CUTS = (0.0, 0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97, 0.999)


def cut(share: float) -> Change:
    return lambda content: content[: int(len(content) * share)]


def first(count: int) -> Change:
    return lambda content: content[:count]


def over(start: float, length: int, byte: bytes) -> Change:
    """Bytes written over a part of the file."""

    def change(content: bytes) -> bytes:
        at = int(len(content) * start)
        return content[:at] + (byte * length)[: max(0, min(length, len(content) - at))] + content[at + length :]

    return change


def noise(length: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(length)


def tag(number: int, value: int | None, *, page: int = 0, kind: int | None = None) -> Change:
    """A value in a classic little-endian TIFF's directory: the tag's own four bytes, or its type; None takes it out."""

    def change(content: bytes) -> bytes:
        data = bytearray(content)
        at = struct.unpack_from("<I", data, 4)[0]
        for _ in range(page):
            count = struct.unpack_from("<H", data, at)[0]
            at = struct.unpack_from("<I", data, at + 2 + 12 * count)[0]
        for index in range(struct.unpack_from("<H", data, at)[0]):
            entry = at + 2 + 12 * index
            if struct.unpack_from("<H", data, entry)[0] == number:
                if value is None:
                    struct.pack_into("<H", data, entry, 65000)  # a private tag that nobody reads
                else:
                    struct.pack_into("<I", data, entry + 8, value & 0xFFFFFFFF)
                if kind is not None:
                    struct.pack_into("<H", data, entry + 2, kind)
                return bytes(data)
        raise AssertionError(f"no tag {number}")

    return change


def directory_at(offset: int) -> Change:
    return lambda content: content[:4] + struct.pack("<I", offset) + content[8:]


def directory_loop(content: bytes) -> bytes:
    """The last directory points back to the first."""
    data = bytearray(content)
    start = at = struct.unpack_from("<I", data, 4)[0]
    while True:
        link = at + 2 + 12 * struct.unpack_from("<H", data, at)[0]
        following = struct.unpack_from("<I", data, link)[0]
        if not following:
            struct.pack_into("<I", data, link, start)
            return bytes(data)
        at = following


def text(old: bytes, new: bytes) -> Change:
    """Other words of the same length in an Aperio header."""

    def change(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new.ljust(len(old))[: len(old)])

    return change


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""
    import zlib

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (300, 200), **how: Any) -> bytes:
    content = io.BytesIO()
    Image.new(mode, size).save(content, kind, **how)
    return content.getvalue()


def long_text() -> PngInfo:
    """A text chunk that unpacks to more than Pillow takes."""
    info = PngInfo()
    info.add_text("Comment", "a" * 3_000_000, zip=True)
    return info


def good_slide(folder: Path, name: str = "good.tif", seed: int = 0) -> Path:
    return write_pyramid(folder / name, paint_tissue(620, 500, seed=seed), mpp=(0.5, 0.5), steps=(1, 2))


# File names that can't be ids, of slides that are good otherwise -> what is said of each.
BAD_NAMES = {
    "line\nend": "control characters",
    "return\rand\ttab": "control characters",
    "\x1b[2Jescape\x07": "control characters",
    "c1\x9bcontrol": "control characters",
    "turned\u202efdp.svs": "control characters",
    "-dash-first": "formula",
    "=cmd": "formula",
    "back\\slash": "slashes",
    "..\\up": "slashes",
    "x" * 190: "at most 180 bytes",
    "é" * 100: "at most 180 bytes",
}


def write_slides(folder: Path) -> dict[str, Path]:
    """name -> a slide that can't be tiled, or that must at least not stop the others; none is good."""
    folder.mkdir(parents=True, exist_ok=True)
    tif = good_slide(folder, "template.tif").read_bytes()
    aperio = write_pyramid(
        folder / "template.svs", paint_tissue(620, 500), mpp=(0.5, 0.5), steps=(1, 2), aperio=True, objective=20
    ).read_bytes()
    for name in ("template.tif", "template.svs"):
        (folder / name).unlink()
    changes: dict[str, tuple[str, bytes, Change]] = {
        **{f"cut-{int(share * 1000)}": (".tif", tif, cut(share)) for share in CUTS},
        **{f"svs-cut-{int(share * 1000)}": (".svs", aperio, cut(share)) for share in CUTS[1:6]},
        "one-byte": (".tif", tif, first(1)),
        "magic-alone": (".tif", tif, first(4)),
        "header-alone": (".tif", tif, first(8)),
        "zeros": (".tif", tif, lambda content: bytes(len(content))),
        "noise": (".svs", tif, lambda content: noise(len(content))),
        "text": (".svs", b"slide,label\n", lambda content: content),
        "web-page": (".svs", b"<!DOCTYPE html><html>Sign in</html>", lambda content: content),
        "lfs-pointer": (".svs", b"version https://git-lfs.github.com/spec/v1\n", lambda content: content),
        "big-endian-mark": (".tif", tif, lambda content: b"MM" + content[2:]),
        "directory-beyond-the-end": (".tif", tif, directory_at(0x7FFFFFFF)),
        "directory-in-itself": (".tif", tif, directory_at(4)),
        "directory-loop": (".tif", tif, directory_loop),
        "width-0": (".tif", tif, tag(256, 0)),
        "width-huge": (".tif", tif, tag(256, 0x7FFFFFFF)),
        "height-huge": (".tif", tif, tag(257, 0x7FFFFFF0)),
        "both-sides-huge": (".tif", tif, lambda content: tag(257, 3_000_000)(tag(256, 3_000_000)(content))),
        "tile-side-0": (".tif", tif, tag(322, 0)),
        "tile-side-huge": (".tif", tif, tag(322, 0x7FFFFFF0)),
        "no-tile-offsets": (".tif", tif, tag(324, None)),
        "no-tile-sizes": (".tif", tif, tag(325, None)),
        "tile-offsets-beyond-the-end": (".tif", tif, tag(324, 0x7FFFFFFF)),
        "unknown-compression": (".tif", tif, tag(259, 60000)),
        "one-sample-a-pixel": (".tif", tif, tag(277, 1)),
        "no-resolution": (".tif", tif, tag(282, None)),
        "resolution-beyond-the-end": (".tif", tif, tag(282, 0x7FFFFFFF)),
        "mpp-nan": (".svs", aperio, text(b"MPP = 0.500000", b"MPP = nan")),
        "mpp-0": (".svs", aperio, text(b"MPP = 0.500000", b"MPP = 0")),
        "mpp-negative": (".svs", aperio, text(b"MPP = 0.500000", b"MPP = -0.5")),
        "mpp-absurd": (".svs", aperio, text(b"MPP = 0.500000", b"MPP = 1e30")),
        "mpp-word": (".svs", aperio, text(b"MPP = 0.500000", b"MPP = unknown")),
        "power-contradicts": (".svs", aperio, text(b"AppMag = 20", b"AppMag = 80")),
        "tiles-zeroed": (".tif", tif, over(0.15, len(tif) // 2, b"\0")),
        "tiles-overwritten": (".tif", tif, over(0.15, len(tif) // 2, noise(4096))),
        "levels-cut-off": (".tif", tif, tag(324, 0, page=1)),
        "png-as-svs": (".svs", picture("PNG"), cut(1.0)),
        "jpeg-as-tif": (".tif", picture("JPEG"), cut(1.0)),
        "png-bomb": (".png", png_header(100_000, 100_000), cut(1.0)),
        "png-cut": (".png", picture("PNG"), cut(0.7)),
        "png-text-too-long": (".png", picture("PNG", pnginfo=long_text()), cut(1.0)),
        "png-16-bit": (".png", picture("PNG", "I;16"), cut(1.0)),
        "jpeg-cut": (".jpeg", picture("JPEG"), cut(0.5)),
        "jpeg-cmyk": (".jpeg", picture("JPEG", "CMYK"), cut(1.0)),
        "zip-as-ndpi": (".ndpi", zip_bytes({"a.txt": b"x"}), cut(1.0)),
        "mrxs-without-its-folder": (".mrxs", picture("JPEG"), cut(1.0)),
        "dicom-preamble-alone": (".dcm", bytes(128) + b"DICM", cut(1.0)),
        "vms-of-nothing": (".vms", b"[Virtual Microscope Specimen]\nNoLayers=1\n", cut(1.0)),
        "two spaces": (".tif", tif, cut(0.4)),
        "ünïcode-切片": (".tif", tif, cut(0.4)),
        "nfd-é": (".tif", tif, cut(0.4)),
        "quote'and,comma": (".tif", tif, cut(0.4)),
        "-dash-first": (".tif", tif, cut(0.4)),
        "percent%s{x}": (".tif", tif, cut(0.4)),
        **{name: (".tif", tif, cut(1.0)) for name in BAD_NAMES},
    }
    found = {}
    for name, (suffix, content, change) in changes.items():
        found[name] = folder / f"{name}{suffix}"
        found[name].write_bytes(change(content))
    found["a-folder"] = folder / "a-folder.svs"
    found["a-folder"].mkdir()
    for name, target in (("dangling", "nothing-there.tif"), ("link-to-itself", "link-to-itself.tif")):
        found[name] = folder / f"{name}.tif"
        found[name].symlink_to(target)
    found["a-pipe"] = folder / "a-pipe.tif"
    os.mkfifo(found["a-pipe"])
    found["absent"] = folder / "absent.tif"
    return found


def zip_bytes(members: Mapping[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


def broken_h5(good: bytes) -> dict[str, bytes]:
    """name -> bytes in place of a good h5 file's."""
    cuts = {f"cut-{int(share * 1000)}": cut(share)(good) for share in CUTS}
    return {
        **cuts,
        "one-byte": good[:1],
        "magic-alone": good[:8],
        "last-byte-gone": good[:-1],
        "zeros": bytes(len(good)),
        "noise": noise(len(good)),
        "text": b"slide_id,label\n",
        "superblock-overwritten": good[:8] + noise(88) + good[96:],
        "root-overwritten": good[:96] + noise(200) + good[296:],
        "middle-overwritten": over(0.5, 400, b"\xff")(good),
        "png": picture("PNG"),
        "zip": zip_bytes({"features.npy": b"x"}),
        "npz-as-h5": npz_bytes(features=np.zeros((3, 4), np.float32)),
    }  # fmt: skip


def npz_bytes(**arrays: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def huge_npz(name: str = "features") -> bytes:
    """An npz whose array claims a petabyte."""
    header = repr({"descr": "<f4", "fortran_order": False, "shape": (10**12, 256)}).encode()
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return zip_bytes({f"{name}.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header})


def zip_bomb(name: str, size: int = 1 << 26) -> bytes:
    """A member of zeros, a thousandth of its size."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as member:
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))
    return content.getvalue()


BROKEN_CSV: dict[str, bytes] = {
    "empty": b"",
    "header-alone": b"slide_id,label,path,input\n",
    "zeros": bytes(300),
    "noise": noise(300),
    "latin-1": "slide_id,label,path,input\nM\xfcller,1,a,a\n".encode("latin-1"),
    "utf-16": "slide_id,label\na,1\n".encode("utf-16"),
    "ragged": b"slide_id,label,path,input,split\na,1\nb\n",
    "too-long-row": b"slide_id,label,path,input,split\na,1,a,a,train,more,more\n",
    "open-quote": b'slide_id,label,path,input,split\n"a,1,a,a,train\n',
    "nul": b"slide_id,label,path,input,split\na\0b,1,a\0b.tif,a,train\n",
    "huge-field": b"slide_id,label,path,input,split\n" + b"a" * 200_000 + b",1,a,a,train\n",
    "columns-twice": b"path,path,slide_id,slide_id,label,label,input,input\na,b,c,d,0,1,e,f\n",
    "no-known-column": b"foo,bar\n1,2\n",
    "semicolons": b"slide_id;label;path\na;1;b\n",
    "png": picture("PNG"),
    "json": b'[{"slide_id": "a"}]',
    "blank-lines": b"\n\n\n\n",
    "bom-alone": b"\xef\xbb\xbf",
    "carriage-returns": b"slide_id,label,path,input\ra,1,a,a\rb,0,b,b\r",
}

BROKEN_YAML: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(64),
    "noise": noise(200),
    "a-word": b"panda",
    "a-list": b"- a\n- b\n",
    "tab": b"name:\n\t- x",
    "open-quote": b'name: "x',
    "python-object": b"!!python/object/apply:os.system ['true']",
    "python-name": b"name: !!python/name:os.system\nsetting: binary\nlabel_dict: {a: 0, b: 1}",
    "alias-bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (c + 1, c + 1, b",".join([b"*%c" % c] * 9)) for c in range(97, 108))
    + b"name: *l\nsetting: binary\nlabel_dict: *l\n",
    "in-itself": b"&a\nname: x\nsetting: binary\nlabel_dict: *a\n",
    "deep": b"name: " + b"[" * 3000 + b"]" * 3000,
    "bad-date": b"name: 2001-99-99\nsetting: binary\nlabel_dict: {a: 0, b: 1}",
    "long-number": b"name: " + b"9" * 6000,
    "unhashable-key": b"? [a]\n: b\n",
    "setting-of-a-list": b"name: x\nsetting: [a]\nlabel_dict: {a: 0}",
    "metrics-of-dicts": b"name: x\nsetting: binary\nlabel_dict: {a: 0, b: 1}\nadd_metrics: [{a: 1}]",
    "indices-with-a-gap": b"name: x\nsetting: multi_class\nlabel_dict: {a: 0, b: 2}",
    "unknown-key": b"name: x\nsetting: binary\nlabel_dict: {a: 0, b: 1}\nlearning_rate: 1",
    "max-tiles-infinite": b"name: x\nsetting: binary\nlabel_dict: {a: 0, b: 1}\nmax_tiles: .inf",
    "two-documents": b"name: x\n---\nname: y\n",
    "latin-1": "name: M\xfcller".encode("latin-1"),
}


def _feature(geometry: object) -> bytes:
    return json.dumps({"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": geometry}]}).encode()


BROKEN_GEOJSON: dict[str, bytes] = {
    "empty": b"",
    "zeros": bytes(64),
    "noise": noise(200),
    "cut": _feature({"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9]]]})[:60],
    "a-word": b'"x"',
    "a-number": b"3",
    "null": b"null",
    "nan": b"NaN",
    "features-null": b'{"type": "FeatureCollection", "features": null}',
    "features-number": b'{"type": "FeatureCollection", "features": 7}',
    "feature-null": b'{"type": "FeatureCollection", "features": [null]}',
    "geometry-number": _feature(3),
    "geometry-text": _feature("Polygon"),
    "geometry-list": _feature([1, 2]),
    "no-coordinates": _feature({"type": "Polygon"}),
    "coordinates-number": _feature({"type": "Polygon", "coordinates": 3}),
    "coordinates-text": _feature({"type": "Polygon", "coordinates": [["ab", "cd", "ef"]]}),
    "two-points": _feature({"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}),
    "ragged": _feature({"type": "Polygon", "coordinates": [[[0, 0], [1], [2, 2]]]}),
    "infinite": b'{"type": "Polygon", "coordinates": [[[0, 0], [1e999, 0], [1, 1]]]}',
    "long-number": b'{"type": "Polygon", "coordinates": [[[0, 0], [1' + b"0" * 400 + b", 0], [1, 1]]]}",
    "very-long-number": b'{"type": "Polygon", "coordinates": [[[0, 0], [1' + b"0" * 6000 + b", 0], [1, 1]]]}",
    "deep": b"[" * 100_000,
    "deep-collection": b'{"type":"GeometryCollection","geometries":[' * 2000 + b"]}" * 2000,
    "outside": _feature({"type": "Polygon", "coordinates": [[[1e9, 1e9], [2e9, 1e9], [2e9, 2e9]]]}),
    "utf-16": _feature({"type": "Point"}).decode().encode("utf-16"),
    "gz-cut": gzip.compress(_feature({"type": "Point", "coordinates": [0, 0]}))[:30],
    "gz-noise": b"\x1f\x8b\x08\0" + noise(100),
    "gz-bomb": gzip.compress(bytes(65 << 20), 1),
    "class-names-of-numbers": json.dumps(
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9]]]},
            "properties": {"classification": {"names": [1, None]}},
        }
    ).encode(),
}
