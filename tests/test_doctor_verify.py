"""`gigapath verify` on a small made release: it passes, and says what is wrong for each fault that is planted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from runpy import run_path
from typing import Any

import h5py
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from fake_weights import flash_tile_checkpoint, slide_checkpoint
from made_release import SLIDE_ARCH, WIDTH, made_release, record_demo
from made_slides import paint_tissue, write_pyramid
from PIL import Image

from gigapath import slide_encoder
from gigapath.cli.main import main
from gigapath.doctor import verify as verify_slide_encoder
from gigapath.doctor import verify_tile_encoder
from gigapath.doctor.options import VerifyOptions
from gigapath.doctor.verify import verdict
from gigapath.doctor.verify_tile_encoder import RIGHT, forms_of
from gigapath.embedding import slide_encoding as encoding
from gigapath.embedding.forward import encode_padded
from gigapath.files import sha256_of
from gigapath.findings import SKIPPED, Finding
from gigapath.preprocessing.slide import open_slide
from gigapath.preprocessing.tiling import TileOptions, plan_tiles
from gigapath.releases import RELEASES
from gigapath.slide_encoder import LongNetViT
from gigapath.tile_encoder import load_tile_encoder
from gigapath.tile_transform import TileTransform

ROOT = Path(__file__).parent.parent
AS_PUBLISHED = TileOptions(tissue="published", mpp_tolerance=0.2)


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a made release, which stands for `gigapath`; hashes are remembered in a cache of the test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "weights"
    folder.mkdir()
    return made_release(folder, monkeypatch)


def make_reference(
    folder: Path, *, arch: str = SLIDE_ARCH, width: int = WIDTH, precision: str = "fp32", out: Path | None = None
) -> Path:
    """`reference.npz` by our own script, in process."""
    script = run_path(str(ROOT / "scripts" / "make_reference.py"))
    file = (out or folder.parent) / "reference.npz"
    words = [str(folder / "slide_encoder.pth"), "--arch", arch, "--in-chans", str(width), "--device", "cpu"]
    script["main"]([*words, "--precision", precision, "--lengths", "1", "7", "150", "--out", str(file)])
    return file


def verify(folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    out = folder.parent / "verify.json"
    given = ["--weights", str(folder), "--demo-tile", str(folder), "--device", "cpu", "--out", str(out)]
    status = main(["verify", *given, *words])
    return status, json.loads(out.read_text())


def failures(report: dict[str, Any]) -> list[str]:
    return [f"{check['what']}: {check['said']}" for check in report["checks"] if check["status"] == "failed"]


@pytest.fixture
def reference(release: Path) -> Path:
    return make_reference(release)


def test_verify_passes_on_what_is_right_and_writes_a_table_to_paste(
    release: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = verify(release, "--reference", str(reference))
    assert (status, report["verdict"], failures(report)) == (0, "passed", [])
    passed = [check["what"] for check in report["checks"] if check["status"] == "passed"]
    assert passed == [
        "file pytorch_model.bin",
        "file slide_encoder.pth",
        "tile transform",
        "demo tile, fp32",
        "demo tile, bf16",
        "slide encoder's weights, one by one",
        "slide encoder, forward",
        "slide encoder, as embed runs it",
    ]
    assert "1, 7, 150 tiles, all states, both poolings (reference of gigapath-open, NOT of the" in report["table"]
    assert report["table"] in capsys.readouterr().out
    assert str(release.parent) not in json.dumps(report), "no path of this machine"


def test_verify_skips_what_is_not_at_hand(release: Path) -> None:
    (release / "images" / "prov_normal_000_1.pt").unlink()
    status, report = verify(release)
    assert status == 0
    skipped = {check["what"]: check["said"] for check in report["checks"] if check["status"] == "skipped"}
    assert set(skipped) == {"demo tile", "slide encoder", "PANDA"}
    assert (
        "images/prov_normal_000_1.png and images/prov_normal_000_1.pt of the published repository"
        in skipped["demo tile"]
    )
    assert verdict([Finding("x", "", state=SKIPPED)]) == "skipped"


# ------------------------------------------------------------------------------------------------ planted faults


def test_verify_names_a_crop_without_resize(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(self: TileTransform, tiles: Any, device: Any = "cpu") -> Any:
        return torch.from_numpy(np.stack([forms_of(tile)["a center crop without the resize"] for tile in tiles]))

    monkeypatch.setattr(TileTransform, "batch", batch)
    status, report = verify(release)
    assert status == 1
    said = "\n".join(failures(report))
    assert f"tile transform: expected {RIGHT}, got a center crop without the resize on a tile of 128 px." in said
    assert "the transform is at fault, not the weights" in said


def test_verify_names_bilinear_for_bicubic(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TileTransform._resized

    def bilinear(self: TileTransform, tiles: Any) -> Any:
        object.__setattr__(self, "interpolation", "bilinear")
        try:
            return original(self, tiles)
        finally:
            object.__setattr__(self, "interpolation", "bicubic")

    monkeypatch.setattr(TileTransform, "_resized", bilinear)
    status, report = verify(release)
    assert status == 1
    assert (
        f"tile transform: expected {RIGHT}, got a bilinear resize for the bicubic one on a tile" in failures(report)[0]
    )


@pytest.mark.parametrize("form", ["a center crop without the resize", "a bilinear resize for the bicubic one"])
def test_verify_names_the_form_of_another_vector(form: str, release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_tile_encoder(str(release / "pytorch_model.bin"))
    tile = np.asarray(Image.open(release / "images" / "prov_normal_000_1.png"))
    with torch.inference_mode():
        vector = encoder.model(torch.from_numpy(forms_of(tile)[form])[None])[0]
    torch.save(vector.clone(), release / "images" / "prov_normal_000_1.pt")
    record_demo(release, monkeypatch)
    status, report = verify(release)
    assert status == 1
    assert any(f"the released vector is that of {form}" in said for said in failures(report))


def swap_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LongNetViT.coords_to_pos
    monkeypatch.setattr(LongNetViT, "coords_to_pos", lambda self, c, t=256: original(self, c.flip(-1), t))


def sort_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    original, pooled = LongNetViT._embed, encoding.pooled_states

    def order(coords: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.lexsort((coords[:, 1].numpy(), coords[:, 0].numpy())))

    def embed(self: LongNetViT, x: torch.Tensor, coords: torch.Tensor, *rest: Any) -> Any:
        rows = order(coords[0])
        return original(self, x[:, rows], coords[:, rows], *rest)

    def states(model: LongNetViT, x: torch.Tensor, coords: torch.Tensor, *rest: Any) -> Any:
        rows = order(coords)
        return pooled(model, x[rows], coords[rows], *rest)

    monkeypatch.setattr(LongNetViT, "_embed", embed)
    monkeypatch.setattr(verify_slide_encoder, "pooled_states", states)


def class_for_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    def pool(self: LongNetViT, tokens: torch.Tensor, lengths: Any) -> torch.Tensor:
        return self.norm(tokens[:, 0])

    pooled = encoding.pooled_states

    def states(*given: Any) -> Any:
        of_states, default = pooled(*given)
        return of_states[:, [1, 1]], default[[1, 1]]

    monkeypatch.setattr(LongNetViT, "_pool", pool)
    monkeypatch.setattr(verify_slide_encoder, "pooled_states", states)


def state_11_for_12(monkeypatch: pytest.MonkeyPatch) -> None:
    pooled = encoding.pooled_states
    rows = [*range(12), 11]

    def states(*given: Any) -> Any:
        of_states, default = pooled(*given)
        return of_states[rows], default

    original = LongNetViT._embed

    def embed(self: LongNetViT, *given: Any) -> Any:
        found = original(self, *given)
        return slide_encoder.Embeddings(found[row] for row in rows) if len(found) == 13 else found

    monkeypatch.setattr(LongNetViT, "_embed", embed)
    monkeypatch.setattr(verify_slide_encoder, "pooled_states", states)


def half_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    original = slide_encoder.checked_coords
    monkeypatch.setattr(slide_encoder, "checked_coords", lambda c, *given: original(c.half(), *given))


PLANTED = {
    "x and y are swapped": swap_axes,
    "the tiles are in column order, expected row by row": sort_by_column,
    "the class token is taken for the mean over the tiles": class_for_mean,
    "state 12 of ours is state 11 of the reference": state_11_for_12,
    "coordinates are rounded to half precision": half_coordinates,
}


@pytest.mark.parametrize("words", PLANTED)
def test_verify_names_a_fault_of_the_slide_encoder(
    words: str, release: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLANTED[words](monkeypatch)
    status, report = verify(release, "--reference", str(reference))
    assert status == 1
    found = failures(report)
    assert [said.split(":")[0] for said in found] == ["slide encoder, forward", "slide encoder, as embed runs it"]
    assert all(words in said for said in found), found


@pytest.mark.parametrize("words", PLANTED)
@pytest.mark.slow
def test_verify_names_a_fault_of_the_reference(words: str, release: Path) -> None:
    with pytest.MonkeyPatch.context() as planted:
        PLANTED[words](planted)
        file = make_reference(release, precision="bf16" if words.startswith("x and") else "fp32")
    status, report = verify(release, "--reference", str(file))
    assert status == 1
    words = words.replace("of ours is state 11 of the reference", "of the reference is state 11 of ours")
    found = failures(report)
    assert len(found) == 2
    assert all(words in said for said in found), found


@pytest.mark.parametrize("name", ["encoder.layers.3.ffn.fc1.weight", "cls_token"])
def test_verify_names_one_altered_weight(name: str, release: Path, reference: Path) -> None:
    content = torch.load(release / "slide_encoder.pth", weights_only=True)
    content["model"][name].view(-1)[5] += 0.5
    torch.save(content, release / "slide_encoder.pth")
    status, report = verify(release, "--reference", str(reference))
    assert status == 1
    found = failures(report)
    assert found[0].startswith("file slide_encoder.pth: expected sha256")
    assert "altered or not the release" in found[0]
    assert found[1].startswith(f"slide encoder's weights, one by one: {name} of 247 differ from the reference's")
    assert "the altered weights explain it" in found[2]


def test_verify_says_when_the_tile_encoders_file_is_altered(release: Path) -> None:
    state = torch.load(release / "pytorch_model.bin", weights_only=True)
    state["blocks.0.mlp.fc2.weight"].mul_(-1)
    torch.save(state, release / "pytorch_model.bin")
    status, report = verify(release)
    found = failures(report)
    assert status == 1
    assert found[0].startswith("file pytorch_model.bin: expected sha256")
    assert "no known slip of the transform explains it: the weights or the encoder differ" in found[1]


def test_verify_of_flash_needs_no_demo_tile(release: Path) -> None:
    """Files of another release fail by their hashes, and the demo tile is no business of Flash."""
    status, report = verify(release, "--tile-encoder", "gigapath-flash")
    assert status == 1
    assert len(failures(report)) == 2
    assert {c["what"]: c["said"] for c in report["checks"]}["demo tile"] == "no vector was released for gigapath-flash."


def test_verify_checks_what_a_folder_holds_and_says_what_it_lacks(release: Path, reference: Path) -> None:
    (release / "pytorch_model.bin").unlink()
    status, report = verify(release, "--reference", str(reference))
    said = {check["what"]: (check["status"], check["said"]) for check in report["checks"]}
    assert status == 0 and said["file pytorch_model.bin"] == ("skipped", "not in the folder of --weights.")
    assert said["demo tile"] == ("skipped", "no tile encoder.")
    assert said["slide encoder, forward"][0] == "passed"


def test_verify_fails_a_damaged_file_and_goes_on(release: Path, reference: Path) -> None:
    (release / "pytorch_model.bin").write_bytes((release / "pytorch_model.bin").read_bytes()[:1000])
    status, report = verify(release, "--reference", str(reference))
    assert status == 1
    hashed, loaded = failures(report)
    assert hashed.startswith("file pytorch_model.bin: expected sha256")
    assert loaded.startswith("tile encoder: ") and "cut off or damaged" in loaded
    assert "slide encoder, forward" in [check["what"] for check in report["checks"] if check["status"] == "passed"]


def test_verify_passes_no_answer_that_is_not_a_number(release: Path, reference: Path) -> None:
    with np.load(reference) as archive:
        arrays = dict(archive)
    arrays["150/states_mean"][5, 3] = np.nan
    np.savez(reference, **arrays)
    (release / "pytorch_model.bin").unlink()
    status, report = verify(release, "--reference", str(reference))
    assert status == 1
    assert [said.split(": ", 1)[1] for said in failures(report)] == [
        "150 tiles: numbers in the reference are NaN or infinite."
    ] * 2


def test_verify_refuses_wrong_words_before_it_computes(
    release: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gigapath.doctor.verify.remembered_sha256", None)
    for words, sentence in (
        (["--panda", str(tmp_path), str(tmp_path / "none")], "--panda: expected a folder"),
        (["--panda", str(tmp_path), str(tmp_path)], "found none in common"),
        (["--reference", str(reference), "--tile-encoder", "gigapath-flash"], "one of gigapath_slide_enc12l384d"),
        (["--out", str(tmp_path)], "expected a file, got a folder"),
    ):
        assert main(["verify", "--weights", str(release), *words]) == 1
        assert sentence in capsys.readouterr().err


def test_reference_of_another_kind_is_refused(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.npz").write_text("text")
    np.savez(tmp_path / "empty.npz", facts='{"arch": "gigapath_slide_enc12l384d", "cases": []}', weights="{}")
    for name in ("x.npz", "empty.npz"):
        assert main(["verify", "--weights", str(release), "--reference", str(tmp_path / name)]) == 1
        assert f"got {name}, which is none" in capsys.readouterr().err
    assert main(["verify", "--weights", str(tmp_path / "none")]) == 1
    with pytest.raises(ValueError, match="two folders"):
        VerifyOptions(panda=("one",))


# ------------------------------------------------------------------------------------------------ PANDA


@pytest.fixture
def official(release: Path) -> Path:
    """A folder with `slides/` and `h5/`: one slide and its features, as the published tiling writes them."""
    folder = release.parent
    for name in ("slides", "h5"):
        (folder / name).mkdir()
    path = write_pyramid(
        folder / "slides" / "0123abcd.tif", paint_tissue(1500, 1100), mpp=(0.48, 0.48), compression="deflate"
    )
    encoder = load_tile_encoder(str(release / "pytorch_model.bin"))
    with open_slide(path) as slide:
        plan = plan_tiles(slide, AS_PUBLISHED)
        corners = plan.tiles.coords_level0 + np.array([40, -24])
        size = plan.tiles.read_size
        tiles = [slide.read(*corner, plan.tiles.level, *size) for corner in corners.tolist()]
    features = np.concatenate([encode_padded(tile[None], encoder, 4) for tile in tiles])
    assert len(features) > 8
    assert np.abs(features[0] - features[-1]).max() > 1e-3
    box = plan.mask.box_level0
    assert box is not None
    offset = (box[1] - box[0], box[0] - box[1])
    with h5py.File(folder / "h5" / "0123abcd.h5", "w") as file:
        file["features"], file["coords"] = features, (corners + offset).astype(np.float32)
    return folder


def run_panda(folder: Path) -> tuple[int, dict[str, Any]]:
    return verify(folder / "weights", "--panda", str(folder / "h5"), str(folder / "slides"))


def rewrite(folder: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(folder / "h5" / "0123abcd.h5", "r+") as file:
        change(file)


def test_verify_panda_finds_tiles_at_their_places(official: Path) -> None:
    status, report = run_panda(official)
    check = report["checks"][-1]
    assert (status, check["what"], check["status"]) == (0, "PANDA 0123abcd", "passed"), check["said"]
    assert "median cosine 1.0000 at coordinates with the published offset by the tissue box undone" in check["said"]
    assert check["facts"]["official tiles"] == check["facts"]["our tiles"]


def test_verify_panda_names_swapped_coordinates(official: Path) -> None:
    with open_slide(official / "slides" / "0123abcd.tif") as slide:
        box = plan_tiles(slide, AS_PUBLISHED).mask.box_level0
    assert box is not None

    def swap(file: h5py.File) -> None:
        file["coords"][...] = (file["coords"][()] + (box[0] - box[1], box[1] - box[0]))[:, ::-1]

    rewrite(official, swap)
    status, report = run_panda(official)
    assert status == 1
    assert "x and y are swapped in the file, or here" in report["checks"][-1]["said"]


def test_verify_panda_names_features_of_another_encoder_of_the_same_width(official: Path) -> None:
    def name(file: h5py.File) -> None:
        file["features"].attrs["encoder"] = "uni_v2"

    def exchange(file: h5py.File) -> None:
        del file["features"].attrs["encoder"]
        file["features"][...] = np.random.default_rng(0).normal(size=file["features"].shape)

    rewrite(official, name)
    status, report = run_panda(official)
    assert status == 1
    said = "expected features of gigapath, got those of 'uni_v2', whatever their width."
    assert report["checks"][-1]["said"] == said
    rewrite(official, exchange)
    status, report = run_panda(official)
    assert status == 1
    assert "these are features of another encoder than gigapath, or of other slides" in report["checks"][-1]["said"]


def test_verify_panda_counts_official_tiles(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify_tile_encoder.OFFICIAL_COUNTS, "0123abcd", 3)
    _, report = run_panda(official)
    assert report["checks"][-1]["said"].startswith("expected 3 tiles in the official file, got ")


# ------------------------------------------------------------------------------------------------ pieces


@pytest.mark.slow
def test_verify_passes_on_the_released_architecture_of_flash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference in bfloat16 passes, and the least visible slip shows in it all the same."""
    folder = flash_tile_checkpoint().parent
    hashes = {"tile_sha256": sha256_of(flash_tile_checkpoint()), "slide_sha256": sha256_of(slide_checkpoint())}
    monkeypatch.setitem(RELEASES, "gigapath-flash", replace(RELEASES["gigapath-flash"], **hashes))
    file = make_reference(folder, arch="gigapath_slide_enc12l384d", width=384, precision="bf16", out=tmp_path)
    words = ["--tile-encoder", "gigapath-flash", "--weights", str(folder), "--reference", str(file), "--device", "cpu"]
    out = tmp_path / "verify.json"
    assert main(["verify", *words, "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert sum(check["status"] == "passed" for check in report["checks"]) == 5
    half_coordinates(monkeypatch)
    assert main(["verify", *words, "--out", str(out)]) == 1
    found = failures(json.loads(out.read_text()))
    assert len(found) == 2
    assert all("coordinates are rounded to half precision" in said for said in found), found


@pytest.mark.slow
def test_demo_shows_what_moves_an_embedding(capsys: pytest.CaptureFixture[str]) -> None:
    demo = run_path(str(ROOT / "demo" / "what_moves_an_embedding.py"))
    lines = demo["main"](["--tiles", "60"])
    assert "RANDOM weights (never trained), 60 made tiles" in lines[0]
    moved = {row.split(" | ")[0][2:]: float(row.split(" | ")[2].rstrip(" |")) for row in lines[4:]}
    assert moved.pop("precision: float64 instead of float32") < 1e-5
    assert len(moved) == 11
    assert min(moved.values()) > 1e-4, moved
    assert capsys.readouterr().out.splitlines() == lines


def test_seeded_inputs_of_script_and_package_are_one() -> None:
    script = run_path(str(ROOT / "scripts" / "make_reference.py"))
    x, coords = verify_slide_encoder.made_inputs(2, 150, WIDTH)
    assert [array.tobytes() for array in script["made_inputs"](2, 150, WIDTH)] == [x.tobytes(), coords.tobytes()]
    assert (coords % 256 == 255).all()
    assert (np.diff(coords[:, 1] * 1e6 + coords[:, 0]) > 0).all(), "row by row"
    assert coords.max() > 16384, "where half precision rounds into the next cell"
    assert (coords.astype(np.float16) // 256 != coords // 256).any()
    assert np.isfinite(coords.astype(np.float16)).all()
