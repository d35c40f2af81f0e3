"""What is trained of an encoder: adapters by peft, the last blocks, the head alone; and what such a run leaves."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_cohort import NARROW, write_cohort, write_splits, write_task
from narrow_longnet import made_tiles, narrow_model

from gigapath.cli.main import main
from gigapath.finetune import Inputs, ModelOptions, Settings, TrainingOptions, finetune, load_head
from gigapath.finetune.heads import adapt, merge
from gigapath.slide_encoder import LongNetViT, create_model

NEEDS_PEFT = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
LORA = ModelOptions(model_arch=NARROW, feat_layer="2-3", dropout=0.0, adapt="lora", lora_rank=2)


def adapted(**changes) -> LongNetViT:
    """A narrow encoder with adapters that do something."""
    model = narrow_model()
    adapt(model, replace(LORA, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def trained_of(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@NEEDS_PEFT
def test_adapters_lie_on_the_attention_and_the_ffn_of_every_layer() -> None:
    names = trained_of(adapted())
    layers = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")] + ["ffn.fc1", "ffn.fc2"]
    parts = [f"{name}.lora_{part}.default.weight" for name in layers for part in "AB"]
    assert names == {f"encoder.layers.{layer}.{part}" for layer in range(2) for part in parts}
    model = create_model("", "gigapath_slide_enc12l768d", 1536)
    before = sum(p.numel() for p in model.parameters())
    adapt(model, ModelOptions(adapt="lora"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 12 * 8 * (4 * (768 + 768) + 2 * (768 + 3072))
    assert trained / before == pytest.approx(0.0154, abs=1e-4)


@NEEDS_PEFT
def test_merged_equals_unmerged_in_every_form_of_the_call() -> None:
    """Inference without autograd runs in place where nothing is replaced: with adapters it must not pass them by."""
    x, coords = made_tiles(2, 60)
    model, plain = adapted(), narrow_model()
    watched = torch.stack(list(model(x, coords, all_layer_embed=True))).detach()
    with torch.no_grad():
        before = torch.stack(list(plain(x, coords, all_layer_embed=True)))
        unmerged = torch.stack(list(model(x, coords, all_layer_embed=True)))
        merge(model)
        merged = torch.stack(list(model(x, coords, all_layer_embed=True)))
    scale = merged.abs().max()
    assert (merged - before).abs().max() > 0.1 * scale
    for other in (watched, unmerged):
        assert (merged - other).abs().max() <= 1e-5 * scale
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_the_last_blocks_are_those_next_to_the_head() -> None:
    model = create_model("", NARROW, 8)
    adapt(model, ModelOptions(adapt="last", last_blocks=1))
    kinds = {name.rsplit(".", 1)[0].removeprefix("encoder.") for name in trained_of(model)}
    assert {name.split(".ffn")[0] for name in kinds if name.startswith("layers.2.ffn")} == {"layers.2"}
    assert not any(name.startswith(("layers.0", "layers.1", "patch_embed")) for name in kinds) and "norm" in kinds


def test_freeze_is_the_former_spelling_of_the_head_alone(capsys) -> None:
    assert ModelOptions(freeze=True) == ModelOptions(adapt="head")
    with pytest.raises(ValueError, match="--freeze"):
        ModelOptions(freeze=True, adapt="lora")
    assert main(["finetune", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert "--adapt" in shown and "--freeze" not in shown


def from_weights(folder: Path) -> Inputs:
    """Six slides of each of three classes; a slide encoder of some weights."""
    features, labels = write_cohort(folder, [n % 3 for n in range(18)])
    thirds = [range(start, start + 6) for start in (0, 6, 12)]
    splits = write_splits(folder / "splits", (thirds[0], thirds[1], thirds[2]))
    torch.manual_seed(5)
    torch.save({"model": create_model("", NARROW, 8).state_dict()}, folder / "start.pth")
    return Inputs(
        str(write_task(folder / "t.yaml")), str(features), str(labels), str(splits), str(folder / "start.pth")
    )


def settings(model: ModelOptions = LORA, **training) -> Settings:
    recipe = {"epochs": 3, "gradient_accumulation": 2, "base_lr": 2.0, "replicates": 5, "device": "cpu", **training}
    return Settings(model=model, training=TrainingOptions(**recipe))


@NEEDS_PEFT
@pytest.mark.parametrize("head", ["linear", "abmil"])
def test_a_run_with_adapters_leaves_ordinary_weights(tmp_path, monkeypatch, head) -> None:
    inputs, how = from_weights(tmp_path), settings(replace(LORA, head=head, lora_dropout=0.1), select="val")
    assert list(finetune(inputs, tmp_path / "whole", how).evaluations) == ["fine-tuned"]
    monkeypatch.setitem(sys.modules, "peft", None)  # neither needs the library
    held = load_head(tmp_path / "whole" / "fold_0").model.state_dict()
    alone = create_model(str(tmp_path / "whole" / "fold_0" / "slide_encoder"), NARROW, 8).state_dict()
    start = torch.load(inputs.pretrained)["model"]
    moved = {name for name in start if not torch.equal(start[name], alone[name])}
    assert moved == {name for name in start if name.endswith(("_proj.weight", "fc1.weight", "fc2.weight"))}
    assert all(torch.equal(alone[name], held[f"slide_encoder.{name}"]) for name in alone)


def test_what_cannot_be_adapted_is_told_before_the_run(tmp_path, monkeypatch, capsys) -> None:
    inputs = from_weights(tmp_path)
    if importlib.util.find_spec("peft") is not None:
        with pytest.raises(ValueError, match="--adapt lora: expected weights"):
            finetune(replace(inputs, pretrained=""), tmp_path / "out", settings())
    with pytest.raises(ValueError, match="abmil-tiles"):
        replace(LORA, head="abmil-tiles")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gigapath\[lora\]"):
        finetune(inputs, tmp_path / "out", settings())
    assert not (tmp_path / "out").exists()


@NEEDS_PEFT
def test_features_of_any_width_train_a_longnet_from_scratch_and_from_a_checkpoint(tmp_path, capsys) -> None:
    """The width comes from the files; what was trained on features of an encoder goes on as `--pretrained`, which
    takes those of no other width."""
    features, labels = write_cohort(tmp_path, [n % 2 for n in range(18)], width=13)
    task = write_task(tmp_path / "t.yaml", classes=2)
    words = ["finetune", "--task", str(task), "--features", str(features), "--labels", str(labels), "--feat-layer", "2"]
    words += ["--folds", "3", "--epochs", "1", "--gradient-accumulation", "4", "--replicates", "0", "--device", "cpu"]
    words += ["--model-arch", "gigapath_slide_enc2l32d", "--out"]
    assert main([*words, str(tmp_path / "scratch"), "--pretrained", ""]) == 0
    torch.manual_seed(1)
    create_model("", "gigapath_slide_enc2l32d", 13).save_pretrained(tmp_path / "own")
    pretrained = ["--pretrained", str(tmp_path / "own")]
    assert main([*words, str(tmp_path / "tuned"), *pretrained, "--adapt", "lora", "--lora-rank", "2"]) == 0
    tuned = LongNetViT.from_pretrained(tmp_path / "tuned" / "fold_0" / "slide_encoder")
    assert tuned.in_chans == 13 and load_head(tmp_path / "scratch" / "fold_0").input_dim == 13
    other, _ = write_cohort(tmp_path / "other", [n % 2 for n in range(18)])
    words[words.index(str(features))] = str(other)
    capsys.readouterr()
    assert main([*words, str(tmp_path / "refused"), *pretrained]) == 1
    assert "--features: expected embeddings of width 13" in capsys.readouterr().err
