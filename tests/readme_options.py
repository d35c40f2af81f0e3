"""The README's tables of commands and options, written from the command line itself.

python tests/readme_options.py      rewrites them in README.md; a test holds that they are up to date
"""

import re
import sys
from pathlib import Path
from typing import Any, get_args, get_origin

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def options_of(app: Any, verb: str) -> dict[str, tuple[str, str]]:
    """option or argument of a verb -> (default, meaning)."""
    from gigapath.cli.arguments import shown_default

    found = {}
    for argument in app[verb].assemble_argument_collection(parse_docstring=True):
        if argument.children or not argument.parse:
            continue
        meaning = argument.parameter.help.replace(":\n", ": ").replace("\n", "; ")
        default = None if argument.required else shown_default(argument.field_info.default)
        stated = re.search(r" \(default: (.*)\)$", meaning)
        if stated:
            meaning, default = meaning[: stated.start()], stated[1]
        kinds = (argument.hint, *get_args(argument.hint))
        name = argument.name
        if name.startswith("-") and bool not in kinds:
            kind = "N" if int in kinds else "X" if float in kinds else "NAME"
            name += " " + (argument.parameter.metavar or "|".join(argument.get_choices() or ()) or kind)
            name += " ..." if get_origin(argument.hint) is tuple else ""
        found[name.replace("|", "\\|")] = default or "", meaning.replace("|", "\\|")
    return found


def tables() -> dict[str, str]:
    """name of a marked place in the README -> what stands there."""
    from gigapath.cli.main import VERBS, app

    commands = ["| command | what it does |", "|---|---|"]
    commands += [f"| `gigapath {verb}` | {line} |" for verb, (_, line) in VERBS.items()]
    rows: dict[tuple[str, str, str], list[str]] = {}
    for verb in VERBS:
        for name, (default, meaning) in options_of(app, verb).items():
            rows.setdefault((name, default, meaning), []).append(verb)
    options = ["| option | of | default | meaning |", "|---|---|---|---|"]
    for (name, default, meaning), verbs in rows.items():
        options.append(f"| `{name}` | {', '.join(verbs)} | {default} | {meaning} |")
    return {"commands": "\n".join(commands), "options": "\n".join(options)}


def with_tables(readme: str) -> str:
    """The README's text with its marked places filled anew."""
    for name, table in tables().items():
        start, end = f"<!-- {name}: tests/readme_options.py -->\n", f"<!-- end of {name} -->"
        before, rest = readme.split(start)
        readme = before + start + table + "\n" + end + rest.split(end, 1)[1]
    return readme


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    README.write_text(with_tables(README.read_text()))
