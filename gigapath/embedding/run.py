"""`run_embed`: slides to tiles to tile embeddings to slide embeddings, each stage kept and reused by itself."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gigapath.cohort.manifest import SlideEntry, largest_first
from gigapath.cohort.run import CohortRun, RunResult
from gigapath.cohort.stage import StageOptions, differences
from gigapath.devices import at_most_threads, device_identity, resolve_devices
from gigapath.embedding.features_stage import EmbedJob, FeatureStage
from gigapath.embedding.forward import DeviceProbe, fitting_batch_size, probe_devices
from gigapath.embedding.options import EmbedOptions, RunOptions
from gigapath.embedding.slide_encoding import SlideEncoder, encoder_facts, load_slide_encoder
from gigapath.embedding.slide_stage import SlideStage, slides_folder
from gigapath.embedding.slides import chosen, cohort_to_embed, estimate_tiles, share_in_words
from gigapath.embedding.tiling import GivenTiles, TileStage, write_contact_sheet
from gigapath.machine import available_cores
from gigapath.options import to_dict
from gigapath.preprocessing.tiling import TileOptions
from gigapath.progress import Plan, Progress, StopFlag
from gigapath.releases import RELEASES
from gigapath.slide_encoder import WEIGHTS_FILE
from gigapath.text import in_bytes, in_words, slides_in_words, tiles_in_words
from gigapath.tile_encoder import TileEncoder, load_tile_encoder

# Tiles per batch where nobody says: on a CPU a batch takes seconds, so that a stop is heard in time.
_BATCH_ON_GPU = 128
_BATCH_ON_CPU = 32
_BATCH_ON_CPU_LARGE = 2
_LARGE = 500_000_000  # parameters; the ViT-g has 1.1 billion
_PATIENCE_SECONDS = 3600.0
_ALTERNATIVES = (
    "this is long for a CPU. A GPU is about a hundred times faster (--device cuda); --tile-encoder gigapath-flash "
    "needs a fiftieth of gigapath's work; --max-tiles N embeds fewer tiles; --tile-encoder standin is for testing."
)


def run_embed(
    slides: Sequence[str | Path],
    out: str | Path,
    *,
    tiling: TileOptions | None = None,
    embedding: EmbedOptions | None = None,
    options: RunOptions | None = None,
    watch: Progress | None = None,
    command: Sequence[str] = (),
) -> RunResult:
    """Embed slides: tiles where they are missing, `features_*/<id>.h5`, `slides_*/<id>.h5`, slides.csv. Arguments as
    `run_tile`; `slides` may be empty where `embedding.tiles` names a folder whose run recorded where its slides lie.

    Raises:
        ValueError: no slides, ids that collide, unknown encoders, encoders that are no pair, mixed numerics, tiles that
            were made with other options, an encoder that fails.
        FileNotFoundError, PermissionError, ConnectionError: an input or the weights are not to be had.
        OutputError: the output folder can't be written, or is full.
    """
    out, tiling = Path(out), tiling or TileOptions()
    embedding, options, watch = embedding or EmbedOptions(), options or RunOptions(), watch or Progress()
    cohort = cohort_to_embed(slides, out, embedding.tiles, tiling, options)
    return embed_cohort(cohort, out, tiling, embedding, options, watch, command)


def embed_cohort(
    cohort: Sequence[SlideEntry],
    out: Path,
    tiling: TileOptions,
    embedding: EmbedOptions,
    options: RunOptions,
    watch: Progress,
    command: Sequence[str] = (),
) -> RunResult:
    """`run_embed` for slides that are found already (`cohort_to_embed`)."""
    with StopFlag(watch.stopping) as stop, at_most_threads(available_cores()):
        resolved = {**to_dict(tiling), **to_dict(embedding), **to_dict(options)}
        run = CohortRun(
            out=out,
            verb="embed",
            entries=cohort,
            stages=[],
            options=resolved,
            command=command,
            watch=watch,
            stop=stop,
            cohort=sorted({entry.slide_id for entry in cohort}),
            max_failures=options.max_failures,
            dry_run=options.dry_run,
        )
        if options.over_ray:
            result = _over_ray(run, tiling, embedding, options)
        else:
            job, todo = _prepare(run, tiling, embedding, options)
            with job:
                job.announce(todo)
                result = run.over_slides(todo, run.in_process(job.work), lambda: _plan(job, todo))
        if not embedding.tiles and not options.dry_run:
            write_contact_sheet(out)
    return result


def _prepare(
    run: CohortRun, tiling: TileOptions, embedding: EmbedOptions, options: RunOptions
) -> tuple[EmbedJob, list[SlideEntry]]:
    """The job over the slides of `run`, of which the options choose, and what is left to do."""
    job = _job(run, tiling, embedding, options)
    run.entries = chosen(run.entries, run.out, "embed", run.stages, options, tiles=job.features.tiles.folder)
    run.made_with = job.made_with(run.entries, frozenset(run.cohort))
    return job, [entry for entry in run.entries if not job.is_done(entry)]


def _over_ray(run: CohortRun, tiling: TileOptions, embedding: EmbedOptions, options: RunOptions) -> RunResult:
    """The run by Ray's workers, each with encoders of its own; the first one says what is to do, since it has them."""
    from gigapath.cohort.ray_tasks import RayTasks  # where it is asked for

    if embedding.devices is not None or embedding.device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            "--engine ray: expected --device auto, cpu or cuda, and no --devices: each worker has a device of its own."
        )
    with RayTasks(run, address=options.ray_address, cores=options.worker_cores, device=embedding.device) as workers:
        make_job = partial(
            _worker_job,
            cohort=tuple(run.entries),
            tiling=tiling,
            embedding=replace(embedding, device=workers.device),
            options=replace(options, workers=options.reading_threads(workers.cores)),
        )
        found: WorkList = workers.start(make_job)
        run.entries, run.stages, run.made_with = found.entries, found.stages, found.made_with
        run.facts.update(found.facts)
        workers.expected.update(found.tiles)
        todo = largest_first(found.todo, found.tiles_folder)
        return run.over_slides(todo, workers.process, lambda: workers.with_line(found.plan))


