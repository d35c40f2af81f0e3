"""`run_slide_embed`: tile embeddings, ours or another tool's, to the embeddings of slides."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from gigapath.cohort.manifest import SlideEntry
from gigapath.cohort.run import CohortRun, RunResult
from gigapath.cohort.status import read_status
from gigapath.devices import at_most_threads
from gigapath.embedding.options import SlideEmbedOptions
from gigapath.embedding.slide_encoding import SlideEncoder, load_slide_encoder, usual_slide_encoder
from gigapath.embedding.slide_stage import SlideStage, slides_folder
from gigapath.embedding.slides import only_failed
from gigapath.features.data import FeatureFileError, recipe_of
from gigapath.features.folders import FeatureFacts, encoder_hints, find_feature_files, look_at_features, slide_name
from gigapath.file_names import name_problem, one_line, plain_name, quoted_name
from gigapath.files import real_path, sha256_of
from gigapath.machine import available_cores
from gigapath.options import KeepOptions, to_dict
from gigapath.progress import Plan, Progress, StopFlag
from gigapath.releases import RELEASES
from gigapath.text import slides_in_words


def run_slide_embed(
    features: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    embedding: SlideEmbedOptions | None = None,
    options: KeepOptions | None = None,
    watch: Progress | None = None,
    command: Sequence[str] = (),
) -> RunResult:
    """Embed slides from their tile embeddings (files, or folders of them: a run's, or any of another tool):
    `slides_*/<id>.h5`, slides.csv; with `per="section"` one file a piece of tissue in `slides_*__sections`, with an
    `embedding` that ends with `:tiles` one vector a tile in `contextual_*`, with another tool's name a slide's
    embedding as that tool computes it in `as-*`.

    `out` is by default the folder of the run which made the features; the other arguments and errors are as of
    `run_embed`.
    """
    embedding, options, watch = embedding or SlideEmbedOptions(), options or KeepOptions(), watch or Progress()
    with StopFlag(watch.stopping) as stop, at_most_threads(available_cores()):
        entries = entries_of(features)
        out = _output_folder(entries, out)
        first, facts = _first_described(entries)
        encoder_name, width = facts.encoder, facts.width
        slide_encoder = _slide_encoder(embedding, first, facts)
        before = [
            path for path in (out / "tiles", entries[0].path.parent) if path.is_relative_to(out) and path.is_dir()
        ]
        folder = slides_folder(out, slide_encoder.name, plain_name(encoder_name or "features"), embedding.form)
        ids = sorted(entry.slide_id for entry in entries)
        if options.only == "failed":
            entries = only_failed(entries, [folder])
        resolved = {**to_dict(embedding), **to_dict(options)}
        run = CohortRun(
            out=out,
            verb="slide-embed",
            entries=entries,
            stages=[*before, folder],
            options=resolved,
            command=command,
            watch=watch,
            stop=stop,
            keep_paths=False,
            cohort=ids,
            max_failures=options.max_failures,
            dry_run=options.dry_run,
        )
        stage = SlideStage(
            folder=folder,
            encoder=slide_encoder,
            features=_FeatureFiles({entry.slide_id: _features_name(entry) for entry in entries}),
            options=options,
            run=run,
            tile_size_level0=embedding.tile_size_level0,
            tile_encoder=encoder_name,
            form=embedding.form,
        )
        run.made_with = [stage.made_with(entries, frozenset(ids))]
        todo = [entry for entry in entries if stage.done(entry) is None]
        run.facts["slide_encoder"] = slide_encoder.facts
        skipped = len(entries) - len(todo)
        lines = (
            f"{slides_in_words(len(entries))}: {len(todo)} to do, {skipped} already done with these settings, skipped.",
            f"slide encoder: {slide_encoder.description}; {slide_encoder.device.type}, {slide_encoder.precision}.",
            f"tile embeddings of {encoder_name or 'an encoder that the files do not name'}, {width}-d; into {folder}.",
        )
        plan = Plan(lines, len(entries), skipped, facts={"slides": len(entries), "todo": len(todo), "skipped": skipped})
        process = run.in_process(lambda entry: [run.make(stage, entry)])
        return dataclasses.replace(run.over_slides(todo, process, lambda: plan), results=folder)


@dataclasses.dataclass(frozen=True)
class _FeatureFiles:
    """Files of tile embeddings, wherever they are; `names` tells their content by slide."""

    names: Mapping[str, str]

    def path(self, entry: SlideEntry) -> Path:
        return entry.path

    def digest(self, entry: SlideEntry) -> str:
        return self.names[entry.slide_id]


def _slide_encoder(embedding: SlideEmbedOptions, first: Path, facts: FeatureFacts) -> SlideEncoder:
    """The slide encoder that the options mean for these tile embeddings, of which a first file says `facts` of itself;
    one that was trained on others is refused."""
    name, tile_encoder, width = embedding.slide_encoder, facts.encoder, facts.width
    if name is None:
        name = usual_slide_encoder(tile_encoder, random_weights=embedding.random_weights)
        fitting = [release.name for release in RELEASES.values() if release.tile_dim == width]
        if name == "mean" and fitting and not facts.of_our_run:
            hints = "; ".join(encoder_hints(first, facts.attrs))
            raise ValueError(
                f"--slide-encoder: expected a name, since {first.name} and the other {width}-d embeddings may be those "
                f"of {fitting[0]}'s tile encoder and do not say so (they say: {hints}). Name {fitting[0]} if they are, "
                "else mean."
            )
    slide_encoder = load_slide_encoder(
        name,
        in_chans=width,
        device=embedding.device,
        precision=embedding.precision,
        random_weights=embedding.random_weights and name in RELEASES,
    )
    slide_encoder.check_pair(tile_encoder, width)
    recipe = recipe_of(embedding.form)
    if slide_encoder.model is None and (recipe is not None or embedding.form.endswith(":tiles")):
        raise ValueError(f"--embedding {embedding.embedding}: expected a slide encoder with layers, got the mean.")
    if recipe is not None and embedding.precision == "auto":
        return slide_encoder.at(recipe.precision[slide_encoder.device.type == "cuda"])
    return slide_encoder


def entries_of(inputs: Sequence[str | Path]) -> list[SlideEntry]:
    """The files of tile embeddings that `inputs` name, one entry a slide; FileNotFoundError, or ValueError where a
    folder has none, several encoders' folders are there, or two files of one slide."""
    entries: dict[str, SlideEntry] = {}
    for file in find_feature_files(inputs):
        slide_id, problem = slide_name(file), ""
        wanted = name_problem(slide_id)
        if wanted is not None:
            slide_id, problem = quoted_name(slide_id), f"slide id: expected {wanted}. Rename the file."
        known = entries.get(slide_id)
        if known is not None and real_path(known.path) != real_path(file):
            both = f"{one_line(str(known.path))} and {one_line(str(file))}"
            raise ValueError(f"two files hold the slide '{slide_id}': {both}. Name one of them.")
        status = read_status(file.parent, slide_id)
        entries[slide_id] = SlideEntry(slide_id, file, columns=status.columns if status else {}, problem=problem)
    return list(entries.values())


def _output_folder(entries: Sequence[SlideEntry], out: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    folders = {entry.path.parent for entry in entries}
    folder = next(iter(folders))
    if len(folders) > 1 or not folder.name.startswith("features_"):
        raise ValueError("--out: expected an output folder, since these files are not in one features_* folder.")
    return folder.parent


def _first_described(entries: Sequence[SlideEntry]) -> tuple[Path, FeatureFacts]:
    """The first file that can be read, and what it says of itself."""
    error: Exception | None = None
    for entry in entries:
        try:
            return entry.path, look_at_features(entry.path)
        except (FeatureFileError, OSError) as problem:
            error = error or problem
    raise ValueError(f"none of {slides_in_words(len(entries))} has readable tile embeddings: {error}")


def _features_name(entry: SlideEntry) -> str:
    """Names a slide's tile embeddings: as the run that made them does, else by the file's content; "" where the run
    will record that they can't be read."""
    status = read_status(entry.path.parent, entry.slide_id)
    if status is not None and status.digest:
        return status.digest
    try:
        return f"sha256:{sha256_of(entry.path)}" if entry.path.is_file() else ""  # opening a pipe would wait
    except OSError:
        return ""
