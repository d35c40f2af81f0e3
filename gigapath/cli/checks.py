"""What is wrong with a verb's inputs as far as paths, names and this machine tell: said before torch is imported."""

import dataclasses
from collections.abc import Iterator, Mapping
from inspect import BoundArguments, Parameter
from pathlib import Path
from typing import Any

from gigapath.machine import check_device
from gigapath.releases import HUB_PREFIXES, RELEASES, check_encoder

# option or argument -> what has to exist there; other names are checked below, or by the verb itself
_PATHS = {
    "slides": "a slide, a folder or a manifest",
    "tiles": "a folder or file of tiles",
    "labels": "a CSV of labels",
    "splits": "a folder of split files",
    "coordinates": "a folder",
    "maps": "a folder made by gigapath map",
    "pcam_meta": "a folder",
    "weights": "a folder with pytorch_model.bin and slide_encoder.pth",
    "reference": "a file made by scripts/make_reference.py",
    "panda": "a folder",
    "patients": "a CSV of patients",
}


def check_inputs(bound: BoundArguments) -> None:
    """Refuse what can't be right, by the names that options and arguments bear in every verb.

    Raises:
        FileNotFoundError, ValueError: names the option.
    """
    given = {name: value for name, value in _values(bound) if value not in (None, "", ())}
    flags = {name: name.upper() for name, value in bound.signature.parameters.items() if _by_place(value)}
    for name in _PATHS.keys() & given.keys():
        paths = given[name] if isinstance(given[name], tuple) else (given[name],)
        for path in paths:
            flag = flags.get(name, _flag(name))
            if not isinstance(path, str):  # a measurement's --tiles is a number
                continue
            if path.endswith(".gz"):
                raise ValueError(f"{flag}: expected {_PATHS[name]}, got {path!r}, which is packed. Unpack it: gunzip.")
            if not Path(path).expanduser().exists():
                raise FileNotFoundError(f"{flag}: expected {_PATHS[name]}, got {path!r}, which does not exist.")
    for kind in ("tile", "slide"):
        if f"{kind}_encoder" in given:
            check_encoder(kind, given[f"{kind}_encoder"])
    _check_devices(given)
    head = Path(given.get("checkpoint", "head.json"))
    if "checkpoint" in given and not (head.is_file() or (head / "head.json").is_file()):
        raise FileNotFoundError(
            f"{flags.get('checkpoint', '--checkpoint')}: expected a fitted head (a folder such as OUT/fold_0), got "
            f"{given['checkpoint']!r}, which holds no head.json. Has its run ended?"
        )
    for name in ("pretrained", "init"):
        weights = given.get(name, "")
        known = weights in ("", *RELEASES) or weights.startswith(HUB_PREFIXES)
        if not known and not Path(weights).expanduser().exists():
            raise FileNotFoundError(
                f"{_flag(name)}: expected {', '.join(RELEASES)}, hf_hub:REPO, the path of a checkpoint, or '' for new "
                f"weights, got {weights!r}. Check the name or the path."
            )
    # `check` looks at files of every kind, of several encoders too, and needs no torch to say what is wrong.
    if "features" in given and "describe" not in bound.signature.parameters:
        from gigapath.features.reading import find_feature_files  # numpy, h5py

        find_feature_files(given["features"])


def _check_devices(given: Mapping[str, Any]) -> None:
    if given.get("engine") == "ray":  # the workers' machines count
        return
    check_device(given.get("device", "auto"))
    for name in given.get("devices", "").split(","):
        if name and not name.strip().isdigit():
            check_device(name.strip(), "--devices")


def _values(bound: BoundArguments) -> Iterator[tuple[str, Any]]:
    for name, value in bound.arguments.items():
        if dataclasses.is_dataclass(value):
            yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        else:
            yield name, value


def _by_place(parameter: Parameter) -> bool:
    return parameter.kind is Parameter.POSITIONAL_ONLY


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
