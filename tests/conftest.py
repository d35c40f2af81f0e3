"""Fixtures that every test can ask for."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def goldens() -> Path:
    """The folder of golden numbers."""
    return Path(__file__).parent / "goldens"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real slides and tiles beside the checkout (or in $GIGAPATH_SHARED); tests that ask for them are skipped
    where they are absent."""
    folder = Path(os.environ.get("GIGAPATH_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("real slides are not beside this checkout")
    return folder
