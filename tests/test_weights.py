"""Weights: found, checked, read without running code, and given to a model whole or not at all."""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.utils import GatedRepoError, LocalEntryNotFoundError
from torch import nn
from weights_recipe import filled

from gigapath import files, tile_encoder
from gigapath.files import sha256_of
from gigapath.releases import RELEASES
from gigapath.weights import assign_weights, check_keys, find_weights, load_state_dict, tell_architecture

REPO = "hf_hub:prov-gigapath/prov-gigapath"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache of the test's own."""
    folder = tmp_path / "hf"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    return folder


def fake_hub(monkeypatch: pytest.MonkeyPatch, result: Path | Exception) -> list[dict[str, Any]]:
    """Put a hub in place that gives `result`; returns the list of calls it gets."""
    calls: list[dict[str, Any]] = []

    def hf_hub_download(repo_id: str, filename: str, **kwargs: Any) -> str:
        calls.append({"repo_id": repo_id, "filename": filename, **kwargs})
        if isinstance(result, Exception):
            raise result
        return str(result)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return calls


def response(status: int) -> Any:
    class Response:
        status_code = status
        headers: dict[str, str] = {}  # noqa: RUF012
        request = None

    return Response()


def release_with(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    import dataclasses

    monkeypatch.setitem(RELEASES, "gigapath", dataclasses.replace(RELEASES["gigapath"], **changes))


def test_find_weights_asks_the_hub_for_the_pinned_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "slide_encoder.pth"
    file.write_bytes(b"weights")
    release_with(monkeypatch, slide_sha256=sha256_of(file))
    calls = fake_hub(monkeypatch, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_weights(REPO, "slide_encoder.pth") == file
        assert find_weights("hf-hub:prov-gigapath/prov-gigapath", "slide_encoder.pth", strict=True) == file
    assert calls[0] == {
        "repo_id": "prov-gigapath/prov-gigapath",
        "filename": "slide_encoder.pth",
        "local_dir": None,
        "revision": "eba85dd46097c3eedfcc2a3a9a930baecb6bcc19",
    }
    assert calls[0] == calls[1]


def test_find_weights_honours_local_dir_and_asks_no_hub_for_what_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "slide_encoder.pth").write_bytes(b"another file")
    calls = fake_hub(monkeypatch, folder / "slide_encoder.pth")
    with pytest.warns(RuntimeWarning, match="sha256"):
        find_weights(REPO, "slide_encoder.pth", folder)
    assert calls[0]["local_dir"] == folder
    release_with(monkeypatch, slide_sha256=sha256_of(folder / "slide_encoder.pth"))
    assert find_weights(REPO, "slide_encoder.pth", folder) == folder / "slide_encoder.pth"
    assert len(calls) == 1


def test_find_weights_takes_a_revision_that_the_caller_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "slide_encoder.pth"
    file.write_bytes(b"weights of another revision")
    calls = fake_hub(monkeypatch, file)
    assert find_weights(f"{REPO}@main", "slide_encoder.pth", strict=True) == file
    assert calls[0]["revision"] == "main"


def test_find_weights_with_another_sha256_warns_or_raises_and_names_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "slide_encoder.pth"
    file.write_bytes(b"damaged")
    fake_hub(monkeypatch, file)
    recorded, found = RELEASES["gigapath"].slide_sha256, sha256_of(file)
    with pytest.warns(RuntimeWarning, match=f"{recorded}, got {found}"):
        find_weights(REPO, "slide_encoder.pth")
    with pytest.raises(ValueError, match=f"{recorded}, got {found}"):
        find_weights(REPO, "slide_encoder.pth", strict=True)


@pytest.mark.parametrize(
    ("token", "words"), [(None, "HF_TOKEN is not set"), ("hf_x", "account of your token has no access")]
)
def test_find_weights_of_a_gated_repository_says_where_to_ask(
    token: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub(monkeypatch, GatedRepoError("403 Client Error", response=response(403)))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    with pytest.raises(PermissionError, match=words) as caught:
        find_weights(REPO, "slide_encoder.pth")
    message = str(caught.value)
    assert "https://huggingface.co/prov-gigapath/prov-gigapath" in message
    assert "HF_TOKEN" in message and "--slide-encoder mean" in message and "\n" not in message


def test_find_weights_without_network_says_how_to_fetch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, LocalEntryNotFoundError("offline"))
    with pytest.raises(FileNotFoundError, match="gigapath download gigapath`") as caught:
        find_weights(REPO, "slide_encoder.pth")
    assert "--slide-encoder mean" in str(caught.value)


def test_find_weights_without_network_takes_what_another_tool_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "snapshot" / "slide_encoder.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"weights")
    fake_hub(monkeypatch, LocalEntryNotFoundError("offline"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(cached))
    with pytest.raises(FileNotFoundError):  # another file than the release's is not taken
        find_weights(REPO, "slide_encoder.pth")
    release_with(monkeypatch, slide_sha256=sha256_of(cached))
    assert find_weights(REPO, "slide_encoder.pth", strict=True) == cached


def test_find_weights_turns_any_failure_of_the_hub_into_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, RuntimeError("first line\nsecond line"))
    with pytest.raises(ConnectionError, match="first line second line"):
        find_weights(REPO, "slide_encoder.pth")
    fake_hub(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="disk is full"):
        find_weights(REPO, "slide_encoder.pth")


def test_find_weights_takes_a_file_or_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "slide_encoder.pth"
    file.write_bytes(b"x")
    assert find_weights(str(file), "slide_encoder.pth") == file
    assert find_weights(tmp_path, "slide_encoder.pth") == file
    for missing in (str(tmp_path / "none.pth"), str(tmp_path / "hf"), "prov-gigapath/prov-gigapath"):
        with pytest.raises(FileNotFoundError, match="hf_hub:prov-gigapath/prov-gigapath"):
            find_weights(missing, "slide_encoder.pth")


def test_sha256_is_computed_once_until_the_file_changes(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"first")
    counted: list[Path] = []

    def counting(path: Path) -> str:
        counted.append(path)
        return sha256_of(path)

    monkeypatch.setattr(files, "sha256_of", counting)
    first = files.remembered_sha256(file)
    assert files.remembered_sha256(file) == first == sha256_of(file)
    assert len(counted) == 1
    file.write_bytes(b"other bytes")
    assert files.remembered_sha256(file) == sha256_of(file) != first
    assert len(counted) == 2
    for memory in home.rglob("*.json"):  # a damaged memory is no memory
        memory.write_text("{")
    assert files.remembered_sha256(file) == sha256_of(file)
    assert len(counted) == 3


def test_sha256_is_computed_each_time_where_nothing_can_be_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"first")

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(files, "write_json_atomic", refuse)
    assert files.remembered_sha256(file) == files.remembered_sha256(file) == sha256_of(file)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_load_state_dict_reads_wrapped_and_bare(tmp_path: Path, wrapped: bool, zipped: bool) -> None:
    state = filled({"proj.weight": (3, 5), "proj.bias": (3,)})
    file = tmp_path / "w.pth"
    torch.save({"model": state} if wrapped else state, file, _use_new_zipfile_serialization=zipped)
    read = load_state_dict(file)
    assert list(read) == list(state)
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_load_state_dict_reads_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = filled({"proj.weight": (3, 5)})
    save_file(state, tmp_path / "w.safetensors")
    assert torch.equal(load_state_dict(tmp_path / "w.safetensors")["proj.weight"], state["proj.weight"])


