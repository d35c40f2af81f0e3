"""Reading other tools' files: the same slide written as each of them would, read back to the same cells."""

import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from feature_files import (
    CELLS,
    make_features,
    shuffled,
    write_clam,
    write_foreign,
    write_h5,
    write_published,
    write_slide2vec,
    write_slideflow,
    write_trident,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gigapath.cohort.status import read_status
from gigapath.features import FeatureFileError, read_features
from gigapath.features.arrays import read_npz
from gigapath.features.cells import cells_of
from gigapath.features.check import check_file, describe, files_to_check
from gigapath.features.folders import find_feature_files, look_at_features
from gigapath.features.other_tools import convert

ORDER = shuffled(len(CELLS))
FEATURES = make_features()


@pytest.fixture(params=["trident", "clam", "stamp", "mussel", "published", "slide2vec"])
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, dict[str, Any]]:
    """(tool, its file of the made slide in an order of its own, what has to be stated to read it)."""
    stated = {"tile_size_level0": 256} if request.param == "published" else {}
    return request.param, write_foreign(request.param, tmp_path, FEATURES, ORDER), stated


def test_read_features_gives_every_tool_the_same_cells_and_order(foreign: tuple[str, Path, dict[str, Any]]) -> None:
    tool, path, stated = foreign
    found, stored = read_features(path, **stated), read_features(path, order="file", **stated)
    assert (found.source, found.slide_id, found.reordered, stored.reordered) == (tool, "slide-1", True, False)
    assert found.cells is not None and found.cells.dtype == np.int32
    corner = found.cells.min(axis=0) if tool == "mussel" else CELLS.min(axis=0)  # Mussel's grid starts at the tissue
    assert np.array_equal(found.cells - corner, CELLS - CELLS.min(axis=0))
    assert np.array_equal(found.encoder_coords(), found.cells.astype(np.int64) * 256)
    expected = FEATURES.astype(np.float16) if tool == "stamp" else FEATURES
    assert found.features.dtype == expected.dtype and np.array_equal(found.features, expected)
    assert np.array_equal(stored.features, expected[ORDER]) and np.array_equal(stored.cells, found.cells[ORDER])
    assert found.frame == {"stamp": "um", "published": "unstated"}.get(tool, "level0")
    assert found.encoder == {"slide2vec": "prov-gigapath", "trident": "gigapath", "stamp": "gigapath"}.get(tool)
    if found.frame != "level0":
        with pytest.raises(ValueError, match="level-0 pixels, got"):
            _ = found.coords_level0


@pytest.mark.parametrize(("last", "cell"), [(900, 4), (844, None)])
def test_mussels_tiles_at_the_far_edge_take_the_nearest_cell_of_their_own_or_are_named(
    last: int, cell: int | None, tmp_path: Path
) -> None:
    coords = np.array([(x, 256) for x in (0, 256, 512, 768, last)])
    arrays = {"features": make_features(len(coords)), "coords": coords}
    path = write_h5(tmp_path / "a.patch.h5", arrays, {"coords": {"patch_size": 256, "step_size": 256, "mpp": 0.5}})
    if cell is None:
        with pytest.raises(FeatureFileError, match=r"768.*844"):
            read_features(path)
        assert len(read_features(path, cells=False)) == len(coords)
    else:
        cells = read_features(path).cells
        assert cells is not None and cells.tolist() == [[0, 1], [1, 1], [2, 1], [3, 1], [cell, 1]]


