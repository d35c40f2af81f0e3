"""What is shipped: the wheel and the sdist, the environments, the top level, and what an import costs."""

import ast
import importlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


# The name that is imported, where it is not the distribution's own.
IMPORTED_AS = {
    "beautifulsoup4": "bs4",
    "opencv-python-headless": "cv2",
    "openslide-python": "openslide",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "umap-learn": "umap",
}


def files_of_checkout(*folders: str) -> list[str]:
    """Every file that is tracked or would be, relative to the checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [name for name in listing.splitlines() if (ROOT / name).is_file()]


def distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return match.group().lower()


def import_name(requirement: str) -> str:
    name = distribution(requirement)
    return IMPORTED_AS.get(name, name.replace("-", "_"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist of this checkout."""
    sdist = pytest.importorskip("hatchling.builders.sdist")
    wheel = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("dist")
    for builder, version in ((wheel.WheelBuilder, "standard"), (sdist.SdistBuilder, "standard")):
        list(builder(str(ROOT)).build(directory=str(folder), versions=[version]))
    return folder


def test_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        info = f"gigapath-{PROJECT['version']}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert {name for name in names if not name.startswith(info)} == set(files_of_checkout("gigapath"))
    assert "gigapath/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0 AND BSD-3-Clause" in metadata  # the report's viewer is under the latter
    viewer = "gigapath/report/assets/openseadragon"
    assert {f"{viewer}/openseadragon.min.js", f"{viewer}/LICENSE.txt", f"{info}/licenses/{viewer}/LICENSE.txt"} <= names
    assert {f"gigapath/report/assets/report.{kind}" for kind in ("html", "css", "js")} <= names
    assert "gigapath = gigapath.cli.main:command" in entry_points


def test_sdist_holds_the_package_and_what_builds_it(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    around = {"pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "PKG-INFO", ".gitignore"}
    assert names == set(files_of_checkout("gigapath")) | around


def test_version_is_stated_once_for_all() -> None:
    import gigapath

    assert gigapath.__version__ == PROJECT["version"]
    assert re.search(rf"^version: {re.escape(PROJECT['version'])}$", (ROOT / "CITATION.cff").read_text(), re.M)


def test_conda_environment_gives_what_pyproject_says() -> None:
    yaml = pytest.importorskip("yaml")
    # BaseLoader keeps every scalar a string: no 3.10 that becomes 3.1
    environment = yaml.load((ROOT / "environment.yaml").read_text(), yaml.BaseLoader)
    assert environment["name"] == "gigapath"
    assert environment["channels"] == ["conda-forge"]
    *conda, last = environment["dependencies"]
    assert f"python{PROJECT['requires-python']}" in conda
    (checkout,) = last["pip"]
    match = re.fullmatch(r"-e \.\[([a-z,]+)\]", checkout)
    assert match
    assert set(match.group(1).split(",")) <= set(EXTRAS)
    # the environment that the tests' script makes is the same one
    assert f"prepare_environment {match.group(1)}\n" in (ROOT / "scripts/test.sh").read_text()


def test_no_tracked_file_names_a_registry_or_this_machine() -> None:
    hosts = ["py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org", "anaconda" + ".org", "npm" + "js."]
    places = ["/" + "work/", "/" + "root/", "/opt/" + "wheels", "/opt/" + "pypi"]
    pattern = re.compile("|".join([*map(re.escape, hosts), *(rf"(?<![\w.]){re.escape(place)}" for place in places)]))
    found = []
    for name in files_of_checkout():
        content = (ROOT / name).read_bytes()
        if b"\0" not in content[:8192]:
            found += [f"{name}: {match.group()}" for match in pattern.finditer(content.decode("utf-8", "replace"))]
    assert not found


def third_party_imports(folder: str) -> dict[str, set[str]]:
    """top-level name of every import under `folder` that is neither the standard library's nor ours -> the files."""
    ours = {"gigapath", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    if folder != "gigapath":  # the wheel has neither
        ours |= {"scripts", "demo"}
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            for name in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - ours:
                found.setdefault(name, set()).add(path.name)
    return found


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("gigapath", ("standin", "train", "ray", "lora", "umap", "anndata")), ("tests", tuple(EXTRAS))],
)
def test_everything_that_is_imported_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    requirements = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    declared = {import_name(requirement) for requirement in requirements}
    declared.add("triton")  # torch brings it where there can be a GPU, in the version that it needs
    undeclared = {name: files for name, files in third_party_imports(folder).items() if name not in declared}
    assert not undeclared


def test_importing_the_package_loads_a_few_standard_modules_only() -> None:
    code = "import sys; had = set(sys.modules); import gigapath; print(*sorted(set(sys.modules) - had))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded = {name.split(".")[0] for name in out.split()}
    assert loaded - set(sys.stdlib_module_names) == {"gigapath"}
    assert len(out.split()) < 40  # typing and importlib, and what they load


def test_verbs_and_modules_load_without_the_extras() -> None:
    """The base install answers every `--help` without torch, and its modules load with no extra installed."""
    base = {import_name(line) for line in PROJECT["dependencies"]}
    blocked = {import_name(line) for lines in EXTRAS.values() for line in lines} - base - {"pytest"}
    blocked -= {"yaml", "packaging"}  # huggingface_hub asks for them
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "gigapath").rglob("*.py"))
        if path.stem != "triton_norm"  # asked for where a GPU is, and done without where Triton is not whole
    ]
    code = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({sorted(blocked)!r}))
from gigapath.cli.main import VERBS, app
for verb in VERBS:
    app[verb].assemble_argument_collection(parse_docstring=True)
assert not {{"torch", "timm"}} & set(sys.modules), "a verb's options load torch or timm"
for name in {modules!r}:
    importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_top_level_shows_public_names_alone() -> None:
    import gigapath

    shown = [name for name in dir(gigapath) if not (name.startswith("__") and name.endswith("__"))]
    assert {"read_slides", "read_features", "maps", "slide_encoder"} <= set(shown)
    assert not [name for name in shown if name.startswith("_") or name in ("Any", "TYPE_CHECKING", "importlib")]
    assert all(word in (gigapath.read_slides.__doc__ or "") for word in ("default", "state:I", "tile-mean", "trident"))


@pytest.mark.parametrize("name", ["finetune", "maps"])
def test_public_names_that_load_late_are_there_and_shown(name: str) -> None:
    package = importlib.import_module(f"gigapath.{name}")
    assert set(package.__all__) <= set(dir(package))
    for public in package.__all__:
        assert getattr(package, public).__name__ == public
    with pytest.raises(AttributeError, match=f"module 'gigapath.{name}' has no attribute 'nonesuch'"):
        _ = package.nonesuch
