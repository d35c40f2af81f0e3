"""The documentation site: it builds strictly without network, no link is dead, and nothing is loaded from elsewhere."""

import socket
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from gigapath.cli.main import VERBS

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """What a page points to, what it loads, and the places in it that others can point to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value or "")
            elif name == "href" and tag == "a":
                self.links.append(value or "")
            elif (name == "href" and tag == "link") or name == "src":
                self.loaded.append(value or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The built site; a warning of mkdocs, and anything that wants the network, fails the build."""
    pytest.importorskip("mkdocs_same_dir")
    folder = tmp_path_factory.mktemp("site")

    def no_network(*_: object) -> None:
        raise OSError("the network is used")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        patch.setenv("DISABLE_MKDOCS_2_WARNING", "true")
        patch.setattr(socket.socket, "connect", no_network)
        patch.setattr(socket, "getaddrinfo", no_network)
        from mkdocs.commands.build import build
        from mkdocs.config import load_config

        build(load_config(str(ROOT / "docs" / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    yield folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}


def test_no_link_is_dead_and_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert len(pages) > 20
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//"):
                assert link in page.links or parts.scheme == "data", f"{path}: loads {link}"
                continue
            base = site if path.name == "404.html" else path.parent  # 404.html is served from anywhere
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path}: {link}"
            if parts.fragment and target in pages and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in pages[target].anchors, f"{path}: {link}"


def test_references_are_generated_from_the_code(site: Path) -> None:
    commands = (site / "reference" / "commands" / "index.html").read_text(encoding="utf-8")
    for verb in VERBS:
        assert f"gigapath {verb}" in commands
    assert "--mpp-tolerance" in commands
    python = (site / "reference" / "python" / "index.html").read_text(encoding="utf-8")
    assert "read_features" in python and "create_model" in python


def test_search_finds_pages(site: Path) -> None:
    index = (site / "search" / "search_index.json").read_text(encoding="utf-8")
    assert "guides/privacy/" in index and "mpp-tolerance" in index
