"""save_pretrained, push_to_hub, from_pretrained: equal outputs, strict keys, the published layout."""

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from fake_weights import flash_tile_checkpoint, slide_checkpoint
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn
from weights_recipe import fill

from gigapath.slide_encoder import LongNetViT, create_model

FLASH = "gigapath_slide_enc12l384d"


def model(**options: Any) -> LongNetViT:
    made = LongNetViT(**{"in_chans": 12, "embed_dim": 32, "depth": 2, "max_wsi_size": 65536, **options})
    return fill(made).eval()


def outputs(model: nn.Module) -> torch.Tensor:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(1, 40, 12, generator=random)
    coords = torch.randint(0, 500, (1, 40, 2), generator=random) * 512
    with torch.no_grad():
        return torch.cat(model(x, coords, all_layer_embed=True))


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.std() > 1e-3 and torch.equal(ours, theirs)


class LocalHub:
    """Repositories as folders: what is pushed is downloaded from there; a file that is not raises `missing`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.missing = folder, EntryNotFoundError
        self.asked: list[dict[str, Any]] = []
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", lambda **_: self)

    def create_repo(self, repo_id: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id: str, folder_path: Path, **_: Any) -> str:
        shutil.copytree(folder_path, self.folder / repo_id)
        return repo_id

    def download(self, repo: str, filename: str, **options: Any) -> str:
        self.asked.append(options)
        if not (self.folder / repo / filename).exists():
            raise self.missing(filename)
        return str(self.folder / repo / filename)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    return LocalHub(tmp_path, monkeypatch)


def test_saved_model_loads_back_with_equal_outputs(tmp_path: Path) -> None:
    saved = model(global_pool=True, norm_layer=lambda width: nn.LayerNorm(width, eps=1e-3), slide_ngrids=600)
    saved.tile_size = 512  # as TRIDENT assigns it
    saved.save_pretrained(tmp_path / "m")
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "slide_encoder.pth", "slide_encoder.json", "README.md",
    }  # fmt: skip
    loaded = LongNetViT.from_pretrained(str(tmp_path / "m"))
    assert same(outputs(saved), outputs(loaded)) and not loaded.training
    assert (loaded.tile_size, loaded.global_pool, loaded.norm.eps) == (512, True, 1e-3)
    assert loaded.encoder.config.segment_lengths == saved.encoder.config.segment_lengths
    assert not same(outputs(saved), outputs(LongNetViT.from_pretrained(tmp_path / "m", global_pool=False)))

    class Own(LongNetViT):
        pass

    assert type(Own.from_pretrained(tmp_path / "m")) is Own


def test_what_is_saved_is_read_by_create_model_too(tmp_path: Path) -> None:
    saved = fill(create_model("", FLASH, 12, depth=2)).eval()
    saved.save_pretrained(tmp_path)
    assert same(outputs(saved), outputs(create_model(str(tmp_path), FLASH, 12, depth=2).eval()))


def test_pushed_model_loads_back_with_equal_outputs(hub: LocalHub) -> None:
    saved = model()
    assert saved.push_to_hub("someone/slides") == "someone/slides"
    assert same(outputs(saved), outputs(LongNetViT.from_pretrained("someone/slides", revision="v2", token="secret")))
    assert all(options["revision"] == "v2" and options["token"] == "secret" for options in hub.asked)


def test_published_layout_is_recognised_in_a_folder_and_on_the_hub(hub: LocalHub) -> None:
    place = hub.folder / "someone" / "copy"
    place.mkdir(parents=True)
    shutil.copy(slide_checkpoint(), place)
    shutil.copy(flash_tile_checkpoint(), place / "pytorch_model.bin")
    timm = {"architecture": "vit", "num_features": 384, "global_pool": "token", "embed_dim": 9}
    (place / "config.json").write_text(json.dumps(timm))  # of the tile encoder
    wanted = create_model(str(place), FLASH, 384).eval()
    for name in (str(place), "someone/copy"):
        loaded = LongNetViT.from_pretrained(name)
        assert all(torch.equal(mine, wanted.state_dict()[key]) for key, mine in loaded.state_dict().items())
        assert (loaded.global_pool, loaded.tile_size, loaded.norm.eps) == (False, 256, wanted.norm.eps)
        assert loaded.encoder.config.segment_lengths == wanted.encoder.config.segment_lengths
    with pytest.raises(ValueError, match=r"config\.json"):  # the mixin would remove the tile encoder's
        loaded.save_pretrained(place)
    assert json.loads((place / "config.json").read_text()) == timm


def test_a_release_by_its_name(hub: LocalHub) -> None:
    place = hub.folder / "prov-gigapath" / "prov-gigapath-flash"
    place.mkdir(parents=True)
    shutil.copy(slide_checkpoint(), place)
    with pytest.warns(RuntimeWarning, match="sha256"):
        assert LongNetViT.from_pretrained("gigapath-flash").embed_dim == 384


def test_a_repository_that_can_not_be_asked_is_not_taken_for_a_published_one(hub: LocalHub) -> None:
    (hub.folder / "someone" / "copy").mkdir(parents=True)
    shutil.copy(slide_checkpoint(), hub.folder / "someone" / "copy")
    hub.missing = LocalEntryNotFoundError  # offline, and the file that says tile size and pooling not cached
    with pytest.raises(FileNotFoundError, match=r"slide_encoder\.json"):
        LongNetViT.from_pretrained("someone/copy")


@pytest.mark.parametrize("change", ["missing", "more", "shape", "no weights", "no config", "config", "segments"])
def test_what_is_amiss_raises_and_weights_are_never_random(change: str, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path)
    weights, config = tmp_path / "slide_encoder.pth", tmp_path / "slide_encoder.json"
    state = torch.load(weights, weights_only=True)["model"]
    said = json.loads(config.read_text())
    if change == "missing":
        state.pop("norm.weight")
    elif change == "more":
        state["head.weight"] = torch.zeros(2)
    elif change == "shape":
        state["cls_token"] = torch.zeros(1, 1, 33)
    elif change == "config":
        said["rotary"] = True
    elif change == "segments":
        said["segment_lengths"][0] = 512
    torch.save({"model": state}, weights)
    config.write_text(json.dumps(said))
    if change == "no config":
        config.unlink()
    if change == "no weights":
        weights.unlink()
    with pytest.raises(FileNotFoundError if change == "no weights" else ValueError):
        LongNetViT.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where"])
def test_a_folder_that_is_not_there_is_told(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="from_pretrained"):
        LongNetViT.from_pretrained(name)


def test_the_constructor_keeps_its_signature(tmp_path: Path) -> None:
    assert list(inspect.signature(LongNetViT).parameters)[:3] == ["in_chans", "embed_dim", "depth"]
    with pytest.raises(ValueError, match="LayerNorm"):
        model(norm_layer=nn.Identity).save_pretrained(tmp_path)