def test_slideflows_bags_have_centers_and_need_their_step(tmp_path: Path) -> None:
    path = write_slideflow(tmp_path / "bags", FEATURES[ORDER], CELLS[ORDER])
    assert find_feature_files(tmp_path / "bags") == [path]
    with pytest.raises(FeatureFileError, match=r"slide-1\.pt.*tile_um.*--tile-size-level0"):
        read_features(path)
    found = read_features(path, tile_size_level0=512)
    assert (found.source, found.frame, found.attrs["tile_um"]) == ("slideflow", "centers", 128)
    assert np.array_equal(found.cells, CELLS) and np.array_equal(found.features, FEATURES)
    with pytest.raises(ValueError, match="tile centers"):
        _ = found.coords_level0
    (ours,) = convert(found, "gigapath", tmp_path / "ours")[0]
    assert np.array_equal(read_features(ours).coords_level0, CELLS.astype(np.int64) * 512)
    assert describe(path, tile_size_level0=512)["tool"] == "slideflow"
    index = path.with_name("slide-1.index.npz").rename(tmp_path / "slide-1.index.npz")
    assert np.array_equal(read_features(path, tile_size_level0=512, coordinates=index).cells, CELLS)
    np.savez(index, arr_0=CELLS[1:])
    with pytest.raises(FeatureFileError, match="expected coords"):
        read_features(path, tile_size_level0=512, coordinates=index)


def test_stores_and_arrays_that_are_not_read_are_refused_by_the_name_of_their_tool(tmp_path: Path) -> None:
    store, array = tmp_path / "a" / "slide-1.zarr", tmp_path / "b" / "slide-1.svs" / "features.npy"
    for path in (store / "tables" / "gigapath_tiles" / "zarr.json", array):
        path.parent.mkdir(parents=True)
        path.write_text("{}")
    for folder, tool in ((store, "LazySlide"), (store.parent, "LazySlide"), (tmp_path / "b", "HistoSSLscaling")):
        with pytest.raises(ValueError, match=tool):
            find_feature_files(folder)
        with pytest.raises(FileNotFoundError, match=tool):
            files_to_check([folder])
    with pytest.raises(FeatureFileError, match=r"features\.npy.*HistoSSLscaling"):
        read_features(array)


@pytest.mark.parametrize("write", [write_published, lambda *a: write_clam(*a, patches=False)])
def test_unstated_step_is_an_error_that_names_the_option(write: Any, tmp_path: Path) -> None:
    path = write(tmp_path, FEATURES)
    with pytest.raises(FeatureFileError, match=r"slide-1\.h5.*--tile-size-level0"):
        read_features(path)
    without = read_features(path, cells=False)
    assert without.cells is None and np.array_equal(without.features, FEATURES)
    with pytest.raises(ValueError, match="cells of its tiles are not known"):
        without.encoder_coords()


