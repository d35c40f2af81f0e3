"""Many slides in one call: each comes out as it does alone, and padding neither matters nor costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrow_longnet import largest_difference, made_tiles, narrow_model

from gigapath.longnet import dilated

NAN = float("nan")


def padded(lengths: list[int], filler: float, longest: int | None = None, seed: int = 0):
    """(x, coords float32, mask) with real tiles at random places of each row, `filler` elsewhere; and the slides."""
    random = torch.Generator().manual_seed(seed)
    longest = longest or max(lengths)
    slides = [made_tiles(length, seed=seed + i) for i, length in enumerate(lengths)]
    x = torch.full((len(lengths), longest, 12), filler)
    coords = torch.full((len(lengths), longest, 2), filler)
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, (tiles, at) in enumerate(slides):
        places = torch.randperm(longest, generator=random)[: len(tiles)].sort().values
        x[row, places], coords[row, places], mask[row, places] = tiles, at.float(), True
    return x, coords, mask, slides


@pytest.mark.parametrize("global_pool", [True, False])
@pytest.mark.parametrize("filler", [0.0, NAN, 1e30])
def test_masked_slides_equal_the_same_slides_alone(global_pool, filler) -> None:
    model = narrow_model(global_pool=global_pool)
    x, coords, mask, slides = padded([1, 37, 60], filler, longest=70)
    with torch.inference_mode():
        for all_states in (True, False):
            alone = [model(tiles[None], at[None], all_layer_embed=all_states) for tiles, at in slides]
            expected = [torch.cat(state) for state in zip(*alone, strict=True)]
            assert (expected[-1][0] - expected[-1][1]).abs().max() > 1e-3  # two slides do differ
            masked = model(x, coords, all_layer_embed=all_states, valid_mask=mask)
            assert largest_difference(masked, expected) <= 1e-5
            packed = model.forward_packed(
                torch.cat([tiles for tiles, _ in slides]),
                torch.cat([at for _, at in slides]),
                torch.tensor([1, 37, 60]),
                all_states,
            )
            assert largest_difference(packed, expected) <= 1e-5


def test_gradients_of_masked_slides_equal_those_of_the_slides_alone() -> None:
    x, coords, mask, slides = padded([3, 41], NAN, longest=50)
    probe = torch.randn(2, 32, generator=torch.Generator().manual_seed(9))
    model = narrow_model(global_pool=True)
    x.requires_grad_()
    (model(x, coords, valid_mask=mask)[0] * probe).sum().backward()
    together = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for row, (tiles, at) in enumerate(slides):
        tiles.requires_grad_()
        (model(tiles, at)[0] * probe[row]).sum().backward()
        assert (x.grad[row][mask[row]] - tiles.grad).abs().max() <= 1e-5 * tiles.grad.abs().max()
    assert torch.equal(x.grad[~mask], torch.zeros_like(x.grad[~mask]))
    for name, parameter in model.named_parameters():
        assert (together[name] - parameter.grad).abs().max() <= 1e-4 * parameter.grad.abs().max().clamp(min=1e-6), name


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    more=st.integers(0, 40),
    filler=st.sampled_from([0.0, NAN, float("inf"), -7.0]),
    seed=st.integers(0, 99),
)
def test_padding_never_matters(lengths, more, filler, seed) -> None:
    model = narrow_model()
    x, coords, mask, slides = padded(lengths, filler, longest=max(lengths) + more, seed=seed)
    with torch.inference_mode():
        masked = model(x, coords, True, valid_mask=mask)
        packed = model.forward_packed(x[mask], coords[mask], lengths, True)
        alone = [torch.cat(state) for state in zip(*(model(*slide, True) for slide in slides), strict=True)]
    assert largest_difference(masked, packed) == 0
    assert largest_difference(masked, alone) <= 1e-5


@settings(derandomize=True, deadline=None, max_examples=20)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=2, max_size=4),
    chosen=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_permuting_the_tiles_of_a_slide_changes_that_slide_only(lengths, chosen, seed) -> None:
    model = narrow_model(global_pool=True)
    lengths[chosen % len(lengths)] += 20  # more than one segment, so that the order counts
    x, coords = made_tiles(sum(lengths), seed=seed)
    chosen %= len(lengths)
    start = sum(lengths[:chosen])
    order = torch.arange(sum(lengths))
    order[start : start + lengths[chosen]] = start + torch.arange(lengths[chosen]).flip(0)
    with torch.inference_mode():
        before = model.forward_packed(x, coords, lengths)[0]
        after = model.forward_packed(x[order], coords[order], lengths)[0]
    changed = (before - after).abs().amax(1) > 1e-5
    assert changed.tolist() == [row == chosen for row in range(len(lengths))]


def test_cost_follows_the_real_tokens(monkeypatch) -> None:
    seen = []

    def record(q, k, v, zero_keys, scale, kernel):
        seen.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return attend(q, k, v, zero_keys, scale, kernel)

    attend = dilated.attend
    monkeypatch.setattr(dilated, "attend", record)
    model = narrow_model()
    widest = []
    model.encoder.layers[0].ffn.fc1.register_forward_hook(lambda module, args, out: widest.append(out.shape))
    x, coords, mask, slides = padded([5, 9], NAN, longest=500)
    with torch.inference_mode():
        model(x, coords, valid_mask=mask)
        masked = sum(seen)
        seen.clear()
        for slide in slides:
            model(*slide)
    assert masked == sum(seen)
    assert widest[0] == (1, 5 + 9 + 2, 128)


def test_a_batch_of_one_length_equals_its_slides_alone() -> None:
    model = narrow_model()
    x, coords = made_tiles(3, 33)
    with torch.inference_mode():
        together = model(x, coords, True)
        alone = [torch.cat(state) for state in zip(*(model(x[i], coords[i], True) for i in range(3)), strict=True)]
        shared = model(x, coords[0])[0]
        assert (shared[1:] - model(x[1:], coords[:1].expand(2, -1, -1))[0]).abs().max() <= 1e-5
    assert largest_difference(together, alone) <= 1e-5


def test_drop_path_and_dropout_act_on_each_packed_slide() -> None:
    model = narrow_model(drop_path_rate=0.9, dropout=0.0).train()
    x, coords = made_tiles(40)
    torch.manual_seed(0)
    outs = torch.stack([model.forward_packed(x, coords, [10] * 4, True)[-1].detach() for _ in range(20)])
    whole = model.eval().forward_packed(x, coords, [10] * 4, True)[1].detach()
    skipped = (outs - whole).abs().amax(-1) < 1e-6  # layer 1 is never dropped, layer 2 mostly; (20, 4)
    assert 0.6 < skipped.float().mean() < 1
    assert any(row.any() and not row.all() for row in skipped)


@pytest.mark.parametrize(
    ("lengths", "match"),
    [([10, 11], "add up to 20"), ([20, 0], "at least 1"), ([], "at least 1"), ([-1, 21], "least 1")],
)
def test_packed_lengths_must_fit(lengths, match) -> None:
    with pytest.raises(ValueError, match=match):
        narrow_model().forward_packed(*made_tiles(20), lengths)


def test_masks_must_fit_and_leave_no_slide_empty() -> None:
    model = narrow_model()
    x, coords = made_tiles(2, 7)
    with pytest.raises(ValueError, match=r"valid_mask \(2, 7\), got \(2, 6\)"):
        model(x, coords, valid_mask=torch.ones(2, 6, dtype=torch.bool))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match="empty"):
        model(x, coords, valid_mask=mask)
