"""The documentation site: it builds strictly without network, no link is dead, and nothing is loaded from elsewhere."""

import re
import socket
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit

import pytest

from gigapath.cli.main import VERBS

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning of mkdocs, and anything that wants the network, fails the build."""
    pytest.importorskip("mkdocs_same_dir")
    folder = tmp_path_factory.mktemp("site")

    def no_network(*_: object) -> NoReturn:
        raise OSError("the network is used")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.setenv("DISABLE_MKDOCS_2_WARNING", "true")
        patch.setattr(socket.socket, "connect", no_network)
        patch.setattr(socket, "getaddrinfo", no_network)
        from mkdocs.commands.build import build
        from mkdocs.config import load_config

        build(load_config(str(ROOT / "docs" / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_no_link_is_dead_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    from bs4 import BeautifulSoup  # comes with mkdocs-jupyter

    pages = {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in site.rglob("*.html")}
    anchors = {path: {str(tag["id"]) for tag in page.find_all(id=True)} for path, page in pages.items()}
    assert len(pages) > 20
    for path, page in pages.items():
        loaded = [tag["href"] for tag in page.find_all("link", href=True)] + [
            tag["src"] for tag in page.find_all(src=True)
        ]
        assert not [link for link in loaded if re.match(r"(?!data:)\w+:|//", link)], path
        for link in loaded + [tag["href"] for tag in page.find_all("a", href=True)]:
            parts = urlsplit(link)
            if not parts.scheme and not parts.netloc:
                base = site if path.name == "404.html" else path.parent  # 404.html is served from anywhere
                target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
                target = target / "index.html" if target.is_dir() else target
                assert target.is_file(), f"{path}: {link}"
                if parts.fragment and target in pages and not parts.fragment.startswith("__"):
                    assert unquote(parts.fragment) in anchors[target], f"{path}: {link}"


def test_references_are_generated_from_the_code_and_search_finds_pages(site: Path) -> None:
    commands = (site / "reference" / "commands" / "index.html").read_text(encoding="utf-8")
    assert all(f"gigapath {verb}" in commands for verb in VERBS) and "--mpp-tolerance" in commands
    python = (site / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    assert "read_features" in python and "create_model" in python
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "guides/privacy/" in index and "mpp-tolerance" in index
