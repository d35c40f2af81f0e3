"""DICOM whole slides, OME-TIFF and Philips TIFF, from the file to the tiles of a run: their scale, the right pixels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
import tifffile
from made_slides import paint_tissue
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, JPEGBaseline8Bit, generate_uid

from gigapath.cli.main import main
from gigapath.features import read_tiles
from gigapath.preprocessing.reading import read_tile
from gigapath.preprocessing.slide import open_slide
from gigapath.tables import read_table

UInt8Array = npt.NDArray[np.uint8]

PICTURE = paint_tissue(1300, 900)
MPP = 0.25
STEPS = (1, 2, 4)
BLOCK = 256


def reduced(step: int) -> UInt8Array:
    size = PICTURE.shape[1] // step, PICTURE.shape[0] // step
    return np.asarray(cv2.resize(PICTURE, size, interpolation=cv2.INTER_AREA), np.uint8)


def blocks(image: UInt8Array) -> UInt8Array:
    """The image filled up with white to whole blocks."""
    height, width = image.shape[:2]
    return np.pad(image, ((0, -height % BLOCK), (0, -width % BLOCK), (0, 0)), constant_values=255)


def write_instance(
    path: Path, image: UInt8Array, mpp: float, series: str, kind: tuple[str, ...], *, jpeg: bool
) -> None:
    """One instance of a VL Whole Slide Microscopy series (DICOM PS3.3, A.32.8), tiled in full."""
    height, width = image.shape[:2]
    filled = blocks(image)
    frames = [
        np.ascontiguousarray(filled[y : y + BLOCK, x : x + BLOCK])
        for y in range(0, height, BLOCK)
        for x in range(0, width, BLOCK)
    ]
    instance = Dataset()
    instance.file_meta = FileMetaDataset()
    instance.file_meta.TransferSyntaxUID = JPEGBaseline8Bit if jpeg else ExplicitVRLittleEndian
    instance.SOPClassUID, instance.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.77.1.6", generate_uid()
    instance.Modality, instance.SeriesInstanceUID, instance.ImageType = "SM", series, list(kind)
    instance.Rows = instance.Columns = BLOCK
    instance.NumberOfFrames = len(frames)
    instance.TotalPixelMatrixRows, instance.TotalPixelMatrixColumns = height, width
    instance.DimensionOrganizationType, instance.TotalPixelMatrixFocalPlanes = "TILED_FULL", 1
    instance.NumberOfOpticalPaths = 1
    instance.SamplesPerPixel, instance.PlanarConfiguration, instance.PixelRepresentation = 3, 0, 0
    instance.PhotometricInterpretation = "YBR_FULL_422" if jpeg else "RGB"
    instance.BitsAllocated = instance.BitsStored = 8
    instance.HighBit = 7
    measures, groups = Dataset(), Dataset()
    measures.PixelSpacing = [mpp / 1000, mpp / 1000]
    groups.PixelMeasuresSequence = [measures]
    instance.SharedFunctionalGroupsSequence = [groups]
    if jpeg:
        coded = [cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1] for frame in frames]
        instance.PixelData = encapsulate([bytes(code) for code in coded])
    else:
        instance.PixelData = b"".join(frame.tobytes() for frame in frames)
    instance["PixelData"].VR = "OB"
    instance.save_as(path, enforce_file_format=True)


def write_dicom(folder: Path, *, jpeg: bool = False, steps: tuple[int, ...] = STEPS) -> Path:
    """A folder that is a slide: an instance a level, and the label."""
    (folder / "slide").mkdir(parents=True)
    series = generate_uid()
    for step in steps:
        kind = ("ORIGINAL" if step == 1 else "DERIVED", "PRIMARY", "VOLUME", "NONE" if step == 1 else "RESAMPLED")
        write_instance(folder / "slide" / f"{step}.dcm", reduced(step), MPP * step, series, kind, jpeg=jpeg)
    label = np.full((300, 300, 3), (255, 0, 255), np.uint8)
    write_instance(
        folder / "slide" / "label.dcm", label, 50, series, ("ORIGINAL", "PRIMARY", "LABEL", "NONE"), jpeg=False
    )
    return folder / "slide"


def write_ome(folder: Path, *, unit: str = "µm", size: float = MPP, **how: Any) -> Path:
    """An OME-TIFF as Bio-Formats and QuPath write it: the levels in SubIFDs, then the picture of the whole glass."""
    path = folder / "slide.ome.tif"
    layout: dict[str, Any] = {"tile": (BLOCK, BLOCK), "photometric": "rgb", "compression": "deflate"}
    with tifffile.TiffWriter(path, ome=True, **how) as file:
        scale = {f"PhysicalSize{axis}{part}": value for axis in "XY" for part, value in (("", size), ("Unit", unit))}
        file.write(PICTURE, subifds=2, metadata={"axes": "YXS", **scale}, **layout)
        for step in STEPS[1:]:
            file.write(reduced(step), subfiletype=1, **layout)
        file.write(np.full((300, 500, 3), 90, np.uint8), metadata={"axes": "YXS", "PhysicalSizeX": 40.0}, **layout)
    return path


def write_philips(folder: Path) -> Path:
    """A TIFF as Philips' scanners export it: pages filled up to whole blocks, their scale in XML."""

    def attribute(name: str, value: str) -> str:
        return f'<Attribute Name="{name}" Group="0x0028" Element="0x0030" PMSVR="IString">{value}</Attribute>'

    def spacing(step: int) -> str:
        return attribute("DICOM_PIXEL_SPACING", f"&quot;{MPP * step / 1000}&quot; &quot;{MPP * step / 1000}&quot;")

    levels = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation">{spacing(step)}'
        f"{attribute('PIIM_PIXEL_DATA_REPRESENTATION_NUMBER', str(index))}</DataObject>"
        for index, step in enumerate(STEPS)
    )
    image = (
        f'<DataObject ObjectType="DPScannedImage">{attribute("PIM_DP_IMAGE_TYPE", "WSI")}{spacing(1)}'
        f"{attribute('PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE', f'<Array>{levels}</Array>')}</DataObject>"
    )
    text = (
        f'<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">{spacing(1)}'
        f"{attribute('PIM_DP_SCANNED_IMAGES', f'<Array>{image}</Array>')}</DataObject>"
    )
    with tifffile.TiffWriter(folder / "slide.tiff") as file:
        for index, step in enumerate(STEPS):
            file.write(
                blocks(reduced(step)),
                tile=(BLOCK, BLOCK),
                photometric="rgb",
                compression="deflate",
                subfiletype=int(index > 0),
                description=text if index == 0 else None,
                software="Philips DP v1.0" if index == 0 else False,
                metadata=None,
            )
    return folder / "slide.tiff"


