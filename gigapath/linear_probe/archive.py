"""A zip or a folder of one `.pt` per tile, read once into one matrix: in parallel, in the order in which the bytes lie,
without unpacking to disk and without running what the files hold. A checked cache beside it makes the second reading
quick."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from gigapath.files import OutputError
from gigapath.linear_probe.sources import FolderSource, Source, ZipSource, read_members_ahead, visible
from gigapath.linear_probe.table import (
    EmbeddingTable,
    bare_name,
    check_finite,
    check_unique,
    read_table,
    split_of_path,
    write_table,
)
from gigapath.linear_probe.tensor_files import VectorReader

CACHE_SUFFIX = ".cache.h5"
CACHE_VERSION = 1  # raised when the cache's content changes for the same zip
REPORT_EVERY = 1024  # tiles

log = logging.getLogger(__name__)

Report = Callable[[int, int], None]  # (tiles read, tiles in all)


def read_embeddings(
    path: Path | str, *, cache: bool = True, report: Report | None = None
) -> tuple[EmbeddingTable, dict[str, str]]:
    """Read the embeddings of tiles, ordered by split and name whatever they come in.

    Args:
        path: a zip or folder of `.pt` vectors, or an `.h5`, `.npz`, `.safetensors` of `features` and `names`.
        cache: for a zip or folder, use and write `<path>.cache.h5` beside it.
        report: called now and then with the number of tiles read and the number there is.

    Returns:
        the table, and how it was read: {"identity": ..., "read_from": "files" | "cache"}.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a damaged container, a file that holds code, NaN, vectors of different widths.
    """
    path = Path(path)
    if path.is_dir():
        source: Source = FolderSource(path, _is_vector)
    elif path.suffix.lower() == ".zip":
        source = ZipSource(path, _is_vector)
    else:
        table = read_table(path)
        order = sorted(range(len(table)), key=lambda row: (table.splits[row], table.names[row]))
        return _reordered(table, order), {"identity": _file_identity(path), "read_from": "files"}
    identity = source.identity()
    cache_path = path.with_name(path.name + CACHE_SUFFIX)
    if cache:
        cached = _read_cache(cache_path, identity)
        if cached is not None:
            return cached, {"identity": identity, "read_from": "cache"}
    table = _read_all(source, path.name, report or (lambda done, total: None))
    if cache:
        try:
            write_table(cache_path, replace(table, attrs={"identity": identity, "cache_version": CACHE_VERSION}))
        except OutputError as error:
            log.warning("no cache was written: %s", error)
    return table, {"identity": identity, "read_from": "files"}


def _read_cache(path: Path, identity: str) -> EmbeddingTable | None:
    """The cached table if it is whole and of these very files, else None."""
    if not path.is_file():
        return None
    try:
        table = read_table(path)
    except (ValueError, OSError) as error:
        log.warning("the cache is not used: %s", error)
        return None
    if table.attrs.get("identity") != identity or table.attrs.get("cache_version") != CACHE_VERSION:
        return None
    return replace(table, attrs={})


def _read_all(source: Source, where: str, report: Report) -> EmbeddingTable:
    members = source.members()
    if not members:
        raise ValueError(f"{where}: expected .pt files, got none. Name the zip or folder of tile embeddings.")
    names = [bare_name(member) for member in members]
    splits = [split_of_path(member) for member in members]
    check_unique(names, where)
    order = sorted(range(len(members)), key=lambda index: (splits[index], names[index]))
    row_of_member = np.empty(len(members), dtype=np.int64)
    row_of_member[order] = np.arange(len(members))

    features = np.empty((0, 0), dtype=np.float32)
    reader = VectorReader()
    for done, (index, content) in enumerate(read_members_ahead(source), start=1):
        vector = reader.read(content, members[index])
        if done == 1:
            features = np.empty((len(members), len(vector)), dtype=np.float32)
            first = members[index]
        elif len(vector) != features.shape[1]:
            raise ValueError(
                f"{members[index]}: expected a vector of width {features.shape[1]} like {first}, "
                f"got {len(vector)}. Keep the embeddings of one encoder together."
            )
        features[row_of_member[index]] = vector
        if done % REPORT_EVERY == 0 or done == len(members):
            report(done, len(members))
    ordered = tuple(names[index] for index in order)
    check_finite(features, ordered, where)
    return EmbeddingTable(ordered, features, tuple(splits[index] for index in order))


def _is_vector(name: str) -> bool:
    return name.endswith(".pt") and visible(name)


def _file_identity(path: Path) -> str:
    status = path.stat()
    return f"file {status.st_size} {status.st_mtime_ns}"


def _reordered(table: EmbeddingTable, order: list[int]) -> EmbeddingTable:
    """The rows in another order; where it is the one they have, nothing is copied."""
    if order == list(range(len(order))):
        return table

    def text(values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if values is None else tuple(values[row] for row in order)

    return replace(
        table,
        names=tuple(table.names[row] for row in order),
        splits=tuple(table.splits[row] for row in order),
        features=table.features[order],
        colours=None if table.colours is None else table.colours[order],
        labels=text(table.labels),
        groups=text(table.groups),
    )