@dataclass(frozen=True)
class WorkList:
    """What the first of Ray's workers finds that a run has to do: the slides that it is for (`entries`), those of which
    something is left (`todo`), by slide about how many `tiles` are to be embedded and the folder where they are; the
    plan, the stages' folders and what their results are made with, facts for the record, the `numerics` to which all
    workers must come, and their batch size."""

    entries: tuple[SlideEntry, ...]
    todo: tuple[SlideEntry, ...]
    tiles: Mapping[str, int]
    tiles_folder: Path
    plan: Plan
    stages: tuple[Path, ...]
    made_with: tuple[StageOptions, ...]
    facts: Mapping[str, Any]
    numerics: Mapping[str, Any]
    batch_size: int


def _worker_job(
    run: CohortRun,
    found: WorkList | None,
    *,
    cohort: tuple[SlideEntry, ...],
    tiling: TileOptions,
    embedding: EmbedOptions,
    options: RunOptions,
) -> tuple[EmbedJob, WorkList]:
    """The job of one of Ray's workers, and what the first one found; ValueError where it comes to other numbers than
    the first."""
    if found is None:
        run.entries, run.cohort = cohort, sorted({entry.slide_id for entry in cohort})
        job, todo = _prepare(run, tiling, embedding, options)
        plan = _plan(job, todo)
        return job, WorkList(
            entries=tuple(run.entries),
            todo=tuple(todo),
            tiles=dict(job.expected),
            tiles_folder=job.features.tiles.folder,
            plan=plan,
            stages=tuple(run.stages),
            made_with=tuple(run.made_with),
            facts=dict(run.facts),
            numerics=_numerics(job),
            batch_size=job.features.batch_size,
        )
    job = _job(run, tiling, replace(embedding, batch_size=found.batch_size), options)
    changed = differences(found.numerics, _numerics(job))
    if changed:
        raise ValueError(
            f"--engine ray: expected workers with the same settings, got one with others: {'; '.join(changed)}. "
            "Give each kind of machine a run and a folder of its own."
        )
    job.features.probe = probe_devices(job.features.encoders, job.features.batch_size, several=True)
    return job, found


