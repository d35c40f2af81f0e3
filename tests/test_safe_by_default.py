"""Nothing that comes from elsewhere runs, leaves the output folder, or is believed unchecked."""

import ast
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gigapath.cohort.status import Status, write_status
from gigapath.features import FeatureFileError
from gigapath.features.arrays import read_npy, read_npz, read_tensor
from gigapath.file_names import safe_name
from gigapath.releases import DOWNLOADS, RELEASES
from gigapath.weights import load_state_dict

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for folder in ("gigapath", "scripts", "demo") for path in (ROOT / folder).rglob("*.py"))

# What runs what it reads, or writes where it is told to by a file.
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "cloudpickle.load",
    "marshal.load", "marshal.loads", "shelve.open",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader",
    "os.system", "os.popen", "pandas.read_pickle", "numpy.fromregex", "torch.hub.load", "torch.jit.load",
    "shutil.unpack_archive",
}  # fmt: skip
FORBIDDEN_METHODS = {"extractall", "extract", "read_pickle", "unsafe_load", "full_load"}
FORBIDDEN_IMPORTS = {"dill", "cloudpickle", "joblib", "shelve", "marshal", "tarfile"}


def dotted(node: ast.AST) -> str:
    """The name of a call, such as "torch.load"; "" where it has none."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value) or '?'}.{node.attr}"
    return ""


def faults_of(tree: ast.AST) -> list[str]:
    """What a module does that none of ours may do."""
    found = []
    aliases = {"np": "numpy", "pd": "pandas"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name.split(".")[0] for alias in node.names} if isinstance(node, ast.Import) else {
                (node.module or "").split(".")[0]}  # fmt: skip
            found += sorted(f"import {name}" for name in names & FORBIDDEN_IMPORTS)
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                found += [f"from pickle import {alias.name}" for alias in node.names if "rror" not in alias.name]
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = dotted(node.func).partition(".")
        name = ".".join(part for part in (aliases.get(first, first), rest) if part)
        keywords = {word.arg: word.value for word in node.keywords}
        constant = {arg: value.value for arg, value in keywords.items() if isinstance(value, ast.Constant)}
        if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS:
            found.append(name)
        if name == "torch.load" and constant.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if name == "numpy.load" and constant.get("allow_pickle") is not False:
            found.append("numpy.load without allow_pickle=False")
        if constant.get("allow_pickle") is True or constant.get("shell") is True:
            found.append(f"{name} with a switch that runs code")
        if constant.get("trust_remote_code") is True or constant.get("verify") is False:
            found.append(f"{name} with a switch that trusts the other side")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    assert faults_of(ast.parse(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')", "import pickle; pickle.load(f)", "from pickle import loads", "torch.load(f)",
        "torch.load(f, weights_only=False)", "np.load(f)", "numpy.load(f, allow_pickle=True)", "yaml.load(f, Loader=x)",
        "zipfile.ZipFile(f).extractall()", "import tarfile", "subprocess.run(c, shell=True)", "os.system('x')",
        "requests.get(u, verify=False)",
    ],
)  # fmt: skip
def test_the_search_itself_finds_what_it_is_for(code: str) -> None:
    assert faults_of(ast.parse(code))


class Evil:
    """A pickle that leaves a mark where it is run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def hostile(kind: str, folder: Path) -> tuple[Path, Path]:
    """(a file that would touch `mark` if it were run, mark)."""
    mark, path = folder / "mark", folder / f"evil.{kind.partition('-')[0]}"
    evil = Evil(mark)
    if kind == "pt":
        torch.save(evil, path)
    elif kind == "pt-in-a-dict":
        torch.save({"model": {"a": torch.zeros(2)}, "more": evil}, path)
    elif kind == "pt-bare":
        path.write_bytes(pickle.dumps(evil))
    elif kind == "npy":
        np.save(path, np.array([evil], dtype=object), allow_pickle=True)
    else:
        np.savez(path, features=np.array([evil], dtype=object), names=np.array([evil], dtype=object))
    return path, mark


@pytest.mark.parametrize(
    ("kind", "read"),
    [
        ("pt", load_state_dict),
        ("pt-in-a-dict", load_state_dict),
        ("pt-bare", load_state_dict),
        ("pt", read_tensor),
        ("pt-bare", read_tensor),
        ("npy", read_npy),
        ("npz", read_npz),
    ],
)
def test_files_that_hold_code_are_refused_unrun(kind: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    path, mark = hostile(kind, tmp_path)
    with pytest.raises(ValueError) as error:
        read(path)
    assert "\n" not in str(error.value) and not mark.exists()


def test_arrays_are_not_believed_about_their_size(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (tmp_path / "a.npy").write_bytes(content)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("features.npy", content)
    (tmp_path / "a.npz").write_bytes(archive.getvalue())
    for read, name in ((read_npy, "a.npy"), (read_npz, "a.npz")):
        with pytest.raises(FeatureFileError, match="does not fit"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "slide_id",
    [
        "", " ", "a ", " a", ".", "..", "...", "../x", "/abs", "a/b", "a\\b", "..\\x", "a\0b", "a\nb", "a\rb",
        "\x1b[2J", "\x7f", "x" * 181, "é" * 91, "\ud800", "-x", "=1+1", "a\x85b", "a\u202eb",
    ],
)  # fmt: skip
def test_names_that_could_leave_the_folder_or_break_a_table_are_refused(slide_id: str) -> None:
    with pytest.raises(ValueError, match="slide id: expected") as error:
        safe_name(slide_id)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("slide_id", ["a", "TCGA-3C-AALI-01Z-00-DX1.F6E9", "a b", "ü-切片", "%s", "a'b,c;d"])
def test_names_as_they_occur_stay_as_they_are(slide_id: str, tmp_path: Path) -> None:
    assert safe_name(slide_id) == slide_id
    write_status(tmp_path, Status(slide_id=slide_id, stage="tiles", status="done"))
    assert [path.name for path in tmp_path.iterdir()] == [f"{slide_id}.json"]
    assert json.loads((tmp_path / f"{slide_id}.json").read_text(encoding="utf-8"))["slide_id"] == slide_id


def test_weights_are_pinned_and_every_download_has_a_digest_or_says_that_it_has_none() -> None:
    for release in RELEASES.values():
        assert len(release.revision) == 40 and len(release.tile_sha256) == len(release.slide_sha256) == 64
        assert release.tile_file.digest == f"sha256:{release.tile_sha256}"
    for name, download in DOWNLOADS.items():
        for file in download.files:
            assert file.source.startswith(("https://", "hf_hub:")), name
            assert file.digest is None or file.digest.partition(":")[0] in ("sha256", "git", "md5"), name
