"""`verify`: a released pair against what is recorded and published of it.

Every file is compared with what is recorded of it; every number with one that the published package or the authors
made. What fails says what is wrong.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
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
from gigapath.verify.demo_tile import HAS_DEMO, check_demo_tile
from gigapath.verify.options import VerifyOptions
from gigapath.verify.panda import check_panda, find_pairs
from gigapath.verify.report import FAILED, PASSED, SKIPPED, Check, as_json, as_table, verdict
from gigapath.verify.slide_reference import Reference, check_slide_encoder, read_reference
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
        ValueError: a named file is none of its kind, or a reference of another architecture.
    """
    release, device = RELEASES[options.tile_encoder], resolve_device(options.device)
    # What was named must be there before anything takes minutes.
    if Path(options.out).is_dir():
        raise ValueError(f"--out: expected a file, got a folder: {options.out!r}.")
    reference = None if options.reference is None else read_reference(Path(options.reference), release.slide_arch)
    pairs = find_pairs(Path(options.panda[0]), Path(options.panda[1]), options.panda_slides) if options.panda else []
    checks: list[Check] = []
    for check in _run_checks(release, device, options, reference, pairs):
        checks.append(check)
        said(check)

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


def _run_checks(
    release: Release,
    device: torch.device,
    options: VerifyOptions,
    reference: Reference | None,
    pairs: Sequence[tuple[Path, Path]],
) -> Iterator[Check]:
    """All checks, one after the other. What can't be loaded fails, and the others go on."""
    tile_path, slide_path = _find_both(release, options.weights)
    yield _check_hash(TILE_FILE, tile_path, release.tile_sha256)
    yield _check_hash(SLIDE_FILE, slide_path, release.slide_sha256)

    encoder = None
    if tile_path is not None and (release.name == HAS_DEMO or pairs):  # only these ask for the tile encoder
        try:
            encoder = load_tile_encoder(str(tile_path), device=device, precision="fp32")
        except (ValueError, OSError) as error:
            yield Check("tile encoder", FAILED, " ".join(str(error).split()))
    yield from check_demo_tile(release.name, encoder, Path(options.demo_tile))
    if reference is None:
        how = "make it with scripts/make_reference.py where the published package runs, and name it with --reference."
        yield Check("slide encoder", SKIPPED, f"no reference.npz: {how}")
    elif slide_path is None:
        yield Check("slide encoder", SKIPPED, f"no {SLIDE_FILE}.")
    else:
        try:
            model = create_model(str(slide_path), release.slide_arch, release.tile_dim, global_pool=True)
        except (ValueError, OSError) as error:
            yield Check("slide encoder", FAILED, " ".join(str(error).split()))
        else:
            yield from check_slide_encoder(model.to(device).eval(), reference)
    if not pairs:
        yield Check("PANDA", SKIPPED, "no official files: name their folder and that of the slides with --panda.")
    elif encoder is None:
        yield Check("PANDA", SKIPPED, "no tile encoder.")
    else:
        yield from check_panda(pairs, encoder, release.name, options.panda_tiles)


def _find_both(release: Release, folder: str | None) -> list[Path | None]:
    """The release's tile and slide encoder: from the folder, None for one that it lacks, or from the hub's cache;
    another file than the recorded is taken too, and told by its hash."""
    names = (TILE_FILE, SLIDE_FILE)
    if folder is not None:
        held = [path if path.is_file() else None for path in (Path(folder).expanduser() / name for name in names)]
        if not any(held):
            raise FileNotFoundError(f"--weights: expected a folder with {TILE_FILE} and {SLIDE_FILE}, got {folder!r}.")
        return held
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return [find_weights(f"hf_hub:{release.repo}", name) for name in names]


def _check_hash(name: str, path: Path | None, recorded: str) -> Check:
    if path is None:
        return Check(f"file {name}", SKIPPED, "not in the folder of --weights.")
    found = remembered_sha256(path)
    facts = {"recorded": recorded, "found": found}
    if found == recorded:
        return Check(f"file {name}", PASSED, f"sha256 {found}, as recorded.", facts)
    said = f"expected sha256 {recorded}, got {found}: it is damaged, altered or not the release. Fetch it again."
    return Check(f"file {name}", FAILED, said, facts)