def test_what_does_not_fit_what_is_stated_is_refused(tmp_path: Path) -> None:
    path = write_trident(tmp_path, FEATURES)
    assert np.array_equal(read_features(path, tile_size_level0=512, embed_dim=6).cells, CELLS)
    with pytest.raises(FeatureFileError, match="--tile-size-level0"):
        read_features(path, tile_size_level0=256)
    with pytest.raises(FeatureFileError, match="expected embeddings of width 1536, got 6"):
        read_features(path, embed_dim=1536)
    for attrs in ({"overlap": 64}, {"patch_size_level0": 1024}):  # two tiles on one cell
        with pytest.raises(FeatureFileError, match="--tile-size-level0"):
            read_features(write_trident(tmp_path, FEATURES, **attrs))
    with pytest.raises(FeatureFileError, match="of floats"):
        read_features(stepped(tmp_path / "a.h5", FEATURES.reshape(2, 4, 6)))
    with pytest.raises(FeatureFileError, match="which no slide does"):
        read_features(stepped(tmp_path / "a.h5", coords=COORDS.astype(np.uint64) + np.uint64(2**63)))
    with pytest.raises(FeatureFileError, match="coordinates differ"):
        clam = write_clam(tmp_path, FEATURES)
        write_h5(tmp_path / "patches" / "slide-1.h5", {"coords": CELLS * 512 + 1}, {"coords": {"patch_size": 512}})
        read_features(clam)
    for missing in (tmp_path / "none.h5", tmp_path / "none.npz", tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_features(missing)


def test_clam_step_from_every_way_it_is_written(tmp_path: Path) -> None:
    def patches(**attrs: Any) -> Path:
        return write_h5(tmp_path / "p" / "slide-1.h5", {"coords": CELLS.astype(np.int64) * 512}, {"coords": attrs})

    path = write_clam(tmp_path, FEATURES, patches=False)
    for attrs in (
        {"patch_size": 256, "patch_level": 1, "downsample": 2.0},
        {"patch_size": 256, "patch_level": 1, "downsample": np.array([2.0, 2.0]), "custom_downsample": 2},
        {"patch_size": 512, "patch_level": 0},
    ):
        assert np.array_equal(read_features(path, coordinates=patches(**attrs)).cells, CELLS)
    with pytest.raises(FeatureFileError, match="--tile-size-level0"):
        read_features(path, coordinates=patches(patch_size=256, patch_level=1))


@pytest.mark.parametrize(
    ("root", "scale"),
    [({"unit": "um", "tile_size": 256.0}, 256.0), ({"unit": "px", "tile_size": 224}, 224.0)],
)
def test_stamp_of_earlier_versions(root: dict[str, Any], scale: float, tmp_path: Path) -> None:
    coords = (CELLS * scale).astype(np.float32)
    path = write_h5(tmp_path / "a.h5", {"feats": FEATURES.astype(np.float16), "coords": coords}, {"": root})
    assert np.array_equal(read_features(path).cells, CELLS)


def test_slide2vec_tensors_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = write_slide2vec(tmp_path, FEATURES).with_suffix(".pt")
    path.write_bytes(b"no tensor")
    with pytest.raises(FeatureFileError, match=r"slide-1\.pt"):
        read_features(path)
    torch.save(torch.from_numpy(FEATURES), path)
    found = read_features(path)
    assert np.array_equal(found.features, FEATURES) and np.array_equal(found.cells, CELLS)


def test_slide2vec_matches_tiles_by_index_or_refuses(tmp_path: Path) -> None:
    path = write_slide2vec(tmp_path, FEATURES, order=ORDER)
    fractions = read_features(path).tissue_fraction
    assert fractions is not None and np.allclose(fractions, np.linspace(0.2, 1.0, len(CELLS)))
    np.savez(path, features=FEATURES, tile_index=np.arange(len(FEATURES)) + 1)
    with pytest.raises(FeatureFileError, match="tile_index does not match"):
        read_features(path)
    (tmp_path / "tiles" / "slide-1.coordinates.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"slide-1\.npz"):
        read_features(path)


COORDS = CELLS.astype(np.int64) * 512


@settings(derandomize=True, deadline=None, max_examples=50)
@given(
    step=st.floats(2.0, 3000.0),
    start=st.tuples(st.floats(0, 1e5), st.floats(0, 1e5)),
    columns=st.integers(1, 1000),
    whole=st.booleans(),
)
def test_cells_of_a_grid_are_its_columns_wherever_it_starts(
    step: float, start: tuple[float, float], columns: int, whole: bool
) -> None:
    cells = np.stack([np.arange(columns), 7 + np.arange(columns) % 3], axis=1)
    coords = cells * step + np.asarray(start)
    if whole:
        coords = np.rint(coords)
    found = cells_of(coords, (step, step), who="made.h5")
    assert np.array_equal(found - found[0], cells - cells[0])
    assert np.abs(found[0] - coords[0] / step).max() <= 1 + 1 / step


def test_first_cell_of_a_grid_is_the_one_that_tools_divide_to() -> None:
    coords = np.array([[400, 700], [912, 1212]])
    for scale, step in ((1, 512.0), (0.2526, 129.33)):
        assert cells_of(coords * scale, (step, step), who="a.h5").tolist() == (coords // 512).tolist()
    five = np.arange(5)
    for line, step, columns in (
        (np.rint(five * 506.6)[2:], 506.6, [2, 3, 4]),
        (np.floor(five * 506.6)[1:], 506.6, [1, 2, 3, 4]),  # corners that were cut
        ((five * 0.1013)[2:], 0.1013, [2, 3, 4]),  # millimetres
        (np.float32(128.0) * five[:3] - np.float32(4e-6), 128.0, [0, 1, 2]),  # as STAMP stores them
    ):
        assert cells_of(np.stack([line, line], axis=1), (step, step), who="a.h5")[:, 0].tolist() == columns


@pytest.mark.parametrize(
    ("mask", "stride"),
    [(8, 23), pytest.param(1, 5, marks=pytest.mark.slow), pytest.param(8, 7, marks=pytest.mark.slow)],
)
def test_damaged_bytes_never_crash_the_reader(mask: int, stride: int, tmp_path: Path) -> None:
    """One flipped bit in every byte, or every so many."""
    content = write_trident(tmp_path, FEATURES).read_bytes()
    path = tmp_path / "damaged.h5"
    refused = 0
    for place in range(0, len(content), stride):
        path.write_bytes(content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :])
        try:
            read_features(path)
        except FeatureFileError as error:
            assert "damaged.h5" in str(error) and "\n" not in str(error)
            refused += 1
    assert refused * stride > 200


def test_damaged_text_attributes_do_not_hang_the_reader(tmp_path: Path) -> None:
    """HDF5 loops for ever where the objects of its text heap do not line up."""
    path = write_trident(tmp_path, FEATURES)
    content = bytearray(path.read_bytes())
    size = content.index(b"GCOL") + 16 + 8  # of the heap's first object
    content[size] += 80
    path.write_bytes(content)
    with pytest.raises(FeatureFileError, match=r"slide-1\.h5: its text attributes are damaged"):
        read_features(path)


def test_reading_takes_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = h5py.File

    def opened(*args: Any, **options: Any) -> h5py.File:
        asked.append(options.get("locking"))
        return plain(*args, **options)

    path = write_trident(tmp_path, FEATURES)
    monkeypatch.setattr(h5py, "File", opened)
    read_features(path)
    assert asked and set(asked) == {False}


def stepped(path: Path, features: np.ndarray = FEATURES, coords: np.ndarray = COORDS, step: Any = 512) -> Path:
    return write_h5(path, {"features": features, "coords": coords}, {"coords": {"patch_size_level0": step}})


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("step", [512, "512", np.array([512]), np.array([512.0, 512.0]), np.array([b"512"])])
def test_batch_axes_and_steps_in_any_form_are_taken(axis: int, step: Any, tmp_path: Path) -> None:
    path = stepped(tmp_path / "a.h5", np.expand_dims(FEATURES, axis), np.expand_dims(COORDS, axis), step)
    found = read_features(path)
    assert np.array_equal(found.features, FEATURES) and np.array_equal(found.cells, CELLS)
    facts = look_at_features(path)
    assert (facts.tiles, facts.width, facts.states_step) == (*FEATURES.shape, True)
    assert np.array_equal(facts.ends, FEATURES.reshape(-1))


@pytest.mark.parametrize("where", ["external link", "unused external link", "soft link", "virtual", "external storage"])
def test_what_lies_in_another_file_is_refused_and_never_opened(where: str, tmp_path: Path) -> None:
    """The other file is a pipe: whoever opens it waits for ever."""
    pipe, path = tmp_path / "pipe", tmp_path / "a.h5"
    os.mkfifo(pipe)
    with h5py.File(path, "w") as file:
        file.create_dataset("coords", data=COORDS).attrs["patch_size_level0"] = 512
        if where == "external link":
            file["features"] = h5py.ExternalLink(str(pipe), "/x")
        elif where == "unused external link":
            file["features"], file["other"] = FEATURES, h5py.ExternalLink(str(pipe), "/x")
        elif where == "soft link":
            file.create_group("inner")["x"] = h5py.ExternalLink(str(pipe), "/x")
            file["features"] = h5py.SoftLink("/inner/x")
        elif where == "virtual":
            layout = h5py.VirtualLayout(FEATURES.shape, "f4")
            layout[:] = h5py.VirtualSource(str(pipe), "x", FEATURES.shape)
            file.create_virtual_dataset("features", layout)
        else:
            file.create_dataset("features", FEATURES.shape, "f4", external=[(str(pipe), 0, h5py.h5f.UNLIMITED)])
    for read in (read_features, look_at_features):
        with pytest.raises(FeatureFileError, match="lies in another file"):
            read(path)
    assert [finding.name for finding in check_file(path).findings] == ["unreadable"]


def test_chunks_and_ratios_beyond_what_the_shape_needs_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "chunk.h5", "w") as file:
        file["coords"] = COORDS
        chunk = {"chunks": (20_000, 1536), "maxshape": (None, 1536), "compression": "gzip"}
        file.create_dataset("features", data=np.ones((8, 1536), np.float32), **chunk)
    with h5py.File(tmp_path / "ratio.h5", "w") as file:
        file["coords"] = np.zeros((20_000, 2), np.int64)
        many = file.create_dataset("features", (20_000, 1536), "f4", chunks=(5_000, 1536), compression="gzip")
        for start in range(0, 20_000, 5_000):
            many[start : start + 5_000] = 1
    for name in ("chunk", "ratio"):
        with pytest.raises(FeatureFileError, match="in memory"):
            read_features(tmp_path / f"{name}.h5")
    np.savez_compressed(tmp_path / "a.npz", features=np.zeros((20_000, 1024), np.float32))
    with pytest.raises(FeatureFileError, match="in memory"):
        read_npz(tmp_path / "a.npz")


def test_text_that_is_no_utf8_becomes_text_that_can_be_written(tmp_path: Path) -> None:
    path = write_trident(tmp_path, make_features(len(CELLS)))
    with h5py.File(path, "a") as file:
        file.attrs["scanner"] = b"\xff\xfename"
        file.attrs.create(b"\xfd", 3)
        file.attrs["names"] = np.array([b"\xff", b"b"])
    for key, value in read_features(path).attrs.items():
        assert isinstance(key, str) and f"{key} {value}".encode()


@pytest.mark.parametrize("count", [2_000_000, 5_000_000])
def test_attributes_of_millions_of_numbers_are_left_out(tmp_path: Path, count: int) -> None:
    with h5py.File(stepped(tmp_path / "a.h5"), "r+") as file:
        for number in range(2000):
            file.attrs[f"a{number}"] = number
    with pytest.raises(FeatureFileError, match="attributes"):
        read_features(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w", libver="latest") as file:
        file["features"] = FEATURES
        file.create_dataset("coords", data=COORDS).attrs.update(patch_size_level0=512, big=np.zeros(count))
    found = read_features(tmp_path / "b.h5")
    assert "big" not in found.attrs and np.array_equal(found.cells, CELLS)


@pytest.mark.parametrize("name", ["features", "coords"])
def test_a_group_under_the_name_of_a_dataset_is_refused(name: str, tmp_path: Path) -> None:
    path = stepped(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        del file[name]
        file.create_group(name)
    for read in (read_features, look_at_features):
        with pytest.raises(FeatureFileError, match="dataset"):
            read(path)
    assert [finding.name for finding in check_file(path).findings] == ["unreadable"]


def test_pipes_under_the_names_of_status_files_are_not_waited_for(tmp_path: Path) -> None:
    path = stepped(tmp_path / "a.h5")
    os.mkfifo(tmp_path / "a.json")
    assert read_status(tmp_path, "a") is None and len(read_features(path)) == len(FEATURES)


@pytest.mark.parametrize("tool", ["trident", "stamp"])
def test_slide_files_of_other_tools_are_named_as_what_they_are(tool: str, tmp_path: Path) -> None:
    vector = FEATURES[0]
    if tool == "trident":
        path = write_h5(tmp_path / "a.h5", {"features": vector, "coords": COORDS})
    else:
        path = write_h5(tmp_path / "a.h5", {"feats": vector[None]}, {"": {"feat_type": "slide", "encoder": "titan"}})
    for read in (read_features, look_at_features):
        with pytest.raises(FeatureFileError, match="one slide vector"):
            read(path)
    found = describe(path)
    assert (found["kind"], found["tool"], found["width"]) == ("slide embeddings", tool, 6)


def test_clams_tensors_are_read_with_the_coordinates_beside_them(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    h5_file = write_clam(tmp_path, FEATURES)
    path = tmp_path / "pt_files" / "slide-1.pt"
    path.parent.mkdir()
    torch.save(torch.from_numpy(FEATURES), path)
    found = read_features(path)
    assert found.source == "clam" and np.array_equal(found.cells, CELLS)
    h5_file.unlink()
    assert np.array_equal(read_features(path).cells, CELLS)
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "patches").rename(elsewhere)
    with pytest.raises(FeatureFileError, match="--coordinates"):
        read_features(path)
    assert np.array_equal(read_features(path, coordinates=elsewhere).cells, CELLS)
    torch.save(torch.from_numpy(FEATURES[1:]), path)
    with pytest.raises(FeatureFileError, match="not of the same tiles"):
        read_features(path, coordinates=elsewhere)


def test_slide2vecs_runs_with_annotations_name_the_place_of_their_coordinates(tmp_path: Path) -> None:
    path = write_slide2vec(tmp_path, FEATURES, order=ORDER)
    inner = tmp_path / "tile_embeddings" / "tumor" / "slide-1.npz"
    inner.parent.mkdir()
    path.rename(inner)
    meta = path.with_name("slide-1.meta.json")
    meta.rename(inner.with_name(meta.name))
    (tmp_path / "tiles" / "tumor").mkdir()
    for name in ("slide-1.coordinates.npz", "slide-1.coordinates.meta.json"):
        (tmp_path / "tiles" / name).rename(tmp_path / "tiles" / "tumor" / name)
    assert np.array_equal(read_features(inner).cells, CELLS)
    (tmp_path / "tiles" / "tumor").rename(tmp_path / "tiles" / "other")
    with pytest.raises(FileNotFoundError):
        read_features(inner)
    said = {"coordinates_npz_path": "/where/it/was/made/tiles/other/slide-1.coordinates.npz", "tile_size_lv0": 512}
    inner.with_name(meta.name).write_text(json.dumps(said))
    assert np.array_equal(read_features(inner).cells, CELLS)
    assert find_feature_files(tmp_path) == [inner]


# Which files a folder holds


def test_hidden_files_and_those_of_other_kinds_are_no_feature_files(tmp_path: Path) -> None:
    path = write_trident(tmp_path, FEATURES)
    folder = path.parent
    (folder / ".ipynb_checkpoints").mkdir()
    for other in (".ipynb_checkpoints/slide-1-checkpoint.h5", "._slide-1.h5", "~$slide-1.h5", "slide-2.tmp.h5"):
        (folder / other).write_bytes(b"\0\5\x16\7" + bytes(100))
    (folder / ".DS_Store").write_bytes(b"")
    (folder / "slide-2.h5.00000000-1-aaaaaa.partial").write_bytes(b"")
    write_h5(tmp_path / "patches" / "slide-1_patches.h5", {"coords": COORDS})
    write_h5(tmp_path / "slide_features_titan" / "slide-1.h5", {"features": FEATURES[0], "coords": COORDS})
    for named in (tmp_path, folder, path, [path, folder]):
        assert find_feature_files(named) == [path]
    assert [file.name for file in files_to_check([folder])] == ["slide-1.h5"]
    (folder / "up").symlink_to(tmp_path)  # the search ends there
    assert find_feature_files(tmp_path) == [path]


def test_a_folder_of_several_encoders_or_of_none_is_refused(tmp_path: Path) -> None:
    path = write_trident(tmp_path, FEATURES)
    other = tmp_path / "features_uni" / "slide-1.h5"
    write_h5(other, {"features": FEATURES, "coords": COORDS})
    with pytest.raises(ValueError, match="features_gigapath, features_uni"):
        find_feature_files(tmp_path)
    assert find_feature_files([path.parent, other.parent]) == [path, other]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none"):
        find_feature_files(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        find_feature_files(tmp_path / "nothing")
