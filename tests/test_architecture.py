"""The folder listing is the architecture: imports go down only, and the cheap parts stay cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.draw_rooms import RANK

PACKAGE = Path(__file__).parent.parent / "gigapath"

WITHOUT_TORCH = {
    *(
        "options",
        "releases",
        "files",
        "file_names",
        "findings",
        "tables",
        "text",
        "machine",
        "progress",
        "read_ahead",
    ),
    *("features", "preprocessing", "cohort", "hub", "report"),
}


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path, *, when_loaded: bool = False) -> set[str]:
    """Full names of everything that a file imports; with `when_loaded` only what it imports at its top."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if when_loaded else ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def source_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    unit = unit_of(path)
    assert unit in RANK, f"{unit} has no layer: say where it belongs"
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] != "gigapath" or len(parts) < 2 or parts[1] not in RANK:
            continue
        assert parts[1] == unit or RANK[parts[1]] < RANK[unit], f"{unit} imports {name}, which is not below it"


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_slide_side_never_imports_torch(path: Path) -> None:
    if unit_of(path) in WITHOUT_TORCH:
        # `.pt` files are read and written where feature files are: torch is loaded when one comes.
        later = unit_of(path) == "features"
        names = {name.split(".")[0] for name in imported_modules(path, when_loaded=later)}
        heavy = names & {"torch", "timm", "torchvision"}
        assert not heavy, f"{path} imports {heavy}"


@pytest.mark.parametrize("statement", ["import gigapath", "from gigapath.cli.main import main; main(['--version'])"])
def test_light_entry_points_import_nothing_heavy(statement: str) -> None:
    code = (
        f"import sys\ntry:\n    exec({statement!r})\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'timm', 'numpy', 'h5py', 'openslide'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
