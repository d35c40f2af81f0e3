"""The README's tables of commands and options, written from the command line itself.

python tests/readme_options.py      rewrites them in README.md; a test holds that they are up to date
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """verb -> its parser, in the order of `gigapath --help`."""
    from gigapath.cli.main import VERBS, build_parser

    found = {}
    for verb in VERBS:
        for action in build_parser(verb)._actions:
            if isinstance(action, argparse._SubParsersAction):
                found[verb] = action.choices[verb]
    return found


def options_of(parser: argparse.ArgumentParser) -> dict[str, tuple[str, str]]:
    """option or argument -> (default, meaning); a verb of verbs is walked through, its words before the option."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._SubParsersAction):
            for word, inner in action.choices.items():
                found.update({f"{word} {name}": row for name, row in options_of(inner).items()})
            continue
        meaning = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
        default = re.search(r" \(default: (.*)\)$", meaning)
        if default:
            meaning = meaning[: default.start()]
        name, *_ = [*action.option_strings, str(action.metavar or action.dest)]
        if action.option_strings and action.nargs != 0:
            name += " " + _value(action)
        elif action.choices:
            meaning += ": " + ", ".join(map(str, action.choices))
        cell = {"|": "\\|"}
        found[name.translate(str.maketrans(cell))] = (
            default.group(1) if default else "",
            meaning.translate(str.maketrans(cell)),
        )
    return found


def _value(action: argparse.Action) -> str:
    """What follows an option: its own placeholder, its words, N for a whole number, X for another one."""
    if action.metavar:
        value = str(action.metavar)
    elif action.choices:
        value = "|".join(map(str, action.choices))
    else:
        value = {int: "N", float: "X"}.get(action.type, "NAME")  # type: ignore[arg-type, call-overload]
    return f"{value} ..." if action.nargs == "+" else value


def tables() -> dict[str, str]:
    """name of a marked place in the README -> what stands there."""
    from gigapath.cli.main import VERBS

    commands = ["| command | what it does |", "|---|---|"]
    commands += [f"| `gigapath {verb}` | {line} |" for verb, (_, line) in VERBS.items()]
    rows: dict[tuple[str, str, str], list[str]] = {}
    for verb, parser in parsers().items():
        for name, (default, meaning) in options_of(parser).items():
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
