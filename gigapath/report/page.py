"""The page: everything in one HTML file, data as JSON, styles and scripts inlined, no address but those of pictures.

What comes from a run reaches the page through JSON alone, and the script sets text, never markup. Scripts other than
ours do not run: the page's own policy lists the hashes of those that may.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any

SCRIPTS = ("openseadragon/openseadragon.min.js", "report.js")
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def render(title: str, data: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        title: of the page.
        data: plain JSON values, what `report.js` shows.
    """
    scripts = [script_text(read_asset(name)) for name in SCRIPTS]
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src 'self' file: data:",
            "style-src 'unsafe-inline'",
            "script-src " + " ".join(f"'sha256-{_digest(script)}'" for script in scripts),
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    parts = {
        "title": html.escape(title),
        "policy": html.escape(policy, quote=True),
        "style": read_asset("report.css"),
        "data": json_for_html(data),
        "viewer_licence": html.escape(read_asset("openseadragon/LICENSE.txt").strip()),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    return _PLACE.sub(lambda match: parts[match[1]], read_asset("report.html"))


def json_for_html(data: Any) -> str:
    """JSON that can stand within a script element: nothing in it ends the element or begins another."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def script_text(source: str) -> str:
    """A script as it stands in the page: without its map's address, and with nothing that ends its element."""
    source = re.sub(r"^//# sourceMappingURL=.*$", "", source, flags=re.MULTILINE).strip()
    return re.sub(r"</(script)", r"<\\/\1", source, flags=re.IGNORECASE)


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def read_asset(name: str) -> str:
    """The text of a file of the folder `assets`."""
    path = importlib.resources.files("gigapath.report").joinpath("assets")
    for part in name.split("/"):
        path = path.joinpath(part)
    return path.read_text(encoding="utf-8")
