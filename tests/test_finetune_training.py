"""The recipe: one step against plain code, packed = accumulated, a run that goes on, precision, calibration, heads."""

import contextlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from made_cohort import NARROW, made_bag
from weights_recipe import fill

from gigapath.devices import computing
from gigapath.evaluation.calibration import decisions, fit_calibration, probabilities
from gigapath.evaluation.labels import Task
from gigapath.evaluation.splits import Fold
from gigapath.files import OutputError
from gigapath.finetune import training
from gigapath.finetune.data import Bag
from gigapath.finetune.heads import GatedAttention, build_head, pack
from gigapath.finetune.loop import Processes, set_rates, training_precision
from gigapath.finetune.options import ModelOptions, TrainingOptions
from gigapath.finetune.training import Trainer, task_loss

TASK = Task("made", "multi_class", ("a", "b", "c"))
MODEL = ModelOptions(model_arch=NARROW, feat_layer="1-2", dropout=0.0)
CPU = Processes(torch.device("cpu"))
WIDTH = 8


def bags_of(count: int, *, seed: int = 0) -> tuple[list[Bag], np.ndarray]:
    """Slides of several lengths and their labels."""
    random = np.random.default_rng(seed)
    truth = np.arange(count) % 3
    made = [made_bag(int(label), random, tiles=5 + number % 4) for number, label in enumerate(truth)]
    return [Bag(features, cells * 256) for features, cells in made], truth


def trainer_of(bags: list[Bag], truth: np.ndarray, *, dtype=torch.float32, processes=CPU, **options) -> Trainer:
    recipe = TrainingOptions(**{"epochs": 2, "gradient_accumulation": 4, "workers": 1, **options})
    return Trainer(TASK, bags, truth, recipe, "fp32", processes, dtype=dtype)


def narrow(dtype=torch.float32, **changes) -> torch.nn.Module:
    model = build_head(replace(MODEL, **changes), TASK, pretrained="", input_dim=WIDTH)
    return fill(model).to(dtype)


def fold_of(count: int, val: int = 0) -> Fold:
    rows = np.arange(count)
    return Fold(0, rows[val:], rows[:val], rows[:0])


def test_one_step_is_the_step_that_the_recipe_describes(tmp_path) -> None:
    """AdamW with decoupled decay, bias-corrected moments, rates by layer, written out from the recipe's words."""
    bags, truth = bags_of(6)
    options = {"epochs": 1, "warmup_epochs": 0.0, "gradient_accumulation": 6, "base_lr": 0.4, "weight_decay": 0.05}
    trainer = trainer_of(bags, truth, dtype=torch.float64, file_order=True, **options)
    model, plain = narrow(torch.float64), narrow(torch.float64)
    loss = 0.0
    for row in range(6):  # cross-entropy of each slide by itself, averaged over the step
        logits = plain(torch.from_numpy(bags[row].features).double(), torch.from_numpy(bags[row].coords))
        loss = loss + F.cross_entropy(logits, torch.tensor([int(truth[row])])) / 6
    loss.backward()
    depth, rate = 3, 0.4 * 6 / 256  # base rate times the slides of a step over 256; the cosine starts at its top
    expected = {}
    for name, parameter in plain.named_parameters():
        inside = name.removeprefix("slide_encoder.")
        if inside.startswith(("cls_token", "patch_embed")):
            exponent = depth + 1
        elif inside.startswith("encoder.layers."):
            exponent = depth - int(inside.split(".")[2])
        else:
            exponent = 0
        if parameter.grad is None:
            expected[name] = parameter.detach().clone()
            continue
        step = rate * 0.95**exponent
        decayed = parameter.detach() * (1 - step * (0.05 if parameter.ndim > 1 else 0.0))
        first = (1 - 0.9) * parameter.grad / (1 - 0.9)
        second = (1 - 0.999) * parameter.grad**2 / (1 - 0.999)
        expected[name] = decayed - step * first / (second.sqrt() + 1e-8)
    trainer.train(model, fold_of(6), tmp_path, {})
    assert not torch.equal(model.classifier[0].weight, narrow(torch.float64).classifier[0].weight)
    for name, parameter in model.named_parameters():
        assert (parameter - expected[name]).abs().max() < 1e-12, name


