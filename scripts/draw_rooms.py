"""The rooms of `gigapath/` and the order of their imports, and the picture of both.

    python scripts/draw_rooms.py      writes docs/develop/rooms.svg from the imports as they are

A room is a folder or a file beside `gigapath/__init__.py`. A room may import from the rows below its own, never
sideways or up; tests/test_architecture.py holds this list against the imports.
"""

import ast
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gigapath"
PICTURE = ROOT / "docs" / "develop" / "rooms.svg"

# From the bottom up. In a row the rooms know nothing of each other.
LAYERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "facts, files, words",
        (
            *("releases", "options", "files", "file_names", "findings", "tables", "text"),
            *("machine", "devices", "progress", "read_ahead"),
        ),
    ),
    ("fetching; the mathematics", ("hub", "longnet", "pos_embed")),
    ("feature files, checkpoints", ("features", "weights")),
    ("one slide", ("preprocessing",)),
    ("models", ("tile_transform", "standin", "slide_encoder")),
    ("models", ("tile_architectures", "classification_head", "torchscale")),
    ("models", ("tile_encoder",)),
    ("many slides; honest scores", ("cohort", "evaluation")),
    ("slide to vectors", ("embedding",)),
    ("fitted on frozen embeddings", ("linear_probe",)),
    ("what is fitted", ("finetune",)),
    ("what is fitted without labels", ("pretraining",)),
    ("what is looked at", ("maps", "report")),
    ("published calls; self-test", ("pipeline", "doctor")),
    ("command line", ("cli",)),
    ("verbs as functions", ("api",)),
)
RANK = {room: rank for rank, (_, rooms) in enumerate(LAYERS) for room in rooms}

_ROW, _BOX, _GAP, _LEFT, _MARGIN = 62, 30, 10, 190, 16


def imports_between_rooms() -> dict[str, dict[str, int]]:
    """room -> rooms that it imports from, with how many files do."""
    found: dict[str, dict[str, int]] = {room: {} for room in RANK}
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in RANK:
            continue
        others = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            others |= {name.split(".")[1] for name in names if name.startswith("gigapath.")}
        for other in (others & RANK.keys()) - {room}:
            found[room][other] = found[room].get(other, 0) + 1
    return found


def needed(imports: dict[str, dict[str, int]]) -> list[tuple[str, str]]:
    """The imports that do not follow from others: a room that is reached by way of another needs no line of its own.

    Those of the lowest row, which everybody has, are left out.
    """
    reached: dict[str, set[str]] = {}
    for room in sorted(RANK, key=lambda room: RANK[room]):
        reached[room] = set(imports[room]).union(*(reached[other] for other in imports[room]))
    return [
        (room, other)
        for room, others in imports.items()
        for other in others
        if RANK[other] and not any(other in reached[between] for between in others)
    ]


def draw() -> str:
    """The picture as SVG: a row a layer, the newcomer's way in at the top; a line goes down to what a room imports."""
    sides = {room: 7.3 * len(room) + 16 for room in RANK}
    gaps = [_GAP if len(rooms) > 5 else 7 * _GAP for _, rooms in LAYERS]  # room for the lines between
    spans = [sum(sides[room] + gap for room in rooms) - gap for gap, (_, rooms) in zip(gaps, LAYERS, strict=True)]
    places, boxes = {}, []
    for rank, (title, rooms) in enumerate(LAYERS):
        x, y = _LEFT + (max(spans) - spans[rank]) / 2, _MARGIN + (len(LAYERS) - 1 - rank) * _ROW
        for room in rooms:
            places[room] = x + sides[room] / 2, y
            boxes.append(
                f'<rect x="{x:.0f}" y="{y}" width="{sides[room]:.0f}" height="{_BOX}" rx="5"/>'
                f'<text x="{places[room][0]:.0f}" y="{y + 20}" text-anchor="middle">{room}</text>'
            )
            x += sides[room] + gaps[rank]
        boxes.append(f'<text class="layer" x="{_MARGIN}" y="{y + 20}">{escape(title)}</text>')
    lines = [
        f'<line x1="{places[room][0]:.0f}" y1="{places[room][1] + _BOX}" '
        f'x2="{places[other][0]:.0f}" y2="{places[other][1]}"/>'
        for room, other in sorted(needed(imports_between_rooms()))
    ]
    height = 2 * _MARGIN + len(LAYERS) * _ROW - (_ROW - _BOX)
    style = (
        "text{font:13px sans-serif;fill:#1b2a33}.layer{fill:#6b7780;font-size:12px}"
        "rect{fill:#eaf2f5;stroke:#3c7186}line{stroke:#3c7186;stroke-opacity:.6}"
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + max(spans) + _MARGIN:.0f} {height}">'
        f'<style>{style}</style><rect width="100%" height="100%" style="fill:#fff;stroke:none"/>'
        + "\n".join(["", *lines, *boxes, ""])
        + "</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw())
