"""The table of other tools' recipes: the guide shows it as it is, and every entry can be used."""

from pathlib import Path

import pytest

from gigapath.features import parse_embedding
from gigapath.features.slide_vectors import DEFAULT, ORDERS, PLACES, PRECISIONS, RECIPES

GUIDE = Path(__file__).parent.parent / "docs/guides/whose-embedding.md"
NAMED = {"default": DEFAULT, **RECIPES}


def rows() -> str:
    lines = ["| name | tool | readout | order of tiles | places of tiles | precision | its tiles |", "|---" * 7 + "|"]
    for name, recipe in NAMED.items():
        order = "row-major" if recipe.order == "row-major" else f"as stored; its own files: {recipe.own_order}"
        places = PLACES[recipe.places] + (", in float16" if recipe.half_places else "")
        precision = " / ".join(dict.fromkeys(PRECISIONS[each] for each in recipe.precision))
        precision += "" if recipe.evaluated else "; dropout on"
        cells = (f"`{name}`", recipe.tool, f"`{recipe.readout}`", order, places, precision, recipe.tiles)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def remedies() -> str:
    lines = [f"| {recipe.tool} | {recipe.remedy} |" for recipe in RECIPES.values()]
    return "\n".join(["| tool | what to change |", "|---|---|", *lines])


def test_guide_shows_the_table() -> None:
    text = GUIDE.read_text()
    assert rows() in text and remedies() in text


@pytest.mark.parametrize("name", NAMED)
def test_every_recipe_names_what_exists(name: str) -> None:
    recipe = NAMED[name]
    parse_embedding(recipe.readout)
    assert recipe.order in ORDERS and recipe.places in PLACES and set(recipe.precision) <= set(PRECISIONS)
    assert (recipe == DEFAULT) == (name == "default")
    # Each differs from the usual embedding by what the table says.
    shown = [line.split(" | ")[2:6] for line in rows().splitlines()[2:]]
    assert shown.index(shown[list(NAMED).index(name)]) == list(NAMED).index(name)