def test_training_takes_at_most_max_tiles_of_a_slide_and_as_many_slides_of_each_class() -> None:
    bags, truth = bags_of(4)
    trainer = replace(trainer_of(bags, truth), task=replace(TASK, max_tiles=3))
    first, again, later = ({tuple(cell) for cell in trainer._drawn(bags[3], 3, epoch).coords} for epoch in (0, 0, 1))
    assert len(first) == 3 and first == again != later and first < {tuple(cell) for cell in bags[3].coords}
    model = narrow().eval()
    expected = model.forward_packed(*pack([bags[3]], CPU.device))  # of all tiles
    assert np.abs(trainer.logits(model, np.array([3]))[0] - expected.detach().numpy()[0]).max() < 1e-6
    rows, truth = np.arange(400), np.array([0] * 300 + [1] * 20 + [2] * 80)
    plain, balanced = trainer_of([], truth), trainer_of([], truth, balanced=True)
    assert sorted(plain.order(rows, 0)) == list(rows) and not np.array_equal(plain.order(rows, 0), plain.order(rows, 1))
    drawn = np.bincount(truth[balanced.order(rows, 0)], minlength=3)
    assert drawn.sum() == 400 and (np.abs(drawn - 133) < 40).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("head", ["linear", "abmil", "abmil-tiles"])
def test_batches_that_are_packed_ahead_give_the_same_gradients_to_the_bit(head: str, precision: str) -> None:
    bags, truth = bags_of(6)
    trainer = replace(trainer_of(bags, truth, batch_size=3), precision=precision)
    model, rows = narrow(head=head, dropout=0.1).train(), np.array([4, 0, 3])
    dtype = trainer.input_dtype(model, 0)
    assert model.training and dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    packed, same_rows = trainer.read(rows, 0, dtype)
    drawn = [trainer._drawn(bags[row], int(row), 0) for row in rows]
    assert packed.features.dtype == dtype and packed.lengths == [len(bag) for bag in drawn]
    found = []
    for batch in ((packed, same_rows), (drawn, rows)):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        loss = trainer.loss_of(model, batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 3 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rates_warm_up_and_fall_along_half_a_cosine() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([{"params": [parameter], "lr_scale": 0.5}])
    recipe = TrainingOptions()
    top = 0.002 * 32 / 256
    assert recipe.learning_rate(32) == top == 2.5e-4
    expected = {0: 0, 0.25: top / 4, 1: top, 3: 1e-6 + (top - 1e-6) / 2, 5: 1e-6}
    for epochs_done, rate in expected.items():
        assert set_rates(optimizer, recipe.learning_rate(32), recipe, epochs_done) == pytest.approx(rate)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate / 2)


