"""Slide vectors of a whole run: one matrix, one table; slides or tiles as an AnnData. N tiles, S slides, D width."""

import csv
import io
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.features.arrays import read_npz
from gigapath.features.data import FRAMES, Array, Attrs, FeatureFileError, TileEmbeddings, parse_embedding
from gigapath.features.gigapath_file import read_slide
from gigapath.features.h5 import open_h5, read_attr
from gigapath.features.reading import read_features
from gigapath.files import atomic_file, small_json, visible_files, write_bytes_atomic
from gigapath.tables import data_frame
from gigapath.text import slides_in_words

# What must be equal throughout a folder for its vectors to be comparable.
SAME_THROUGHOUT = (
    "numerics_version",
    "encoder",
    "weights_sha256",
    "transform",
    "precision",
    "device",
    "batch_shape",
    "fast_transform",
    "store",
    "slide_encoder",
    "slide_weights_sha256",
    "slide_precision",
    "slide_device",
    "trained",
)

TABLE_FORMATS = (".parquet", ".csv", ".npz")


def find_slide_folder(folder: Path | str) -> Path:
    """The folder of slide embeddings: `folder` itself, or the one `slides_*` folder of a run; FileNotFoundError, or
    ValueError that lists several slide encoders."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    if folder.name.startswith("slides_"):
        return folder
    found = sorted(path for path in folder.glob("slides_*") if path.is_dir() and visible_files(path, "*.h5"))
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder}: expected the embeddings of one slide encoder, got {names}. Name one of them.")
    if found:
        return found[0]
    if visible_files(folder, "*.h5"):
        return folder
    raise FileNotFoundError(f"{folder}: no slide embeddings (slides_*/*.h5) in it. Run gigapath embed first.")


def read_slides(
    folder: Path | str, embedding: str = "default", *, allow_mixed: bool = False
) -> tuple[list[str], Array]:
    """Read one embedding of every slide.

    Args:
        folder: the output folder of a run, or one of its `slides_*` folders.
        embedding: "default", "state:I" (the output of layer I, 0 the input), "last-state" or "all-states" (0 to the
            last, concatenated), each also with ":mean" (over the tiles, meant where nothing is said) or ":class" (the
            class token); "tile-mean", the plain mean of the tile embeddings, all that runs without a slide encoder
            have; the name of another tool for its state and pooling, such as "trident" for "state:11:mean".
        allow_mixed: take slides of different encoders, precisions or numerics together.

    Returns:
        slide ids, sorted, and their vectors (S, D) float32 in that order.

    Raises:
        FileNotFoundError: no such folder, or no slide embeddings in it.
        ValueError: mixed numerics, two files of one slide, a slide without that embedding, slides whose tile embeddings
            were made again since.
    """
    ids, vectors, slides = _gather(folder, embedding, allow_mixed=allow_mixed)
    if parse_embedding(embedding).kind != "tile-mean" and any(attrs.get("trained") is False for attrs in slides):
        warnings.warn(f"{Path(folder).name}: these vectors come from an untrained slide encoder.", stacklevel=2)
    return ids, vectors


def export_table(
    folder: Path | str,
    to: Path | str,
    *,
    embedding: str = "default",
    allow_mixed: bool = False,
    overwrite: bool = False,
) -> tuple[int, int]:
    """Write one embedding of every slide as one table, whole or not at all.

    Columns: `slide_id`, `embedding` (its name), `trained` (False where weights are random), `e0` ... An npz holds
    `slide_ids`, `vectors` (S, D) float32, and `attrs`, JSON of what all slides have in common.

    Args:
        folder: as for `read_slides`.
        to: a file ending in .parquet, .csv or .npz.
        embedding: as for `read_slides`.
        allow_mixed: as for `read_slides`.
        overwrite: put the table in place of one of another embedding or of other vectors, or of any other file; a table
            that only gains slides needs no leave.

    Returns:
        slides, width.

    Raises:
        ValueError: beside those of `read_slides`, the file holds something else.
        ImportError: parquet without pandas and pyarrow.
    """
    to = Path(to)
    if to.suffix not in TABLE_FORMATS:
        raise ValueError(f"--to: expected a file ending in {', '.join(TABLE_FORMATS)}, got {to.name!r}.")
    name = str(parse_embedding(embedding))
    instead = "Write it to another file, or put it in place of that one with --overwrite."
    before = None
    if to.exists() and not overwrite:
        try:
            attrs, before = read_table(to)
        except FeatureFileError as error:
            raise ValueError(f"{to.name}: a file that is no table of slide vectors has that name. {instead}") from error
        if attrs.get("embedding") != name:
            raise ValueError(
                f"{to.name}: expected the embedding that the table holds, got another: --embedding "
                f"{attrs.get('embedding', 'unknown')} -> {name}. {instead}"
            )
    ids, vectors, slides = _gather(folder, embedding, allow_mixed=allow_mixed)
    if before is not None:
        now = dict(zip(ids, vectors, strict=True))
        other = [slide for slide, held in before.items() if slide not in now or not np.array_equal(held, now[slide])]
        if other:
            raise ValueError(
                f"{to.name}: it holds {slides_in_words(len(other))} ({other[0]}) that this one lacks or has changed. "
                + instead
            )
    trained = ["" if (value := attrs.get("trained")) is None else bool(value) for attrs in slides]
    if to.suffix == ".csv":
        _write_csv(to, ids, vectors, name, trained)
    elif to.suffix == ".npz":
        attrs = {"embedding": name, **_in_common(slides)}
        buffer = io.BytesIO()
        np.savez(buffer, slide_ids=np.array(ids), vectors=vectors, attrs=np.array(json.dumps(attrs, sort_keys=True)))
        write_bytes_atomic(to, buffer.getvalue())
    else:
        _write_parquet(to, ids, vectors, name, trained)
    return vectors.shape[0], vectors.shape[1]


def read_table(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """What a table says of its vectors (an exported one their name, `embedding`), and the vectors by slide;
    FeatureFileError for another file, ImportError of parquet without pandas and pyarrow."""
    ids: Any
    try:
        if path.suffix == ".npz":
            held = read_npz(path)
            attrs, ids, vectors = json.loads(str(held.get("attrs", "{}"))), held["slide_ids"], held["vectors"]
        elif path.suffix == ".csv":  # of another tool or hand too, if it has slide_id, e0, e1, ...
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            entries = [name for name in rows[0] if name.removeprefix("e").isdigit()]
            attrs = {name: rows[0][name] for name in rows[0] if name not in {"slide_id", *entries}}
            ids = [row["slide_id"] for row in rows]
            vectors = np.array([[row[name] for name in entries or ["e0"]] for row in rows], dtype=np.float32)
        else:
            table = _pandas_for_parquet().read_parquet(path)
            attrs, ids = {"embedding": table["embedding"].iloc[0]}, table["slide_id"]
            vectors = table.iloc[:, 3:].to_numpy(np.float32)
        return attrs, dict(zip(map(str, ids), vectors, strict=True))
    except ImportError:
        raise
    except Exception as error:  # whatever another file of that name raises
        raise FeatureFileError(
            f"{path.name}: expected a table of slide vectors (slide_id, e0, e1, ...), as `gigapath convert` writes it, "
            "got something that is none."
        ) from error


def _gather(folder: Path | str, embedding: str, *, allow_mixed: bool) -> tuple[list[str], Array, list[Attrs]]:
    """Ids, sorted, their vectors (S, D), and what their files say of themselves; of each slide's many embeddings only
    the one asked for is kept."""
    wanted = parse_embedding(embedding)
    array = ("default_" if wanted.kind == "default" else "states_") + wanted.pooling
    folder = find_slide_folder(folder)
    files = visible_files(folder, "*.h5")
    if not files:
        raise FileNotFoundError(f"{folder}: no slide embeddings (*.h5) in it.")
    slides: dict[str, tuple[Attrs, Array | ValueError]] = {}
    for file in files:
        slide = read_slide(file, only=(array,))
        if slide.slide_id in slides:
            raise ValueError(f"{folder.name}: two files of slide {slide.slide_id!r}. Remove one.")
        try:
            chosen: Array | ValueError = slide.select(embedding).copy()
        except ValueError as error:  # that slides are mixed says more, where they are
            chosen = error
        slides[slide.slide_id] = slide.attrs, chosen
    ids = sorted(slides)
    attrs = {slide_id: slides[slide_id][0] for slide_id in ids}
    _refuse_mixed(attrs, folder, allow_mixed)
    _refuse_outdated(attrs, folder, allow_mixed)
    vectors = []
    for slide_id in ids:
        held = slides[slide_id][1]
        if isinstance(held, ValueError):
            raise held
        vectors.append(held)
    widths = sorted({len(vector) for vector in vectors})
    if len(widths) > 1:
        raise FeatureFileError(f"{folder.name}: expected vectors of one width, got {', '.join(map(str, widths))}.")
    return ids, np.stack(vectors), list(attrs.values())


def _refuse_mixed(slides: Mapping[str, Attrs], folder: Path, allow_mixed: bool) -> None:
    for name in SAME_THROUGHOUT:
        values: dict[str, str] = {}
        for slide_id, attrs in slides.items():
            values.setdefault(str(attrs.get(name)), slide_id)
        if len(values) > 1:
            shown = ", ".join(f"{value} ({slide_id})" for value, slide_id in list(values.items())[:3])
            text = f"{folder.name}: its slides differ in {name}: {shown}."
            _refuse(text, "Embed them alike", allow_mixed)


def _refuse_outdated(slides: Mapping[str, Attrs], folder: Path, allow_mixed: bool) -> None:
    """Refuse vectors of tile embeddings that the run has made again since, where those lie beside them."""
    encoder = folder.name.partition("__")[2].removesuffix("__sections")
    outdated = []
    for slide_id, attrs in slides.items():
        of_slide = str(attrs.get("of_slide", slide_id))
        now = _identity(folder.parent / f"features_{encoder}" / f"{of_slide}.h5")
        before = str(attrs.get("features"))
        if now is not None and now != before and not before.startswith("sha256:"):
            outdated.append(slide_id)
    if outdated:
        text = (
            f"{folder.name}: {len(outdated)} of its slides ({outdated[0]}) are older than their tile embeddings, which "
            "were made again with other numbers."
        )
        _refuse(text, "Run gigapath slide-embed again", allow_mixed)


def _refuse(text: str, remedy: str, allow_mixed: bool) -> None:
    if not allow_mixed:
        raise ValueError(f"{text} {remedy}, or pass --allow-mixed.")
    warnings.warn(text, stacklevel=5)


def _identity(features: Path) -> str | None:
    """What a file of tile embeddings, or the status beside it, records as its identity; None where there is none to
    compare with."""
    if not features.is_file():
        return None
    beside = features.with_name(f"{features.stem}.json")  # far quicker to open
    status = small_json(beside)
    finished = isinstance(status, dict) and status.get("status") == "done" and status.get("digest")
    # A run that was killed between the two has left a newer file, of which the status says nothing.
    if finished and beside.stat().st_mtime_ns >= features.stat().st_mtime_ns:
        return str(status["digest"])
    try:
        with open_h5(features) as file:
            found = read_attr(file, "identity")
    except FeatureFileError:
        return None
    return None if found is None else str(found)


def _in_common(slides: Sequence[Attrs]) -> dict[str, Any]:
    first = slides[0]
    return {
        name: first[name]
        for name in first
        if all(attrs.get(name) == first[name] for attrs in slides) and not isinstance(first[name], np.ndarray)
    }


def _write_csv(to: Path, ids: Sequence[str], vectors: Array, name: str, trained: Sequence[Any]) -> None:
    with atomic_file(to) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["slide_id", "embedding", "trained", *(f"e{i}" for i in range(vectors.shape[1]))])
        for slide_id, vector, mark in zip(ids, vectors, trained, strict=True):
            # Nine digits give back every float32.
            rows.writerow([slide_id, name, mark, *(f"{value:.9g}" for value in vector.tolist())])


def _pandas_for_parquet() -> Any:
    try:
        import pandas
        import pyarrow  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "export to .parquet needs pandas and pyarrow. Install them (pip install 'gigapath[train]'), or write .csv "
            "or .npz."
        ) from error
    return pandas


def _write_parquet(to: Path, ids: Sequence[str], vectors: Array, name: str, trained: Sequence[Any]) -> None:
    table = _pandas_for_parquet().DataFrame(vectors, columns=[f"e{i}" for i in range(vectors.shape[1])])
    table.insert(0, "trained", [None if mark == "" else mark for mark in trained])
    table.insert(0, "embedding", name)
    table.insert(0, "slide_id", list(ids))
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_bytes_atomic(to, buffer.getvalue())


_TILE_FACTS = ("mpp", "tile_size", "level", "tissue_method")  # of a file of tile embeddings, where it states them


def to_anndata(source: Any, *, embedding: str = "default", allow_mixed: bool = False) -> Any:
    """Bring a slide's tiles, or a cohort's slides, into an AnnData; `write_h5ad` and `write_zarr` of the result write
    it.

    Tiles: X (N, D) float32; obs has `slide_id`, the top-left `x`, `y`, `array_row`, `array_col` (cells), and what the
    file holds of `tissue_fraction`, `section` and quality; obsm["spatial"] (N, 2) float64 are the tiles' centers (x, y)
    in level-0 pixels (`uns["gigapath"]["unit"]` says so, or which other unit the file has); `uns["spatial"]` gives
    squidpy the tiles' size. Slides: X (S, D) float32; obs has the columns of slides.csv, the manifest's among them.

    Args:
        source: tiles: a feature file, `TileEmbeddings`, or what `gigapath.read_features(folder)` gives, for the tiles
            of all its slides; slides: the output folder of a run, one of its `slides_*` folders, or the run's result.
        embedding: of slides, as for `gigapath.read_slides`, and so is `allow_mixed`.

    Raises:
        ImportError: anndata is not installed.
        FileNotFoundError, ValueError: as `gigapath.read_features` and `gigapath.read_slides`.
    """
    try:
        import anndata
    except ImportError as error:
        raise ImportError(
            "to_anndata: expected anndata, which is not installed. Install it: pip install 'gigapath[anndata]'."
        ) from error
    if isinstance(source, TileEmbeddings):
        return _of_tiles(source, anndata)
    if isinstance(source, Mapping):
        return anndata.concat([_of_tiles(tiles, anndata) for tiles in source.values()], uns_merge="unique")
    path = Path(getattr(source, "results", None) or getattr(source, "out", source))
    if path.is_dir():
        return _of_slides(path, embedding, allow_mixed, anndata)
    return _of_tiles(read_features(path), anndata)


def _of_tiles(tiles: TileEmbeddings, anndata: Any) -> Any:
    size = tiles.tile_size_level0
    columns: dict[str, Any] = {
        "slide_id": [tiles.slide_id] * len(tiles),
        "x": tiles.coords[:, 0],
        "y": tiles.coords[:, 1],
    }
    if tiles.cells is not None:
        columns |= {"array_row": tiles.cells[:, 1], "array_col": tiles.cells[:, 0]}
    columns |= {name: values for name in ("tissue_fraction", "section") if (values := getattr(tiles, name)) is not None}
    columns |= {name: tiles.qc[:, index] for index, name in enumerate(tiles.qc_names) if tiles.qc is not None}
    obs = data_frame(columns)
    obs.index = [f"{tiles.slide_id}-{index}" for index in range(len(tiles))]
    facts = {name: tiles.attrs[name] for name in _TILE_FACTS if isinstance(tiles.attrs.get(name), str | int | float)}
    scale = {"spot_diameter_fullres": float(size or 1), "tissue_hires_scalef": 1.0}
    return anndata.AnnData(
        np.asarray(tiles.features, np.float32),
        obs=obs.astype({"slide_id": "category"}),
        obsm={"spatial": tiles.coords.astype(np.float64) + (size or 0) / 2},
        uns={
            "gigapath": {"encoder": tiles.encoder or "", "source": tiles.source, "unit": FRAMES[tiles.frame], **facts},
            "spatial": {tiles.slide_id: {"images": {}, "scalefactors": scale, "metadata": {}}},
        },
    )


def _of_slides(folder: Path, embedding: str, allow_mixed: bool, anndata: Any) -> Any:
    ids, vectors = read_slides(folder, embedding, allow_mixed=allow_mixed)
    found = find_slide_folder(folder)
    table = found.parent / "slides.csv"
    obs = data_frame(table.read_text(encoding="utf-8")) if table.is_file() else data_frame({"slide_id": []})
    obs = obs.astype({"slide_id": str}).set_index("slide_id").reindex(ids).dropna(axis="columns", how="all")
    obs.columns = [name.replace("/", "_per_") for name in obs.columns]  # a "/" is a group to HDF5 and zarr
    for name in obs.select_dtypes(exclude="number").columns:  # texts with gaps are written as categories
        obs[name] = obs[name].map(str, na_action="ignore").astype("category")
    obs.index.name = None
    return anndata.AnnData(vectors, obs=obs, uns={"gigapath": {"embedding": embedding, "folder": found.name}})
