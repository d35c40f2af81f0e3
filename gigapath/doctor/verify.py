"""`verify`: a released pair against what is recorded and published of it.

Every file is compared with what is recorded of it; every number with one that the published package or the authors
made. What fails says what is wrong.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import gigapath
from gigapath.devices import resolve_device
from gigapath.doctor.options import VerifyOptions
from gigapath.doctor.verify_slide_encoder import Reference, check_slide_encoder, read_reference
from gigapath.doctor.verify_tile_encoder import HAS_DEMO, check_demo_tile, check_panda, find_pairs
from gigapath.files import remembered_sha256, write_json_atomic
from gigapath.findings import OK, SKIPPED, WRONG, Finding
from gigapath.options import to_dict
from gigapath.releases import RELEASES, SLIDE_FILE, TILE_FILE, Release
from gigapath.slide_encoder import create_model
from gigapath.tile_encoder import load_tile_encoder
from gigapath.weights import find_weights

# A finding's state as the report and the table have it.
STATUS = {OK: "passed", WRONG: "failed", SKIPPED: "skipped"}


def verify(options: VerifyOptions, *, after_check: Callable[[Finding], None] = lambda check: None) -> dict[str, Any]:
    """Check a released pair, write the report.

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
    checks: list[Finding] = []
    for check in _run_checks(release, device, options, reference, pairs):
        checks.append(check)
        after_check(check)

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    title = f"gigapath verify {release.name}, {datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}, {where}"
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
        "checks": [
            {"what": each.name, "status": STATUS[each.state], "said": each.text, "facts": each.facts or {}}
            for each in checks
        ],
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
) -> Iterator[Finding]:
    """All checks, one after the other. What can't be loaded fails, and the others go on."""
    tile_path, slide_path = _find_both(release, options.weights)
    yield _check_hash(TILE_FILE, tile_path, release.tile_sha256)
    yield _check_hash(SLIDE_FILE, slide_path, release.slide_sha256)

    encoder = None
    if tile_path is not None and (release.name == HAS_DEMO or pairs):  # only these ask for the tile encoder
        try:
            encoder = load_tile_encoder(str(tile_path), device=device, precision="fp32")
        except (ValueError, OSError) as error:
            yield Finding("tile encoder", " ".join(str(error).split()))
    yield from check_demo_tile(release.name, encoder, Path(options.demo_tile))
    if reference is None:
        how = "make it with scripts/make_reference.py where the published package runs, and name it with --reference."
        yield Finding("slide encoder", f"no reference.npz: {how}", state=SKIPPED)
    elif slide_path is None:
        yield Finding("slide encoder", f"no {SLIDE_FILE}.", state=SKIPPED)
    else:
        try:
            model = create_model(str(slide_path), release.slide_arch, release.tile_dim, global_pool=True)
        except (ValueError, OSError) as error:
            yield Finding("slide encoder", " ".join(str(error).split()))
        else:
            yield from check_slide_encoder(model.to(device).eval(), reference)
    if not pairs:
        yield Finding(
            "PANDA", "no official files: name their folder and that of the slides with --panda.", state=SKIPPED
        )
    elif encoder is None:
        yield Finding("PANDA", "no tile encoder.", state=SKIPPED)
    else:
        yield from check_panda(pairs, encoder, release.name, options.panda_tiles)


def _find_both(release: Release, folder: str | None) -> list[Path | None]:
    """The release's tile and slide encoder: from the folder, None for one that it lacks, or from the hub's cache;
    another file than the recorded is taken too; its hash shows it."""
    names = (TILE_FILE, SLIDE_FILE)
    if folder is not None:
        held = [path if path.is_file() else None for path in (Path(folder).expanduser() / name for name in names)]
        if not any(held):
            raise FileNotFoundError(f"--weights: expected a folder with {TILE_FILE} and {SLIDE_FILE}, got {folder!r}.")
        return held
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return [find_weights(f"hf_hub:{release.repo}", name) for name in names]


def _check_hash(name: str, path: Path | None, recorded: str) -> Finding:
    if path is None:
        return Finding(f"file {name}", "not in the folder of --weights.", state=SKIPPED)
    found = remembered_sha256(path)
    facts = {"recorded": recorded, "found": found}
    if found == recorded:
        return Finding(f"file {name}", f"sha256 {found}, as recorded.", state=OK, facts=facts)
    text = f"expected sha256 {recorded}, got {found}: it is damaged, altered or not the release. Fetch it again."
    return Finding(f"file {name}", text, facts=facts)


def verdict(checks: Sequence[Finding]) -> str:
    """ "failed" where any check did; "passed" where any did and none failed; else "skipped"."""
    states = {check.state for check in checks}
    return STATUS[next((state for state in (WRONG, OK) if state in states), SKIPPED)]


def as_table(title: str, checks: Sequence[Finding]) -> str:
    """A Markdown table, fit for pasting: no paths, no names of people or machines."""
    lines = [f"**{title}: {verdict(checks)}**", "", "| check | result | |", "|---|---|---|"]
    lines += [f"| {check.name} | {STATUS[check.state]} | {check.text.replace('|', '/')} |" for check in checks]
    return "\n".join(lines)
