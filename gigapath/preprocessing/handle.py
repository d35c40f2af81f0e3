"""What opens a slide file, or says in one sentence why it can't be opened."""

from pathlib import Path

import openslide
import PIL.Image

from gigapath.preprocessing.header import SlideError, largest_tile

TILE_PIXELS = 2**28  # of the file's own tiles: OpenSlide ends the process where it can't have the memory for one
PLAIN_IMAGE_PIXELS = 89_000_000  # a plain image is decoded whole; Pillow itself warns from here on
_UNSUPPORTED = "Unsupported TIFF compression: "  # OpenSlide's words
PLAIN_IMAGE_MODES = ("RGB", "RGBA", "L", "LA", "P", "CMYK", "YCbCr")


def open_handle(path: Path, slide_id: str) -> openslide.AbstractSlide:
    """OpenSlide's handle, or Pillow's behind OpenSlide's plain-image class for JPEG and PNG."""
    who = f"slide {slide_id!r}"
    try:
        if path.is_dir():
            raise SlideError(f"{who}: expected a slide file, got a folder. Name the slides in it, or a list of them.")
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise SlideError(f"{who}: expected a slide file, got a pipe or a device. Name a regular file.")
        with path.open("rb") as file:
            if not file.read(1):
                raise SlideError(f"{who}: expected a slide file, got an empty one. Copy it again.")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{who}: expected a slide file, got none of the name {path.name!r}.") from error
    except OSError as error:
        raise SlideError(f"{who}: expected a readable file, got {error.strerror!r}. Check who may read it.") from error
    try:
        return _with_tiles_that_fit(openslide.OpenSlide(str(path)), who)
    except openslide.OpenSlideUnsupportedFormatError as error:
        unsupported: Exception = error
    except openslide.OpenSlideError as error:
        compression = str(error).partition(_UNSUPPORTED)[2]
        if compression:
            raise SlideError(
                f"{who}: expected a TIFF whose tiles OpenSlide decodes, got TIFF compression {compression}. Convert it "
                "to tiles in JPEG (vips tiffsave --tile --pyramid --compression jpeg)."
            ) from error
        raise SlideError(
            f"{who}: expected a whole slide, got one that OpenSlide knows but can't open. "
            "It is damaged, cut short, or lacks the files that belong to it: copy it again with all its parts."
        ) from error
    try:
        # Only these two: of a TIFF, Pillow would take the first page, whatever it shows.
        with PIL.Image.open(path, formats=("JPEG", "PNG")) as image:
            pixels, mode = image.width * image.height, image.mode
    except PIL.Image.DecompressionBombError:
        pixels, mode = PLAIN_IMAGE_PIXELS + 1, ""
    except MemoryError:
        raise
    except Exception:  # Pillow raises a dozen types for damaged files, ValueError for a text chunk too large among them
        raise SlideError(
            f"{who}: expected a slide that OpenSlide reads, or a JPEG or PNG image, got another format or a file "
            "cut short. Convert it to a tiled TIFF, or copy it again with all its parts."
        ) from unsupported
    if pixels > PLAIN_IMAGE_PIXELS:
        raise SlideError(
            f"{who}: expected a plain image of at most {PLAIN_IMAGE_PIXELS // 1_000_000} megapixels, got a larger one. "
            "Convert it to a tiled pyramid (vips tiffsave --tile --pyramid)."
        )
    if mode not in PLAIN_IMAGE_MODES:
        raise SlideError(f"{who}: expected 8-bit colours or greys, got mode {mode!r}. Convert it to 8-bit RGB.")
    return openslide.ImageSlide(str(path))


def _with_tiles_that_fit(handle: openslide.OpenSlide, who: str) -> openslide.OpenSlide:
    pixels = largest_tile(handle.properties)
    if pixels > TILE_PIXELS:
        handle.close()
        raise SlideError(
            f"{who}: expected tiles of at most {TILE_PIXELS // 2**20} megapixels in the file, got {pixels:.3g} pixels. "
            "Its header is damaged: copy it again."
        )
    return handle