def gradients_of_step(model, trainer: Trainer, step: np.ndarray) -> dict[str, torch.Tensor]:
    """The gradients that the optimizer sees in one step, over all processes."""
    model.zero_grad(set_to_none=True)
    chunks = np.split(step, range(trainer.options.batch_size, len(step), trainer.options.batch_size))
    chunks = chunks[trainer.processes.rank :: trainer.processes.world]
    batches = [([trainer.bags[int(row)] for row in rows], rows) for rows in chunks]
    trainer.loop.add_gradients(model, batches, trainer.loss_of, len(step))
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Within 1e-5 of each tensor's largest entry.

    A constant added to all keys changes a softmax only by way of the zero keys, so the gradient of `k_proj.bias` is
    what is left of terms that cancel, or nothing: it is held against the largest entry of its layer's weight.
    """
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name, gradient in ours.items():
        of = name.replace("k_proj.bias", "k_proj.weight")
        assert (gradient - theirs[name]).abs().max() <= 1e-5 * theirs[of].abs().max(), name


@pytest.mark.parametrize("head", ["linear", "abmil", "abmil-tiles"])
def test_packed_slides_give_the_gradients_of_the_slides_one_by_one(head) -> None:
    bags, truth = bags_of(8)
    model = narrow(head=head).train()
    packed, singly = (gradients_of_step(model, trainer_of(bags, truth, batch_size=n), np.arange(8)) for n in (8, 1))
    assert_same_gradients(packed, singly)
    other = gradients_of_step(model, trainer_of(bags, truth), np.arange(7))
    assert any((packed[name] - other[name]).abs().max() > 1e-2 * packed[name].abs().max() for name in packed)


def test_checkpointed_activations_train_to_the_same_bits_and_keep_less(tmp_path, head="abmil") -> None:
    """With dropout and drop-path, whose draws the second forward pass must repeat; slides packed, two epochs."""
    bags, truth = bags_of(8)
    recipe = {"batch_size": 2, "gradient_accumulation": 2, "warmup_epochs": 0.0, "base_lr": 0.3}
    ends, kept = {}, {}
    for name, enable in (("kept", False), ("again", True)):
        model = narrow(head=head, dropout=0.2, drop_path_rate=0.1, checkpoint_activations=enable)
        trainer = trainer_of(bags, truth, **recipe)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: to.append(t.numel()) or t, lambda t: t):
            trainer.loss_of(model.train(), ([bags[row] for row in range(4)], np.arange(4)))
        kept[name] = sum(sizes)
        trainer.train(model, fold_of(8), tmp_path / name, {})
        ends[name] = model.state_dict()
    start = narrow(head=head).state_dict()
    assert max((ends["again"][key] - start[key]).abs().max() for key in start) > 1e-3
    assert all(torch.equal(tensor, ends["kept"][key]) for key, tensor in ends["again"].items())
    assert kept["again"] < kept["kept"] / 2


@pytest.mark.parametrize("select", ["last", "val"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, select) -> None:
    class Killed(Exception):
        pass

    bags, truth = bags_of(15)
    options = {"epochs": 4, "base_lr": 0.3, "select": select, "balanced": True}
    whole = narrow(dropout=0.2, drop_path_rate=0.1)
    unbroken = trainer_of(bags, truth, **options).train(whole, fold_of(15, val=3), tmp_path / "whole", {"a": 1})
    windows = 0

    def stop_in_the_third_epoch() -> None:
        nonlocal windows
        windows += 1
        if windows == 3 * 2 * 3:  # training and validation slides of two epochs are behind
            raise Killed

    broken = replace(trainer_of(bags, truth, **options), check_stop=stop_in_the_third_epoch)
    with pytest.raises(Killed):
        broken.train(narrow(dropout=0.2, drop_path_rate=0.1), fold_of(15, val=3), tmp_path / "broken", {"a": 1})
    torch.rand(7)  # whatever ran in between
    resumed = narrow(dropout=0.2, drop_path_rate=0.1)
    assert 1 <= json.loads((tmp_path / "broken" / "checkpoint.json").read_text())["epoch"] < 4
    history = trainer_of(bags, truth, **options).train(resumed, fold_of(15, val=3), tmp_path / "broken", {"a": 1})
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[key]), key
    assert [entry.train_loss for entry in history] == [entry.train_loss for entry in unbroken]
    assert [entry.val_loss for entry in history] == [entry.val_loss for entry in unbroken]
    with pytest.raises(ValueError, match="another run"):
        trainer_of(bags, truth, **options).train(resumed, fold_of(15), tmp_path / "broken", {"a": 2})
    assert len(list((tmp_path / "broken").iterdir())) == 2


def test_full_disk_while_saving_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch) -> None:
    from safetensors import SafetensorError

    def full(tensors, path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    bags, truth = bags_of(6)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OutputError, match=r"checkpoint-1\.safetensors") as caught:
        trainer_of(bags, truth).train(narrow(), fold_of(6), tmp_path, {})
    assert caught.value.stops_run and list(tmp_path.iterdir()) == []


def test_loss_that_is_not_finite_stops_the_run(tmp_path) -> None:
    bags, truth = bags_of(6)
    model = narrow()
    with torch.no_grad():
        model.classifier[0].bias[0] = math.inf
    with pytest.raises(ValueError, match=r"not finite.*--base-lr"):
        trainer_of(bags, truth).train(model, fold_of(6), tmp_path, {})


def test_mixed_precision_trains_close_to_fp32(tmp_path) -> None:
    bags, truth = bags_of(8)
    losses = []
    for name in ("fp32", "bf16", "fp16"):
        trainer = replace(trainer_of(bags, truth, epochs=1, base_lr=0.1), precision=name)
        losses.append(trainer.train(narrow(), fold_of(8), tmp_path / name, {})[0].train_loss)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=0.02) and len(set(losses)) == 3


def test_death_of_another_process_is_one_sentence(monkeypatch) -> None:
    def closed(*arguments: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("torch.distributed.all_reduce", closed)
    monkeypatch.setattr("torch.distributed.all_gather_object", closed)
    two = Processes(torch.device("cpu"), 0, 2)
    for call in (lambda: two.gather(1), lambda: two.sum(torch.ones(1))):
        with pytest.raises(ConnectionError, match="the same command goes on"):
            call()


def test_auto_precision_follows_the_launcher_and_the_device(monkeypatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert training_precision("auto", cpu) == "fp32" and training_precision("bf16", cpu) == "bf16"
    for word, precision in (("bf16", "bf16"), ("fp16", "fp16"), ("no", "fp32")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", word)
        assert training_precision("auto", cpu) == precision
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert training_precision("auto", torch.device("cuda", 0)) == "fp16", "a GPU that only emulates bfloat16"
    with computing("bf16", cpu):
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16


def test_loss_of_several_labels_is_the_mean_binary_one() -> None:
    logits, truth = torch.tensor([[0.5, -1.0], [2.0, 0.1]]), torch.tensor([[1, 0], [0, 1]])
    p = torch.sigmoid(logits)
    expected = -(truth * p.log() + (1 - truth) * (1 - p).log()).mean(dim=1).sum()
    assert float(task_loss(logits, truth.numpy(), Task("two", "multi_label", ("x", "y")))) == pytest.approx(
        float(expected)
    )


def test_gated_attention_is_the_published_formula() -> None:
    torch.manual_seed(0)
    pool = GatedAttention(6).double()
    tiles = torch.randn(7, 6, dtype=torch.float64)
    scores = pool.scores(torch.tanh(pool.values(tiles[:5])) * torch.sigmoid(pool.gates(tiles[:5])))
    expected = (torch.softmax(scores, 0) * tiles[:5]).sum(0)
    pooled = pool(tiles, [5, 2])
    assert pooled.shape == (2, 6) and (pooled[0] - expected).abs().max() < 1e-6


def test_frozen_encoder_stays_in_eval_mode_and_keeps_its_weights() -> None:
    model = narrow(freeze=True, head="abmil", dropout=0.5).train()
    assert model.training and not model.slide_encoder.training
    assert sum(len(group["params"]) for group in model.parameter_groups(1.0, 0.05, 0.95)) == 7  # of gate and classifier


def test_linear_control_is_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 60)
    vectors = random.standard_normal((60, 5)) * 3 + 7 + truth[:, None]
    layer = training.fit_linear(vectors, 3, lambda logits: task_loss(logits, truth, TASK))
    scaled = (vectors - vectors.mean(0)) / vectors.std(0)
    theirs = LogisticRegression(C=1.0, tol=1e-12, max_iter=5000).fit(scaled, truth).predict_proba(scaled)
    ours = torch.softmax(layer(torch.from_numpy(vectors)), dim=1).detach().numpy()
    assert np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize(("processes", "slides"), [(1, 8), (2, 8), (4, 8), (16, 16)])
def test_control_of_abmil_steps_alike_over_any_number_of_processes(processes, slides) -> None:
    recipe = training.abmil_options(TrainingOptions(batch_size=4, select="val"), processes)
    window = recipe.batch_size * recipe.gradient_accumulation * processes
    assert window == slides and recipe.learning_rate(window) == pytest.approx(2e-4) and recipe.epochs == 20


def test_calibration_finds_the_temperature_and_the_threshold() -> None:
    random = np.random.default_rng(0)
    logits = random.standard_normal((4000, 3)) * 1.5
    truth = np.array([random.choice(3, p=row) for row in probabilities(logits, TASK)])
    how = fit_calibration(logits * 3, truth, TASK)  # three times too sure
    assert how.temperature == pytest.approx(3, rel=0.1) and how.thresholds == () and how.fitted_on == "val"
    binary = Task("two", "binary", ("no", "yes"))
    said = np.array([0.05, 0.1, 0.2, 0.25])
    pair = np.stack([np.log(1 - said), np.log(said)], axis=1)
    how = fit_calibration(pair, np.array([0, 0, 1, 1]), binary)
    assert decisions(probabilities(pair, binary, how.temperature), binary, how) == ["no", "no", "yes", "yes"]
    several = Task("labels", "multi_label", ("x", "y"))
    logits = np.array([[800.0, -800.0], [0.0, 0.0]])
    assert np.array_equal(probabilities(logits, several), [[1, 0], [0.5, 0.5]])


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path) -> None:
    """gloo on the CPU, four slides a process, against eight in one; gradients in float32, the end in float64.

    One pair is started by torchrun, the other by `accelerate launch` as the guide has it.
    """
    script = Path(__file__).with_name("distributed_step.py")
    torchrun = ["torch.distributed.run", "--master-port=29517", "--nproc-per-node"]
    accelerate = ["accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no"]
    accelerate += ["--dynamo_backend=no", "--main_process_port=29518", "--num_processes"]
    shares = {"one": (torchrun, 1, 8, 1), "two": (torchrun, 2, 4, 1), "two one by one": (accelerate, 2, 1, 4)}
    found = {}
    for name, (launcher, count, size, accumulation) in shares.items():
        (tmp_path / name).mkdir()
        launch = [sys.executable, "-m", *launcher, str(count)]
        command = [*launch, str(script), str(tmp_path / name), str(size), str(accumulation)]
        paths = os.pathsep.join([str(script.parent), str(script.parent.parent)])
        env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=env, capture_output=True, timeout=300)
        ranks = [torch.load(tmp_path / name / f"rank_{rank}.pt", weights_only=True) for rank in range(count)]
        assert all(torch.equal(tensor, ranks[-1][key]) for key, tensor in ranks[0].items()), name
        found[name] = ranks[0]
    start = narrow(torch.float64).state_dict()
    moved = max((found["one"][f"end.{key}"] - tensor).abs().max() for key, tensor in start.items())
    assert moved > 1e-3
    for name in ("two", "two one by one"):
        parts = [{k: v for k, v in found[which].items() if k.startswith("grad.")} for which in (name, "one")]
        assert_same_gradients(*parts)
        for key, tensor in found["one"].items():
            if key.startswith("end.") or key == "loss":
                assert (tensor - found[name][key]).abs().max() <= (1e-9 if key != "loss" else 1e-6), (name, key)
