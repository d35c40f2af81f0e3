"""Links from notebooks to pages: `../guides/maps.md` works in Jupyter, and on the site becomes the page's address."""

import logging
import posixpath
import re
from typing import Any

log = logging.getLogger("mkdocs.hooks")
LINK = re.compile(r'href="([^":#]+\.md)(#[^"]*)?"')


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a notebook; of pages in Markdown mkdocs has done it."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def address(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match[1]))
        file = files.get_file_from_path(path)
        if file is None:
            log.warning("%s links to %s, which is not there", page.file.src_uri, path)
            return match[0]
        return f'href="{file.url_relative_to(page.file)}{match[2] or ""}"'

    return LINK.sub(address, html)