def _numerics(job: EmbedJob) -> dict[str, Any]:
    """What all tile and slide embeddings of the run depend on."""
    slides = {} if job.slides is None else job.slides.run_identity()
    return {**job.features.run_identity(), **{f"slides: {name}": value for name, value in slides.items()}}


def _job(
    run: CohortRun,
    tiling: TileOptions,
    embedding: EmbedOptions,
    options: RunOptions,
) -> EmbedJob:
    """What the options come to: encoders, folders, batch size, threads."""
    encoders = _tile_encoders(embedding)
    encoder, slide_encoder = encoders[0], _slide_encoder(embedding, encoders[0])
    tiles: TileStage | GivenTiles = TileStage(run.out, tiling, options)
    if embedding.tiles:
        given = Path(embedding.tiles)
        tiles = GivenTiles(given / "tiles" if (given / "tiles").is_dir() else given)
        if not tiles.folder.is_dir():
            raise FileNotFoundError(f"--tiles: expected a folder made by gigapath tile, got {embedding.tiles!r}.")
    features = FeatureStage(
        folder=run.out / f"features_{encoder.name}",
        tiles=tiles,
        tiling=tiling,
        options=options,
        encoders=encoders,
        batch_size=embedding.batch_size or fitting_batch_size(encoders, default_batch_size(encoder)),
        workers=options.reading_threads(),
        store=embedding.store,
        run=run,
    )
    slides = None
    if slide_encoder is not None:
        folder = slides_folder(run.out, slide_encoder.name, encoder.name)
        slides = SlideStage(folder=folder, encoder=slide_encoder, features=features, options=options, run=run)
    job = EmbedJob(run, features, slides)
    run.stages = [stage.folder for stage in job.stages]
    if tiles.folder.resolve() == (run.out / "tiles").resolve() and tiles.folder not in run.stages:
        run.stages = [tiles.folder, *run.stages]  # so that slides.csv says what is known of the tiles
    run.facts.update(_facts(job))
    return job


def _facts(job: EmbedJob) -> dict[str, object]:
    """What the run's record says of the encoders."""
    features, encoder = job.features, job.features.encoder
    facts: dict[str, object] = {
        "device": _device_name(features.encoders),
        "workers": features.workers,
        "tile_encoder": {
            **encoder_facts(encoder),
            "transform": encoder.transform_name,
            "precision": encoder.precision,
            "batch_size": features.batch_size,
        },
    }
    if job.slides is not None:
        facts["slide_encoder"] = job.slides.encoder.facts
    return facts


def _device_name(encoders: Sequence[TileEncoder]) -> str:
    name = device_identity(encoders[0].device)
    return name if len(encoders) == 1 else f"{len(encoders)} x {name}"


def default_batch_size(encoder: TileEncoder) -> int:
    """Tiles per batch by device and size of the encoder; the same on all machines of a kind, since it is part of the
    numbers."""
    if encoder.device.type != "cpu":
        return _BATCH_ON_GPU
    large = sum(parameter.numel() for parameter in encoder.model.parameters()) > _LARGE
    return _BATCH_ON_CPU_LARGE if large else _BATCH_ON_CPU


def measure_encoder(name: str, device: str, *, tiles: int, slides: int) -> tuple[float, float]:
    """Tiles/s of a tile encoder on this machine, by a batch or two of the size that a run takes, and the seconds that a
    run over so many tiles of so many slides is going to take."""
    encoder = load_tile_encoder(name, device=device, precision="auto")
    size = fitting_batch_size([encoder], default_batch_size(encoder))
    probe = probe_devices([encoder], size, several=slides > 1)
    return probe.tiles_per_second, _seconds(probe, tiles, slides, size)


def _seconds(probe: DeviceProbe, tiles: int, slides: int, batch_size: int) -> float:
    """What embedding takes: the last batch, or that of each slide, is padded, half of it on average."""
    padded = 1 if probe.across else slides
    return (tiles + padded * (batch_size - 1) / 2) / probe.tiles_per_second


