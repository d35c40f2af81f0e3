"""The OpenSlide library that is loaded, from where, and what it decodes."""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import openslide
from PIL import features as pillow

from gigapath.doctor.findings import Diagnosis
from gigapath.doctor.made_slide import paint, write_slide
from gigapath.preprocessing.slide import open_slide

_MAPS = Path("/proc/self/maps")
_OLDEST = (4, 0)  # DICOM, and many mended readers
# Lossy codecs move a colour by a few steps.
_LARGEST_MEAN_ERROR = 3.0


def check_library() -> list[Diagnosis]:
    """Version and place of the library in use."""
    version, place = str(openslide.__library_version__), loaded_from()
    text = f"OpenSlide {version} from {place or 'an unknown place'}"
    facts = {"version": version, "path": place, "python": openslide.__version__}
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < _OLDEST:
        mend = "pip install openslide-bin: it brings 4.0, which reads DICOM and mends other readers."
        return [Diagnosis("slides", "openslide", "note", text, mend, facts)]
    return [Diagnosis("slides", "openslide", "ok", text, facts=facts)]


def loaded_from() -> str | None:
    """The file of the loaded library: as the system says, else that of the package which brings it."""
    try:
        mapped = [
            line.split(maxsplit=5)[-1].strip() for line in _MAPS.read_text().splitlines() if "libopenslide" in line
        ]
    except OSError:  # not Linux
        mapped = []
    if mapped:
        return mapped[0]
    package = sys.modules.get("openslide_bin")
    return None if package is None else os.path.dirname(str(package.__file__))  # noqa: PTH120


def check_codecs() -> list[Diagnosis]:
    """Write a small slide with each codec that slides use and read it back."""
    found = []
    image = paint(300, 280)
    for codec, needs in (("none", ""), ("jpeg", "jpg"), ("jpeg2000", "jpg_2000")):
        name = {"none": "uncompressed", "jpeg": "JPEG", "jpeg2000": "JPEG 2000"}[codec]
        if needs and not pillow.check(needs):
            text = f"{name}: not tried, Pillow here can't write it"
            found.append(Diagnosis("slides", f"codec-{codec}", "note", text))
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("made.svs" if codec == "jpeg2000" else "made.tif")
            write_slide(path, image, mpp=0.5, compression=codec)
            try:
                with open_slide(path) as slide:
                    pixels = slide.read(0, 0, 0, 300, 280)
                error = float(np.abs(pixels.astype(int) - image).mean())
                fault = "" if error <= _LARGEST_MEAN_ERROR else f"colours are off by {error:.1f} on average"
            except ValueError as problem:
                fault = str(problem)
        text = f"{name}: {fault or 'read and right'}"
        mend = "pip install --force-reinstall openslide-bin." if fault else ""
        found.append(Diagnosis("slides", f"codec-{codec}", "wrong" if fault else "ok", text, mend))
    return found
