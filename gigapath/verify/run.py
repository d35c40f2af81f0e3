"""`verify`: a released pair against what is recorded and published of it.

Every file is compared with what is recorded of it; every number with one that the published package or the authors
made. What fails says what is wrong.
"""

import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import gigapath
from gigapath.devices import resolve_device
from gigapath.downloads import RELEASES, Release
from gigapath.downloads.digests import remembered_sha256
from gigapath.downloads.table import SLIDE_FILE, TILE_FILE
from gigapath.files import write_json_atomic
from gigapath.options import to_dict
from gigapath.slide_encoder import create_model
from gigapath.tile_encoder import load_tile_encoder
from gigapath.verify.demo_tile import check_demo_tile
from gigapath.verify.options import VerifyOptions
from gigapath.verify.panda import check_panda
from gigapath.verify.report import FAILED, PASSED, SKIPPED, Check, as_json, as_table, verdict
from gigapath.verify.slide_reference import check_slide_encoder, read_reference
from gigapath.weights import find_weights

__all__ = ["Check", "VerifyOptions", "verify"]


def verify(options: VerifyOptions, *, said: Callable[[Check], None] = lambda check: None) -> dict[str, Any]:
    """Check a released pair, write the report.

    Args:
        options: which release, against what.
        said: gets each check as it is done.

    Returns:
        what `verify.json` holds: `verdict`, `checks`, `table`, versions and device.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: the weights or a named file are not to be had.
        ValueError: a named file is none of its kind, or a checkpoint of another architecture.
    """
    release, device = RELEASES[options.tile_encoder], resolve_device(options.device)
    reference = None if options.reference is None else read_reference(Path(options.reference))
    checks: list[Check] = []

    def note(check: Check) -> None:
        checks.append(check)
        said(check)

    tile_path, slide_path = (_find(release, name, options.weights) for name in (TILE_FILE, SLIDE_FILE))
    note(_check_hash(tile_path, release.tile_sha256))
    note(_check_hash(slide_path, release.slide_sha256))

    if release.name == "gigapath" or options.panda:  # only these ask for the tile encoder
        encoder = load_tile_encoder(str(tile_path), device=device, precision="fp32")
        for check in check_demo_tile(release.name, encoder, Path(options.demo_tile)):
            note(check)
    else:
        note(Check("demo tile", SKIPPED, f"no vector was released for {release.name}."))
    if reference is None:
        how = "make it with scripts/make_reference.py where the published package runs, and name it with --reference."
        note(Check("slide encoder", SKIPPED, f"no reference.npz: {how}"))
    else:
        model = create_model(str(slide_path), release.slide_arch, release.tile_dim, global_pool=True)
        for check in check_slide_encoder(release.slide_arch, model.to(device).eval(), reference):
            note(check)
    if options.panda:
        folders = Path(options.panda[0]), Path(options.panda[1])
        most = options.panda_slides, options.panda_tiles
        for check in check_panda(*folders, encoder, release.name, slides=most[0], tiles=most[1]):
            note(check)
    else:
        note(Check("PANDA", SKIPPED, "no official files: name their folder and that of the slides with --panda."))

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    title = f"gigapath verify {release.name}, {datetime.now(timezone.utc):%Y-%m-%d}, torch {torch.__version__}, {where}"
    report = {
        "verdict": verdict(checks),
        "release": release.name,
        "repository": release.repo,
        "revision": release.revision,
        "implementation": gigapath.__implementation__,
        "package_version": gigapath.__version__,
        "torch": torch.__version__,
        "device": where,
        "options": {
            name: value
            for name, value in to_dict(options).items()
            if name in ("tile_encoder", "panda_slides", "device")
        },
        "checks": as_json(checks),
        "table": as_table(title, checks),
    }
    write_json_atomic(Path(options.out), report)
    return report


def _find(release: Release, name: str, folder: str | None) -> Path:
    """A file of the release: in the folder, or in the hub's cache; another one than the recorded is taken too, and told
    by its hash."""
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise FileNotFoundError(f"--weights: expected a folder with {TILE_FILE} and {SLIDE_FILE}, got {folder!r}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return find_weights(folder or f"hf_hub:{release.repo}", name)


def _check_hash(path: Path, recorded: str) -> Check:
    found = remembered_sha256(path)
    facts = {"recorded": recorded, "found": found}
    if found == recorded:
        return Check(f"file {path.name}", PASSED, f"sha256 {found}, as recorded.", facts)
    said = f"expected sha256 {recorded}, got {found}: it is damaged, altered or not the release. Fetch it again."
    return Check(f"file {path.name}", FAILED, said, facts)
