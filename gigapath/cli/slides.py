"""Slides to tiles and embeddings: tile, embed, slide-embed."""

from pathlib import Path

from gigapath.cli.arguments import Features, File, Folder, Json, RunFolder, Slides, Words, verb
from gigapath.embedding.options import EmbedOptions, KeepOptions, RunOptions, SlideEmbedOptions
from gigapath.preprocessing.tiling import TileOptions

# The libraries of each verb are imported where it runs: torch takes seconds, and a wrong word is told before.


@verb
def tile(
    slides: Slides,
    /,
    *,
    out: RunFolder,
    as_json: Json = False,
    tiles: TileOptions,
    run: RunOptions,
    words: Words = (),
) -> int:
    """Find tissue and lay tiles."""
    from gigapath.cli.progress import Terminal
    from gigapath.embedding.tiling import run_tile

    with Terminal("slide", machine=as_json) as watch:
        result = run_tile(slides, out, tiling=tiles, options=run, watch=watch, command=words)
    return watch.report(result)


@verb
def embed(
    slides: Slides = (),
    /,
    *,
    out: RunFolder,
    as_json: Json = False,
    encoders: EmbedOptions,
    tiles: TileOptions,
    run: RunOptions,
    words: Words = (),
) -> int:
    """Embed slides, which may be left out with --tiles."""
    from gigapath.cli.progress import Terminal
    from gigapath.embedding.slides import cohort_to_embed

    cohort = cohort_to_embed(slides, Path(out), encoders.tiles, tiles, run)
    from gigapath.embedding.run import embed_cohort  # torch, once the slides are found

    with Terminal("tile", machine=as_json) as watch:
        result = embed_cohort(cohort, Path(out), tiles, encoders, run, watch, words)
    return watch.report(result)


@verb
def slide_embed(
    features: Features,
    /,
    *,
    out: Folder | None = None,
    to: File | None = None,
    as_json: Json = False,
    slide_encoder: SlideEmbedOptions,
    run: KeepOptions,
    words: Words = (),
) -> int:
    """Embed slides from the embeddings of their tiles.

    Args:
        out: the output folder (default: that of the run which made FEATURES)
        to: write a table of --embedding too: .parquet, .csv or .npz, as export does
    """
    from gigapath.features.tables import TABLE_FORMATS, export_table

    embedding = slide_encoder.embedding
    if to and slide_encoder.form.endswith(":tiles"):
        raise ValueError(f"--to: expected the name of one vector a slide, got --embedding {embedding}.")
    if to and Path(to).suffix not in TABLE_FORMATS:
        raise ValueError(f"--to: expected a file ending in {', '.join(TABLE_FORMATS)}, got {to!r}.")
    from gigapath.cli.progress import Terminal
    from gigapath.embedding.slide_embedding import run_slide_embed

    with Terminal("slide", machine=as_json) as watch:
        result = run_slide_embed(features, out, embedding=slide_encoder, options=run, watch=watch, command=words)
    if to and result.results is not None and result.counts["done"]:
        overwrite = run.overwrites("slides")
        export_table(result.results, to, embedding=embedding, allow_mixed=run.allow_mixed, overwrite=overwrite)
    return watch.report(result)