class RunsCode:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (RunsCode, "ran", True))


def damaged(tmp_path: Path, kind: str) -> Path:
    file = tmp_path / "w.pth"
    if kind == "code":
        torch.save({"model": filled({"a": (3,)}), "extra": RunsCode()}, file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(RunsCode()))
    elif kind == "cut":
        torch.save(filled({"a": (3000,)}), file)
        file.write_bytes(file.read_bytes()[:5000])
    elif kind == "page":
        file.write_text("<html>Access denied</html>")
    elif kind == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "list":
        torch.save([torch.zeros(3)], file)
    elif kind == "nothing":
        torch.save({}, file)
    return file


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("code", "could run code"),
        ("pickle", "could run code"),
        ("cut", "cut off or damaged"),
        ("page", "is no checkpoint"),
        ("pointer", "Git LFS pointer"),
        ("empty", "cut off or damaged"),
        ("list", "no state dict"),
        ("nothing", "no state dict"),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_load_state_dict_refuses_in_one_sentence(tmp_path: Path, kind: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_state_dict(damaged(tmp_path, kind))
    assert "\n" not in str(caught.value)
    assert not RunsCode.ran


def test_load_state_dict_maps_the_file_instead_of_reading_it(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(filled({"a": (1000, 1000), "b": (10,)}), file)
    read = load_state_dict(file)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(file) in maps.read_text()
    read["a"].zero_()  # the mapping is private: the file keeps its bytes
    assert load_state_dict(file)["a"].abs().sum() > 0


def test_check_keys_raises_what_is_missing_and_warns_of_what_is_left_over() -> None:
    expected = filled({"cls_token": (1, 1, 4), "proj.weight": (4, 2)})
    with pytest.raises(ValueError, match=r"model: .* lacks cls_token"):
        check_keys("model", expected, {"proj.weight": expected["proj.weight"]})
    with pytest.raises(ValueError, match=r"proj.weight \(4, 3\) instead of \(4, 2\)"):
        check_keys("model", expected, expected | filled({"proj.weight": (4, 3)}))
    with pytest.warns(UserWarning, match="head.weight"):
        check_keys("model", expected, expected | filled({"head.weight": (1, 4)}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_keys("model", expected, expected)


def test_assign_weights_gives_the_mapped_tensors_to_a_model_without_storage(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4))
    model[0].bias.requires_grad_(False)
    state = filled({name: tuple(t.shape) for name, t in model.state_dict().items()})
    state["0.weight"] = state["0.weight"].half()
    torch.save(state, tmp_path / "w.pth")
    read = load_state_dict(tmp_path / "w.pth")
    assign_weights("model", model, read)
    assert model[1].weight.data_ptr() == read["1.weight"].data_ptr()
    assert model[0].weight.dtype == torch.float32
    assert model[0].weight.requires_grad and not model[0].bias.requires_grad
    assert torch.equal(model[0].weight, state["0.weight"].float())


def layout_of(name: str, goldens: Path) -> dict[str, torch.Tensor]:
    """Entries of a released architecture on the meta device, which hold no numbers."""
    with torch.device("meta"):
        if not name.startswith("gigapath_slide"):
            return tile_encoder.create_model("", name).state_dict()
        shapes = json.loads((goldens / "state_dict_keys.json").read_text())[name]
        return {key: torch.empty(shape) for key, shape in shapes.items()}


def test_tell_architecture_knows_both_releases(goldens: Path) -> None:
    for kind in ("tile", "slide"):
        for name in (getattr(release, f"{kind}_arch") for release in RELEASES.values()):
            assert tell_architecture(layout_of(name, goldens), kind, "w.pth") == name


def test_tell_architecture_lists_both_when_it_is_neither(goldens: Path) -> None:
    with pytest.raises(ValueError, match=r"gigapath_tile_enc_vitg or gigapath_tile_enc_dinov2s.*It is a slide encoder"):
        tell_architecture(layout_of("gigapath_slide_enc12l768d", goldens), "tile", "w.pth")
    with pytest.raises(
        ValueError, match="gigapath_slide_enc12l768d or gigapath_slide_enc12l384d, got 1 entries such as a"
    ):
        tell_architecture(filled({"a": (2,)}), "slide", "w.pth")
