"""`verify`: a released pair against what is recorded and published of it: every file against its digest, every number
against one that the published package or the authors made. What fails says what is wrong.

The slide encoder is compared with `reference.npz`, which `scripts/make_reference.py` makes with the published package.
Where numbers differ, the slips that are seen in practice are tried one by one: the one that explains the difference, on
whichever side it happened, becomes the sentence. Shapes: L tiles, C width of a tile embedding, S states, E width.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

import gigapath
from gigapath.devices import resolve_device
from gigapath.doctor.options import VerifyOptions
from gigapath.doctor.verify_tile_encoder import HAS_DEMO, check_demo_tile, check_panda, find_pairs
from gigapath.embedding.slide_encoding import pooled_states
from gigapath.files import remembered_sha256, write_json_atomic
from gigapath.findings import OK, SKIPPED, WRONG, Finding
from gigapath.options import to_dict
from gigapath.releases import RELEASES, SLIDE_FILE, TILE_FILE, Release
from gigapath.slide_encoder import LongNetViT, create_model
from gigapath.tile_encoder import load_tile_encoder
from gigapath.weights import find_weights

# Largest difference relative to the reference's length, by the precision in which the reference was made.
TOLERANCE = {"fp32": 2e-4, "fp16": 2e-2, "bf16": 8e-2}
# What a slip changes must show over rounding to be named.
_CLEARLY = 0.5
_GRID = 150
_POOLINGS = ("mean", "class")
_NAMED = 3

Array = npt.NDArray[Any]
Answers = Mapping[str, Array]
Embed = Callable[[Array, Array], Answers]


@dataclass(frozen=True)
class Reference:
    """A reference file: `facts` of its making, digest of each weight by name, answers by length."""

    facts: Mapping[str, Any]
    weights: Mapping[str, str]
    answers: Mapping[int, Answers]


def read_reference(path: Path, arch: str) -> Reference:
    """Read `reference.npz`; ValueError where it is none, or none of this architecture."""
    if not path.is_file():
        raise FileNotFoundError(f"--reference: no such file: {path}. Make it with scripts/make_reference.py.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            facts, weights = json.loads(str(archive["facts"])), json.loads(str(archive["weights"]))
            if not facts["cases"]:
                raise ValueError("nothing to compare with")
            answers: dict[int, dict[str, Array]] = {case["length"]: {} for case in facts["cases"]}
            for name in archive.files:
                length, _, kind = name.partition("/")
                if kind:
                    answers[int(length)][kind] = archive[name]
    except Exception as error:  # zipfile, zlib, json and numpy have a dozen kinds for what is no such file
        raise ValueError(
            f"--reference: expected the file that scripts/make_reference.py writes, got {path.name}, which is none "
            f"({type(error).__name__})."
        ) from error
    if facts.get("arch") != arch:
        raise ValueError(f"--reference: expected one of {arch}, got one of {facts.get('arch')}.")
    return Reference(facts, weights, answers)


def made_inputs(seed: int, length: int, in_chans: int) -> tuple[Array, Array]:
    """The seeded inputs of `scripts/make_reference.py`: (L, C) and (x, y) (L, 2), float32."""
    random = np.random.RandomState(seed)
    x = random.standard_normal((length, in_chans)).astype(np.float32)
    cells = np.sort(random.choice(_GRID * _GRID, length, replace=False))
    return x, np.stack([cells % _GRID, cells // _GRID], axis=1).astype(np.float32) * 256 + 255


def by_forward(model: LongNetViT) -> Embed:
    """The answers by the published call, as other tools make it."""

    def embed(x: Array, coords: Array) -> Answers:
        device = model.cls_token.device
        given = torch.from_numpy(x)[None].to(device), torch.from_numpy(coords)[None].to(device)
        found, before = {}, model.global_pool
        try:
            for pooling in _POOLINGS:
                model.global_pool = pooling == "mean"
                found[f"states_{pooling}"] = torch.cat(model(*given, all_layer_embed=True)).float().cpu().numpy()
                found[f"default_{pooling}"] = model(*given)[0].float().cpu().numpy()
        finally:
            model.global_pool = before
        return found

    return embed


def by_runs(model: LongNetViT) -> Embed:
    """The answers as `gigapath embed` and `slide-embed` compute them, in one pass."""

    def embed(x: Array, coords: Array) -> Answers:
        device = model.cls_token.device
        states, default = pooled_states(model, torch.from_numpy(x).to(device), torch.from_numpy(coords).to(device))
        both = {"states": states.float().cpu().numpy(), "default": default[None].float().cpu().numpy()}
        return {f"{kind}_{pooling}": both[kind][:, i] for kind in both for i, pooling in enumerate(_POOLINGS)}

    return embed


def check_slide_encoder(model: LongNetViT, reference: Reference) -> Iterator[Finding]:
    """Compare weights, then the answers of both ways through the encoder at each length."""
    weights = check_weights(model, reference)
    yield weights
    ways = {"slide encoder, forward": by_forward(model), "slide encoder, as embed runs it": by_runs(model)}
    for what, embed in ways.items():
        with torch.inference_mode():
            yield _check_answers(what, embed, reference, weights.wrong)


def check_weights(model: LongNetViT, reference: Reference) -> Finding:
    """Whether each loaded weight is the one that the reference was made with, by its digest."""
    ours = {
        name: hashlib.sha256(value.float().cpu().contiguous().numpy().tobytes()).hexdigest()
        for name, value in model.state_dict().items()
    }
    names = sorted(set(ours) | set(reference.weights))
    differing = [name for name in names if ours.get(name) != reference.weights.get(name)]
    if not differing:
        return Finding(
            "slide encoder's weights, one by one", f"all {len(ours)} equal those of the reference.", state=OK
        )
    more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    text = (
        f"{', '.join(differing[:_NAMED])}{more} of {len(ours)} differ from the reference's: altered or not the release."
    )
    return Finding("slide encoder's weights, one by one", text, facts={"differing": differing})


def _check_answers(what: str, embed: Embed, reference: Reference, other_weights: bool) -> Finding:
    tolerance = TOLERANCE[reference.facts["precision"]]
    facts: dict[str, Any] = {}
    worst = 0.0
    for case in reference.facts["cases"]:
        x, coords = made_inputs(case["seed"], case["length"], reference.facts["in_chans"])
        if hashlib.sha256(x.tobytes() + coords.tobytes()).hexdigest() != case["inputs_sha256"]:
            text = "the reference's inputs differ from those that its seeds give here: make it anew."
            return Finding(what, text)
        theirs, ours = reference.answers[case["length"]], embed(x, coords)
        for side, answers in (("our answers", ours), ("the reference", theirs)):
            if not all(np.isfinite(held).all() for held in answers.values()):
                return Finding(what, f"{case['length']} tiles: numbers in {side} are NaN or infinite.", facts=facts)
        apart = _apart(ours, theirs)
        facts[f"{case['length']} tiles"] = apart
        worst = max(worst, apart)
        # A slip may lie within a loose tolerance: at lengths at which slips show, none may be nearer.
        slip = (
            _explain(embed, x, coords, ours, theirs)
            if apart > tolerance or case["length"] in _tried(reference)
            else None
        )
        if slip:
            return Finding(what, f"{case['length']} tiles, {apart:.1e} apart: {slip}.", facts=facts)
        if apart > tolerance:
            why = "the altered weights explain it" if other_weights else "no known slip explains it"
            text = (
                f"{case['length']} tiles: {apart:.1e} apart from the reference, expected {tolerance:g} or less; {why}."
            )
            return Finding(what, text, facts=facts)
    lengths = ", ".join(str(case["length"]) for case in reference.facts["cases"])
    text = f"largest relative difference {worst:.1e} at {lengths} tiles, all states, both poolings"
    # Who compares this package with itself must see it.
    maker = reference.facts.get("implementation", "an unnamed package")
    made = "of the published package" if maker == "published" else f"of {maker}, NOT of the published package"
    return Finding(what, f"{text} (reference {made}, {reference.facts['precision']}).", state=OK, facts=facts)


def _tried(reference: Reference) -> set[int]:
    """The shortest length of 100 tiles or more, at which order and places matter and a try costs little."""
    return {min((case["length"] for case in reference.facts["cases"] if case["length"] >= 100), default=0)}


def _apart(ours: Answers, theirs: Answers) -> float:
    """Largest relative difference over all states and poolings."""
    return max(distance(a, b) for name in theirs for a, b in zip(ours[name], theirs[name], strict=True))


def _explain(embed: Embed, x: Array, coords: Array, ours: Answers, theirs: Answers) -> str | None:
    """The slip that explains a difference, as words; None where none does."""
    apart = _apart(ours, theirs)
    columns = np.lexsort((coords[:, 1], coords[:, 0]))
    slips: dict[str, tuple[Array, Array]] = {
        "x and y are swapped": (x, np.ascontiguousarray(coords[:, ::-1])),
        "the tiles are in column order, expected row by row": (x[columns], coords[columns]),
        "coordinates are rounded to half precision": (x, coords.astype(np.float16).astype(np.float32)),
    }
    changed = {name: given for name, given in slips.items() if not all(map(np.array_equal, given, (x, coords)))}
    answers = {name: embed(*given) for name, given in changed.items() if np.isfinite(given[1]).all()}
    nearer = {name: _apart(found, theirs) for name, found in answers.items()}
    best = min(nearer, key=lambda name: nearer[name], default=None)
    if best is not None and nearer[best] < _CLEARLY * apart:
        return best
    inner = _pooling_slip(ours, theirs, apart) or _state_slip(ours, theirs)
    if inner:
        return inner
    # A slip inside the encoder: it can't tell the right input from the wrong one.
    for name, found in answers.items():
        if _apart(found, ours) < 0.01 * min(apart, 1e-2):
            return f"{name} (the encoder can't tell them apart)"
    return None


def _pooling_slip(ours: Answers, theirs: Answers, apart: float) -> str | None:
    for wanted, taken, words in (
        ("mean", "class", "the class token is taken for the mean over the tiles"),
        ("class", "mean", "the mean over the tiles is taken for the class token"),
    ):
        for kind in ("states", "default"):
            right, wrong = theirs[f"{kind}_{wanted}"], theirs[f"{kind}_{taken}"]
            held, other = ours[f"{kind}_{wanted}"], ours[f"{kind}_{taken}"]
            scale = _CLEARLY * distance(held, right)
            if distance(held, right) >= _CLEARLY * apart > 0 and (
                distance(held, wrong) < scale or distance(other, right) < scale
            ):
                return words
    return None


def _state_slip(ours: Answers, theirs: Answers) -> str | None:
    """Whether some state, on either side, is nearer to another state of the other side than to its own."""
    for pooling in _POOLINGS:
        held, right = ours[f"states_{pooling}"], theirs[f"states_{pooling}"]
        for state in reversed(range(len(right))):
            own = distance(held[state], right[state])
            of_ours, of_theirs = [
                [distance(one[state], two) for two in other] for one, other in ((held, right), (right, held))
            ]
            for off, mine, others in ((of_ours, "ours", "the reference"), (of_theirs, "the reference", "ours")):
                nearest = int(np.argmin(off))
                if nearest != state and off[nearest] < _CLEARLY * own:
                    return f"state {state} of {mine} is state {nearest} of {others}"
    return None


def distance(a: Array, b: Array) -> float:
    """Length of the difference of two arrays relative to the second's."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


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
