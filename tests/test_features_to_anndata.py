"""Tiles and slides as AnnData: what is in it, written and read again, and taken by scanpy and squidpy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_cohort import made_bag, write_slide

import gigapath
from gigapath.features import SlideEmbeddings
from gigapath.features import write_slide as write_slide_embeddings

ENCODER = "made"


@pytest.fixture
def anndata() -> Any:
    return pytest.importorskip("anndata")


def slide_file(folder: Path, name: str, *, tiles: int = 60, width: int = 8, seed: int = 0) -> Path:
    features, cells = made_bag(1, np.random.default_rng(seed), tiles=tiles, width=width)
    return write_slide(folder / f"{name}.h5", features, cells, encoder=ENCODER, mpp=0.5)


def run_folder(folder: Path) -> Path:
    """A run's slide embeddings and its slides.csv, where a third slide failed."""
    for number, name in enumerate(("a", "b", "c")):
        vector = np.random.default_rng(number).standard_normal((1, 6)).astype(np.float32)
        (folder / "slides_mean__made").mkdir(parents=True, exist_ok=True)
        write_slide_embeddings(
            folder / "slides_mean__made" / f"{name}.h5", SlideEmbeddings(slide_id=name, tile_mean=vector)
        )
    (folder / "slides.csv").write_text(
        "slide_id,status,tiles,tiles/s,error,stain,trained,level\n"
        "a,done,5,2.5,,HE,True,0\nb,done,7,3.5,,,False,1\nc,done,6,3.5,,HE,,1\nd,failed,0,,broken,HE,,\n"
    )
    return folder


def test_tiles_of_a_slide(tmp_path: Path, anndata: Any) -> None:
    tiles = gigapath.read_features(slide_file(tmp_path, "s"))
    data = gigapath.to_anndata(str(tmp_path / "s.h5"))
    np.testing.assert_array_equal(data.X, tiles.features)
    np.testing.assert_array_equal(data.obs[["x", "y"]].to_numpy(), tiles.coords)
    np.testing.assert_array_equal(data.obs[["array_col", "array_row"]].to_numpy(), tiles.cells)
    np.testing.assert_array_equal(data.obsm["spatial"], tiles.coords + 256)  # the step is 512
    assert data.uns["gigapath"]["encoder"] == ENCODER and data.uns["gigapath"]["unit"] == "level-0 pixels"
    assert data.obs_names.is_unique and set(data.obs["slide_id"]) == {"s"}


def test_tiles_of_all_slides(tmp_path: Path, anndata: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("a", "b")):
        slide_file(tmp_path, name, tiles=20 + seed, seed=seed)
    data = gigapath.to_anndata(gigapath.read_features(tmp_path))
    assert data.shape == (41, 8) and data.obs["slide_id"].value_counts().to_dict() == {"a": 20, "b": 21}
    assert data.obs_names.is_unique and data.obsm["spatial"].shape == (41, 2)
    assert set(data.uns["spatial"]) == {"a", "b"} and data.uns["gigapath"]["encoder"] == ENCODER
    monkeypatch.setitem(__import__("sys").modules, "anndata", None)
    with pytest.raises(ImportError, match=r"gigapath\[anndata\]"):
        gigapath.to_anndata(tmp_path)


def test_slides_of_a_cohort_with_their_table(tmp_path: Path, anndata: Any) -> None:
    data = gigapath.to_anndata(run_folder(tmp_path), embedding="tile-mean")
    ids, vectors = gigapath.read_slides(tmp_path, "tile-mean")
    np.testing.assert_array_equal(data.X, vectors)
    assert list(data.obs_names) == ids == ["a", "b", "c"]
    assert data.obs["stain"].tolist()[0] == "HE" and data.obs["stain"].isna().tolist() == [False, True, False]
    assert data.obs["tiles"].tolist() == [5, 7, 6] and "tiles_per_s" in data.obs and "error" not in data.obs
    with pytest.raises(ValueError, match="tile-mean"):
        gigapath.to_anndata(tmp_path)


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
@pytest.mark.parametrize("of", ["tiles", "slides"])
def test_it_is_written_and_read_again(form: str, of: str, tmp_path: Path, anndata: Any) -> None:
    source = slide_file(tmp_path, "s") if of == "tiles" else run_folder(tmp_path)
    data = gigapath.to_anndata(source, embedding="tile-mean")
    getattr(data, f"write_{form}")(tmp_path / f"made.{form}")
    again = getattr(anndata, f"read_{form}")(tmp_path / f"made.{form}")
    np.testing.assert_array_equal(again.X, data.X)
    assert list(again.obs_names) == list(data.obs_names) and set(again.obs) == set(data.obs)
    assert again.uns["gigapath"] == data.uns["gigapath"]


@pytest.mark.slow
def test_scanpy_opens_it_and_gives_the_same_principal_components(tmp_path: Path) -> None:
    scanpy = pytest.importorskip("scanpy")
    tiles = gigapath.read_features(slide_file(tmp_path, "s", tiles=90))
    gigapath.to_anndata(tiles).write_h5ad(tmp_path / "s.h5ad")
    data = scanpy.read_h5ad(tmp_path / "s.h5ad")
    scanpy.pp.pca(data, n_comps=4)
    centered = tiles.features.astype(np.float64) - tiles.features.mean(axis=0, dtype=np.float64)
    left, strengths, _ = np.linalg.svd(centered, full_matrices=False)
    assert (np.abs(np.diff(strengths[:5])) > 0.05).all()  # so that the components have an order
    np.testing.assert_allclose(np.abs((left * strengths)[:, :4]), np.abs(data.obsm["X_pca"]), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_squidpy_finds_the_neighbours_on_the_grid(tmp_path: Path) -> None:
    squidpy = pytest.importorskip("squidpy")
    tiles = gigapath.read_features(slide_file(tmp_path, "s", tiles=90))
    data = gigapath.to_anndata(tiles)
    squidpy.gr.spatial_neighbors(data, coord_type="generic", radius=512 * 1.1, delaunay=False)
    cells = tiles.cells.astype(np.int64)
    beside = np.abs(cells[:, None] - cells[None]).sum(axis=2) == 1
    np.testing.assert_array_equal(data.obsp["spatial_connectivities"].toarray() > 0, beside)
