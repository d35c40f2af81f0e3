"""Options of `gigapath doctor --verify`; no torch in here, so that a wrong one is refused at once."""

from dataclasses import dataclass

from gigapath.options import DeviceOptions, option
from gigapath.releases import RELEASES


@dataclass(frozen=True)
class VerifyOptions(DeviceOptions):
    """Which release is verified, against what."""

    tile_encoder: str = option("gigapath", "the released pair", choices=tuple(RELEASES))
    weights: str | None = option(
        None, "folder with pytorch_model.bin and slide_encoder.pth (default: the model hub's cache)", metavar="DIR"
    )
    demo_tile: str = option(
        "data", "where `gigapath download demo-tile` put images/prov_normal_000_1.png and .pt", metavar="DIR"
    )
    reference: str | None = option(
        None, "reference.npz, made by scripts/make_reference.py with the published package", metavar="FILE"
    )
    panda: tuple[str, ...] = option((), "two folders: the official PANDA h5 files, the PANDA slides", metavar="DIR")
    panda_slides: int = option(5, "most slides of PANDA", at_least=1)
    panda_tiles: int = option(16, "tiles of each slide that are embedded again", at_least=1)
    out: str = option("verify.json", "where the report goes", metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.panda) not in (0, 2):
            raise ValueError(f"--panda: expected two folders, H5_DIR and SLIDE_DIR, got {len(self.panda)}.")
