"""Slides to tiles and embeddings: tile, embed, slide-embed; and demo, embed on a slide that anybody has."""

import dataclasses
import sys
from pathlib import Path

from gigapath.cli.arguments import Features, File, Folder, Json, RunFolder, Slides, Words, verb
from gigapath.embedding.options import EmbedOptions, RunOptions, SlideEmbedOptions
from gigapath.options import KeepOptions
from gigapath.preprocessing.tiling import TileOptions

# The libraries of each verb are imported where it runs: torch takes seconds, and wrong options are refused before.


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
        to: write a table of --embedding too: .parquet, .csv or .npz, as convert does
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


@verb
def demo(slides: Slides = (), /, *, out: Folder = "gigapath-demo", tiles: TileOptions) -> int:
    """Embed a slide by a released model where HF_TOKEN opens one, else by the stand-in, and say where everything is.

    Args:
        slides: yours (default: a small public one, CMU-1-Small-Region, H&E, CC0; without network one made on the spot)
        out: folder of the results
    """
    from gigapath.features import read_slides
    from gigapath.hub import DEFAULT_FOLDER, download

    if not slides:
        try:
            slides = (str(download("demo-slide")[0].path),)
            print("The slide is CMU-1-Small-Region: a real one, H&E, CC0.")
        except OSError as error:
            from gigapath.preprocessing.made_slide import write_made_slide

            print(f"{error}\nNo public slide could be fetched. The slide is one made on the spot: texture, not tissue.")
            slides, tiles = (
                (str(write_made_slide(DEFAULT_FOLDER / "made-slide.png")),),
                dataclasses.replace(tiles, slide_mpp=0.5),
            )
    encoder = _released_at_hand()
    if encoder is None:
        print(
            "The encoder is the stand-in: EfficientNet-Lite0 with ImageNet weights. It shows how things work; it is "
            "not GigaPath. For the released model ask for access on its page, set HF_TOKEN and run this again."
        )
    else:
        print(f"The encoder is the released one, {encoder}.")
    name, embedding = (encoder, "default") if encoder else ("standin", "tile-mean")
    folder = Path(out) / name
    status = embed(slides, out=str(folder), encoders=EmbedOptions(tile_encoder=name), tiles=tiles, run=RunOptions())
    if status == 0:
        ids, vectors = read_slides(folder, embedding)
        print(
            f"\nThe picture of what was kept:   {folder}/previews\n"
            f"The table of slides:            {folder}/slides.csv\n"
            f"The embeddings of the tiles:    {folder}/features_{name}\n"
            "The embedding of the slide, read by three lines of Python, and what they print:\n\n"
            f"import gigapath\nids, vectors = gigapath.read_slides({str(folder)!r}, {embedding!r})\n"
            f"print(ids, vectors.shape)\n{ids} {vectors.shape}"
        )
    return status


def _released_at_hand() -> str | None:
    """The released pair that the hub's token opens, the small one first where there is no GPU; None without one."""
    import huggingface_hub

    from gigapath.hub import download
    from gigapath.machine import check_device

    if huggingface_hub.get_token() is None:
        return None
    names = ["gigapath", "gigapath-flash"]
    try:
        check_device("cuda")
    except ValueError:
        names.reverse()
    for name in names:
        try:
            download(name)
        except OSError as error:
            print(error, file=sys.stderr)
        else:
            return name
    return None