def tiled(path: Path, out: Path, *options: str) -> dict[str, str]:
    """The row of slides.csv of the one slide."""
    given = ["--tile-size", "64", "--workers", "0", *options]
    assert main(["tile", str(path), "--out", str(out), *given]) == 0
    table = read_table(out / "slides.csv")
    return {name: values[0] for name, values in table.columns.items()}


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.7])
@pytest.mark.parametrize(
    ("write", "levels", "vendor"),
    [
        (write_dicom, 3, "dicom"),
        (lambda folder: write_dicom(folder, jpeg=True), 3, "dicom"),
        (write_ome, 1, "generic-tiff"),
        (lambda folder: write_ome(folder, unit="nm", size=MPP * 1000, bigtiff=True), 1, "generic-tiff"),
        (write_philips, 3, "philips"),
    ],
    ids=["dicom", "dicom-jpeg", "ome", "ome-nm-bigtiff", "philips"],
)
def test_a_slide_gives_its_scale_and_its_own_pixels(
    tmp_path: Path, write: Callable[[Path], Path], levels: int, vendor: str, mpp: float
) -> None:
    path = write(tmp_path)
    row = tiled(path, tmp_path / "out", "--mpp", str(mpp))
    assert row["status"] == "done" and row["vendor"] == vendor
    assert float(row["mpp_x"]) == float(row["mpp_y"]) == pytest.approx(MPP)
    assert not row["warnings"]
    tiles = read_tiles(tmp_path / "out" / "tiles" / f"{row['slide_id']}.h5")
    assert len(tiles) > 3
    step = tiles.tile_size_level0[0]
    assert step == pytest.approx(64 * mpp / MPP, abs=1)
    with open_slide(path / "1.dcm" if path.is_dir() else path) as slide:
        assert len(slide.level_dimensions) == levels
        for index, (x, y) in enumerate(tiles.coords_level0.tolist()):
            wanted = cv2.resize(PICTURE[y : y + step, x : x + step], (64, 64), interpolation=cv2.INTER_AREA)
            assert np.abs(read_tile(slide, tiles, index).astype(int) - wanted).mean() < 4


def test_a_dicom_slide_of_one_level_and_one_named_by_any_of_its_files(tmp_path: Path) -> None:
    path = write_dicom(tmp_path, steps=(1,))
    assert tiled(path, tmp_path / "one")["status"] == "done"
    several = write_dicom(tmp_path / "b")
    found = {tiled(several / name, tmp_path / name)["tiles"] for name in ("1.dcm", "4.dcm", "label.dcm")}
    assert len(found) == 1


def test_what_names_a_patient_in_a_dicom_slide_is_found_nowhere(tmp_path: Path) -> None:
    path = write_dicom(tmp_path)
    for file in path.iterdir():
        instance = pydicom.dcmread(file)
        instance.PatientName = instance.PatientID = instance.ContainerIdentifier = "CANARY"
        instance.save_as(file)
    tiled(path, tmp_path / "out")
    written = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert written and not [file for file in written if b"CANARY" in file.read_bytes()]
