"""The classifier on a slide: the golden step, its published helpers, its parameter groups."""

import argparse
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from weights_recipe import fill, made_slide

from gigapath.classification_head import ClassificationHead, get_model, parse_states, reshape_input
from gigapath.longnet.attention import use_kernel


def tiny_head(**kwargs) -> ClassificationHead:
    """A narrow head on a slide encoder of the released kind."""
    options = {"input_dim": 24, "latent_dim": 384, "feat_layer": "1", "n_classes": 3, "pretrained": "", "dropout": 0.0}
    return fill(ClassificationHead(**{**options, "model_arch": "gigapath_slide_enc12l384d", **kwargs}))


@pytest.mark.parametrize(
    ("dtype", "kernel", "on_logits", "on_grads"),
    [
        (torch.float32, "cpu-flash", 1e-5, 1e-3),
        pytest.param(torch.float32, "plain", 1e-5, 1e-3, marks=pytest.mark.slow),
        pytest.param(torch.float64, "cpu-flash", 1e-6, 1e-6, marks=pytest.mark.slow),
    ],
)
def test_finetuning_step_meets_the_golden(goldens, dtype, kernel, on_logits, on_grads) -> None:
    golden = np.load(goldens / "finetune_step_panda.npz")
    model = ClassificationHead(
        input_dim=1536,
        latent_dim=768,
        feat_layer="5-12",
        n_classes=6,
        pretrained="",
        max_wsi_size=250000,
        dropout=0.0,
        drop_path_rate=0.0,
    )
    fill(model).to(dtype).train()
    x, coords = made_slide(21, 1, 1100, 1536, 50)
    with use_kernel(kernel):
        logits = model(x.to(dtype), coords)
        loss = F.cross_entropy(logits, torch.tensor([3]))
        loss.backward()
    assert np.abs(logits.detach().numpy() - golden["logits"]).max() <= on_logits
    assert abs(float(loss.detach()) - float(golden["loss"])) <= on_logits
    for name, parameter in model.named_parameters():
        norm = float(golden[f"gradnorm:{name}"])
        if np.isnan(norm):
            assert parameter.grad is None
            continue
        if norm > 1e-6:
            assert abs(float(parameter.grad.norm()) - norm) <= on_grads * norm, name
        if f"grad:{name}" in golden.files:
            true = golden[f"grad:{name}"]
            assert np.abs(parameter.grad.numpy() - true).max() <= on_grads * np.abs(true).max(), name


def test_feat_layer_names_states_and_not_a_range() -> None:
    assert parse_states("11") == [11]
    assert parse_states("5-11") == [5, 11]
    with pytest.raises(ValueError, match="feat_layer"):
        parse_states("5,11")


def test_head_classifies_the_chosen_states_side_by_side() -> None:
    head = tiny_head(feat_layer="0-2").eval()
    assert (head.feat_layer, head.feat_dim) == ([0, 2], 768)
    assert {name for name in head.state_dict() if name.startswith("classifier")} == {
        "classifier.0.weight",
        "classifier.0.bias",
    }
    x, coords = made_slide(3, 2, 9, 24, 8)
    with torch.no_grad():
        states = head.slide_encoder(x, coords, all_layer_embed=True)
        expected = head.classifier(torch.cat([states[0], states[2]], dim=1))
        assert torch.equal(head(x, coords), expected)
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[1, 5:] = False
        alone = head(x[1:, :5], coords[1:, :5])
        assert (head(x, coords, valid_mask=mask)[1:] - alone).abs().max() <= 1e-5
        packed = head.forward_packed(x[mask], coords[mask], [9, 5])
        assert (packed - head(x, coords, valid_mask=mask)).abs().max() <= 1e-5
    assert head(x[0], coords[0]).shape == (1, 3)


def test_freeze_leaves_the_classifier_to_train() -> None:
    head = tiny_head(freeze=True)
    assert {name for name, parameter in head.named_parameters() if parameter.requires_grad} == {
        "classifier.0.weight",
        "classifier.0.bias",
    }


def test_get_model_takes_a_whole_namespace_with_one_warning() -> None:
    arguments = argparse.Namespace(
        input_dim=24,
        latent_dim=384,
        feat_layer="1",
        n_classes=3,
        model_arch="gigapath_slide_enc12l384d",
        pretrained="",
        freeze=False,
        global_pool=True,
        dropout=0.1,
        device="cuda",
        report_to=None,
        epochs=5,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head = get_model(**vars(arguments))
    assert head.slide_encoder.global_pool and head.slide_encoder.encoder.config.dropout == 0.1
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert all(name in messages[0] for name in ("device", "report_to", "epochs")) and "dropout" not in messages[0]


@pytest.mark.parametrize(("wrong", "match"), [({"latent_dim": 768}, "latent_dim"), ({"feat_layer": "13"}, "0 to 12")])
def test_head_refuses_what_does_not_fit_the_encoder(wrong, match) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_head(**wrong)


def test_reshape_input_drops_the_leading_one() -> None:
    x, coords, mask = torch.zeros(1, 2, 5, 7), torch.zeros(1, 2, 5, 2), torch.zeros(1, 2, 5)
    assert [tensor.shape for tensor in reshape_input(x, coords, mask)] == [(2, 5, 7), (2, 5, 2), (2, 5)]
    assert reshape_input(x, coords)[2] is None
    same = reshape_input(x[0], coords[0], mask[0])
    assert [tensor.shape for tensor in same] == [(2, 5, 7), (2, 5, 2), (2, 5)]


def test_parameter_groups_hold_the_layer_decay_of_the_recipe() -> None:
    head = tiny_head()
    groups = head.parameter_groups(2.0, 0.05, 0.95)
    of_parameter = {id(parameter): group for group in groups for parameter in group["params"]}
    scales = {
        name: (of_parameter[id(parameter)]["lr"] / 2.0, of_parameter[id(parameter)]["weight_decay"])
        for name, parameter in head.named_parameters()
    }
    assert len(of_parameter) == len(scales) == 249
    expected = {
        "classifier.0.weight": (1.0, 0.05),
        "classifier.0.bias": (1.0, 0.0),
        "slide_encoder.norm.weight": (1.0, 0.0),
        "slide_encoder.encoder.layer_norm.bias": (1.0, 0.0),
        "slide_encoder.encoder.layers.11.ffn.fc1.weight": (0.95, 0.05),
        "slide_encoder.encoder.layers.0.ffn.fc1.bias": (0.95**12, 0.0),
        "slide_encoder.cls_token": (0.95**13, 0.05),
        "slide_encoder.patch_embed.proj.weight": (0.95**13, 0.05),
    }
    for name, (scale, decay) in expected.items():
        assert scales[name] == (pytest.approx(scale), decay), name
    assert all(group["lr_scale"] * 2.0 == pytest.approx(group["lr"]) for group in groups)
    published = head.parameter_groups(2.0, 0.05, 0.95, published=True)
    projection = head.slide_encoder.patch_embed.proj.weight
    assert [group["lr"] for group in published if any(p is projection for p in group["params"])] == [2.0]
    no_decay = head.slide_encoder.no_weight_decay()
    assert "norm.weight" in no_decay and "cls_token" not in no_decay