def _plan(job: EmbedJob, todo: Sequence[SlideEntry]) -> Plan:
    """What the run is going to do and what it costs, by a batch or two measured here."""
    entries, features, encoder = job.run.entries, job.features, job.features.encoder
    known = {entry.slide_id: job.known_tiles(entry) for entry in todo}
    counted = [count for count in known.values() if count is not None]
    unknown = [entry for entry in todo if known[entry.slide_id] is None]
    total = estimate_tiles(counted, unknown, features.tiling)
    guess = (total - sum(counted)) // len(unknown) if unknown else 0
    job.expected = {slide_id: guess if count is None else count for slide_id, count in known.items()}
    if total:
        features.probe = probe_devices(features.encoders, features.batch_size, several=len(todo) > 1)
        job.run.facts["batches"] = ", ".join(features.probe.ways)
    skipped = len(entries) - len(todo)
    lines = [
        f"{slides_in_words(len(entries))}: {len(todo)} to do, {skipped} already done with these settings, skipped."
    ]
    lines[:0] = share_in_words(entries, job.run.cohort, features.options)
    lines.append(
        f"tile encoder: {encoder.description}; {_device_name(features.encoders)}, {encoder.precision}, "
        f"batches of {features.batch_size}, {features.workers} reading threads."
    )
    lines.append(f"slide encoder: {job.slides.encoder.description if job.slides else 'none'}.")
    if features.tiling.max_tiles is not None and isinstance(features.tiles, TileStage):
        lines.append(f"at most {features.tiling.max_tiles} tiles a slide, spread evenly (seed {features.tiling.seed}).")
    size = total * encoder.embed_dim * (4 if features.store == "float32" else 2)
    work = (
        f"{tiles_in_words(total, exact=not unknown)} to embed, {in_bytes(size)} of tile embeddings into {job.run.out}"
    )
    facts: dict[str, float] = {
        "slides": len(entries),
        "todo": len(todo),
        "skipped": skipped,
        "tiles": total,
        "tiles_exact": not unknown,
        "bytes": size,
    }
    if features.probe is not None:
        rate = features.probe.tiles_per_second
        seconds = _seconds(features.probe, total, len(todo), features.batch_size)
        facts |= {"tiles_per_second": rate, "seconds": seconds}
        lines.append(f"{work}; about {in_words(seconds)} at {rate:.3g} tiles/s (measured on one batch).")
        if seconds > _PATIENCE_SECONDS and encoder.device.type == "cpu":
            lines.append(_ALTERNATIVES)
    else:
        lines.append(f"{work}.")
    return Plan(tuple(lines), len(entries), skipped, total, not unknown, facts)


def _tile_encoders(embedding: EmbedOptions) -> tuple[TileEncoder, ...]:
    """The tile encoder on each of the devices; workers on the CPU share it."""
    devices = resolve_devices(embedding.devices, embedding.device)
    loaded = {
        device: load_tile_encoder(
            embedding.tile_encoder,
            device=device,
            precision=embedding.precision,
            # The stand-in has weights of its own; untrained is what needs a licence, to try things without it.
            random_weights=embedding.random_weights and embedding.tile_encoder != "standin",
        )
        for device in dict.fromkeys(devices)
    }
    return tuple(loaded[device] for device in devices)


def _slide_encoder(embedding: EmbedOptions, encoder: TileEncoder) -> SlideEncoder | None:
    """The slide encoder that the options mean, or None for none; a pair that doesn't belong together is refused."""
    name = embedding.slide_encoder
    if name is None:
        folder = Path(embedding.tile_encoder)
        release = encoder.name.removesuffix("-random")
        if (folder / WEIGHTS_FILE).is_file():  # what `gigapath download --to` made
            name = embedding.tile_encoder
        elif release in RELEASES:
            name = release
        else:
            name = "gigapath" if embedding.tile_encoder == "standin" and embedding.random_weights else "mean"
    if name == "none":
        return None
    slide_encoder = load_slide_encoder(
        name,
        in_chans=encoder.embed_dim,
        device=encoder.device,
        precision=embedding.precision,
        random_weights=embedding.random_weights and name in RELEASES,
    )
    slide_encoder.check_pair(encoder.name, encoder.embed_dim)
    return slide_encoder
