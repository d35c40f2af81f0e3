"""Of the containers the form is checked, and that both install the same locked versions: engines are rarely at hand.

By hand: `buildah bud --pull-never --isolation chroot -f scripts/containers/Dockerfile .` on any base of that name.
"""

import re
from pathlib import Path

from lock_versions import LOCK, declared, read_lock
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "scripts" / "containers"
# Dockerfile reference and Apptainer definition files.
INSTRUCTIONS = {"FROM", "ENV", "COPY", "RUN", "WORKDIR", "ENTRYPOINT", "USER", "LABEL", "ARG", "CMD"}
SECTIONS = {"files", "environment", "post", "test", "runscript", "help", "labels", "startscript"}


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, the rest) of each line."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def definition() -> tuple[dict[str, str], dict[str, list[str]]]:
    """(header, section -> lines) of the Apptainer definition."""
    header: dict[str, str] = {}
    sections: dict[str, list[str]] = {}
    now = None
    for line in (FOLDER / "gigapath.def").read_text().splitlines():
        if line.startswith("#") or not line.strip():
            continue
        if line.startswith("%"):
            now = line[1:].strip()
            sections[now] = []
        elif now is None:
            name, value = line.split(":", 1)
            header[name.strip()] = value.strip()
        else:
            assert line.startswith("    "), f"a section's lines are indented: {line}"
            sections[now].append(line.strip())
    return header, sections


def test_dockerfile_is_well_formed_and_copies_what_is_there() -> None:
    lines = dockerfile()
    assert lines[0][0] == "FROM" and {name for name, _ in lines} <= INSTRUCTIONS
    for name, rest in lines:
        if name == "COPY":
            *sources, target = rest.split()
            assert target.startswith("/") and all((ROOT / source).exists() for source in sources), rest
    assert [rest for name, rest in lines if name == "ENTRYPOINT"] == ['["gigapath"]']


def test_definition_is_well_formed_and_copies_what_is_there() -> None:
    header, sections = definition()
    assert set(header) == {"Bootstrap", "From"} and header["Bootstrap"] == "docker"
    assert set(sections) <= SECTIONS and all(sections.values())
    for line in sections["files"]:
        source, target = line.split()
        assert (ROOT / source).exists() and target.startswith("/"), line


def test_both_containers_install_the_same() -> None:
    header, sections = definition()
    lines = dockerfile()
    assert header["From"] == lines[0][1]
    installs = [rest for name, rest in lines if name == "RUN"]
    for commands in ("\n".join(installs), "\n".join(sections["post"])):
        assert re.search(r"pip install .*--requirement /opt/gigapath/lock\.txt", commands)
        assert re.search(r"pip install .*--no-deps /opt/gigapath\b", commands)
    copied = {word for name, rest in lines if name == "COPY" for word in rest.split()[:-1]}
    assert copied == {line.split()[0] for line in sections["files"]}


def test_lock_fits_what_pyproject_asks_for() -> None:
    locked = read_lock()
    for requirement in declared():
        version = locked.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not locked: python tests/lock_versions.py"
        assert requirement.specifier.contains(version), f"{requirement} and {version}"
    for line in LOCK.read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line), line
