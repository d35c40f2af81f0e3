"""A study: models, splits, comparisons and outside test sets in one YAML file, run with one command.

Each part is the run of an existing verb in a folder of its own, so that whoever wants to can run it alone. A part is
done once its results.json is there; a study that was killed goes on with the others.
"""

import difflib
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from cyclopts import CycloptsError, Parameter

import gigapath
from gigapath.cli.arguments import EXIT_STOPPED, Folder, verb
from gigapath.cohort.stage import Ownership, differences
from gigapath.files import read_json, sha256_of, write_json_atomic
from gigapath.options import LEAVE_SITE_OUT

RECORD = "study.json"
# Keys of the file with what stands where it says nothing; paths are relative to the file's folder.
KEYS: dict[str, Any] = {
    "title": "",
    "labels": "",  # CSV of the cohort
    "embeddings": "",  # folder of slide embeddings, for probes
    "features": "",  # folder of tile embeddings, for fine-tuning
    "task": "",  # name or YAML file, for fine-tuning; probes take it too, unless they name a label
    "splits": 5,  # folds, leave-site-out, or a folder of split files for fine-tuning
    "seed": 0,
    "replicates": 2000,
    "models": {},  # name -> probe or finetune -> options of that verb
    "primary": "auroc",  # the score that decides
    "compare": [],  # pairs of models
    "outside": {},  # name -> labels, and features (for fine-tuned heads) or embeddings (for probes) of a test set
    "lock": False,  # lock those test sets
}
_NEEDS = {"probe": ("embeddings",), "finetune": ("features", "task")}
# What the study says for all its models, so that none says it for itself.
_SHARED = {"labels", "features", "task", "folds", "splits", "seed", "replicates", "out", "config", "dry_run", "lock"}
_SHARED |= {"test_labels", "test_embeddings"}

Study = dict[str, Any]


@verb
def study(file: Annotated[str, Parameter(name="YAML")], /, *, out: Folder, dry_run: bool = False) -> int:
    """Run what is not done yet, a part after the other, then write tables, plot and checklist; 75 when a signal came,
    and the same command goes on from there.

    Args:
        file: the study: labels, models, splits, primary score, comparisons, outside test sets
        out: the study's folder; what is done there is kept
        dry_run: show the commands and run nothing
    """
    planned, folder, at = read_study(Path(file)), Path(out), _paths_of(Path(file))
    if dry_run:
        for part, words in _parts(planned, at).items():
            print(f"{part}: gigapath {shlex.join(words)}")
        return 0
    identity = json.loads(json.dumps(_identity(planned, at)))
    with Ownership({folder: identity}):
        if (folder / RECORD).is_file():
            before = read_json(folder / RECORD, keys=("identity",), mend="Choose another --out.")["identity"]
            if changed := differences(before, identity):
                raise ValueError(f"--out: {folder.name} holds another study: {'; '.join(changed[:3])}. Choose another.")
        write_json_atomic(folder / RECORD, {"identity": identity})
        for find in (_parts, lambda planned, at: _tests(planned, at, folder)):  # heads are tested once they are there
            for part, words in find(planned, at).items():
                if status := _run(folder / part, part, words):
                    return status
        from gigapath.report.study import write_study

        for line in write_study(folder, planned, Path(at(planned["labels"]))):
            print(line)
    print(f"Results: {out}; gigapath report {out} shows them.")
    return 0


def _run(place: Path, part: str, words: list[str]) -> int:
    """Run a part that is not done; its exit status."""
    from gigapath.cli.main import app, run_verb

    if (place / "results.json").is_file():
        print(f"{part}: done before")
        return 0
    print(f"{part}: gigapath {shlex.join(words)}")
    status = run_verb(app, [*words, "--out", str(place)])
    if status and status != EXIT_STOPPED:
        print(f"gigapath study: {part} failed. Correct it, and run the study again to go on.", file=sys.stderr)
    return status


def _paths_of(file: Path) -> Callable[[str], str]:
    """What makes a path of the study file one of this process."""
    return lambda name: str(file.parent / Path(name).expanduser())


def _parts(planned: Study, at: Callable[[str], str]) -> dict[str, list[str]]:
    """Folder in the study's -> the words of the command that fills it."""
    found = {}
    for name, model in planned["models"].items():
        ((what, options),) = model.items()
        splits = ["--folds", str(planned["splits"])]
        if what == "probe":
            words = _probe(planned, options, at)
        else:
            words = [what, *_task(planned, at), "--features", at(planned["features"])]
            if isinstance(planned["splits"], str) and planned["splits"] != LEAVE_SITE_OUT:
                splits = ["--splits", at(planned["splits"])]
        shared = ["--labels", at(planned["labels"]), *_words({key: planned[key] for key in ("seed", "replicates")})]
        found[f"models/{name}"] = [*words, *splits, *shared, *_words(options)]
    return found


def _task(planned: Study, at: Callable[[str], str]) -> list[str]:
    return ["--task", planned["task"] if "." not in planned["task"] else at(planned["task"])]


def _own(planned: Study, options: Mapping[str, Any]) -> bool:
    """Whether a probe says itself what its classes are, instead of the study's task."""
    return not planned["task"] or not {"label", "positive"}.isdisjoint(options)


def _probe(planned: Study, options: Mapping[str, Any], at: Callable[[str], str]) -> list[str]:
    return ["probe", at(planned["embeddings"]), *([] if _own(planned, options) else _task(planned, at))]


def _tests(planned: Study, at: Callable[[str], str], out: Path) -> dict[str, list[str]]:
    """Likewise of the tests on every outside test set: of every fold's head, and of a probe fitted on all slides."""
    found = {}
    for place, test in planned["outside"].items():
        for name, model in planned["models"].items():
            options = model.get("probe", {})
            if options and "embeddings" in test:
                at_last = {"test-embeddings": at(test["embeddings"]), "test-labels": at(test["labels"])}
                shared = {key: planned[key] for key in ("seed", "replicates", "lock")}
                found[f"outside/{place}/{name}/all"] = [
                    *_probe(planned, options, at), "--labels", at(planned["labels"]),
                    *_words({**at_last, **shared, **options}),
                ]  # fmt: skip
            for fold in [] if options or "features" not in test else sorted((out / "models" / name).glob("fold_*/")):
                words = ["predict", str(fold), at(test["features"]), "--labels", at(test["labels"])]
                found[f"outside/{place}/{name}/{fold.name}"] = [
                    *words, *_words({key: planned[key] for key in ("seed", "replicates", "lock")})
                ]  # fmt: skip
    return found


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    """Options as a command line has them."""
    for name, value in options.items():
        if not (value is None or value is False):
            yield "--" + str(name).replace("_", "-")
            yield from () if value is True else map(str, value) if isinstance(value, list) else (str(value),)


def _identity(planned: Study, at: Callable[[str], str]) -> dict[str, Any]:
    """What must be the same for a study to go on: what its file says, its tables, names and sizes of its features."""
    places = [planned, *planned["outside"].values()]
    tables = {place["labels"]: sha256_of(Path(at(place["labels"]))) for place in places}
    folders = {place[key] for place in places for key in ("embeddings", "features") if place.get(key)}
    files = [file for folder in sorted(folders) for file in sorted(Path(at(folder)).rglob("*.*")) if file.is_file()]
    sizes = hashlib.sha256("".join(f"{file.name} {file.stat().st_size}\n" for file in files).encode()).hexdigest()
    return {**planned, "tables": tables, "features_of_all": sizes, "version": gigapath.__version__}


def read_study(path: Path) -> Study:
    """Read a study file, and check all of it before anything runs: keys, names, and the options of every part.

    Raises:
        FileNotFoundError, ValueError: one sentence that names the key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a YAML file of a study, found none.")
    from gigapath.evaluation.labels import KeysOnce, load_task

    who = path.name
    try:
        content = KeysOnce(path.read_text(encoding="utf-8")).get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # of bytes and dates that are none, too
        twice = f" without {error.problem}" if isinstance(error, yaml.constructor.ConstructorError) else ""
        raise ValueError(f"{who}: expected YAML{twice}, got something else.") from error
    planned = {**KEYS, **_known(content, who, KEYS)}
    for key, value in planned.items():
        kinds = (int, str) if key == "splits" else (type(KEYS[key]),)
        if type(value) not in kinds or (type(value) is int and value < 0):
            expected = _KINDS["splits" if key == "splits" else kinds[-1]]
            raise ValueError(f"{who}, {key}: expected {expected}, got {value!r}.")
    for key in ("labels", "models"):
        if not planned[key]:
            raise ValueError(f"{who}: expected the key {key}, which is not there.")
    for name, model in planned["models"].items():
        where = f"{who}, models, {name}"
        if Path(str(name)).name != name or len(_known(model, where, _NEEDS)) != 1:
            raise ValueError(f"{where}: expected a plain name, and probe or finetune with its options.")
        ((what, options),) = model.items()
        shared = [key for key in _known(options, where) if str(key).replace("-", "_") in _SHARED]
        if shared:
            raise ValueError(f"{where}: {shared[0]} is the same for all models. Say it as a key of the study.")
        lacking = [key for key in _NEEDS[what] if not planned[key]]
        if lacking:
            raise ValueError(f"{who}: expected the key {lacking[0]}, which the model {name} needs.")
        if what == "probe" and ("," in str(options.get("embedding", ",")) or str(options.get("embedding")) == ""):
            raise ValueError(f"{where}: expected embedding and one name, such as tile-mean.")
    for pair in planned["compare"]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{who}, compare: expected pairs such as [this, that], got {pair!r}.")
        if len(_known(dict.fromkeys(map(str, pair)), f"{who}, compare", planned["models"])) < 2:
            raise ValueError(f"{who}, compare: expected two models, got {pair[0]} twice.")
    for name, test in planned["outside"].items():
        _known(test, f"{who}, outside, {name}", ("labels", "features", "embeddings"))
    at = _paths_of(path)
    for place in (planned, *planned["outside"].values()):
        for name in (str(place[key]) for key in ("labels", "embeddings", "features") if place.get(key)):
            if not Path(at(name)).exists():
                raise FileNotFoundError(f"{who}: {name} does not exist. Paths are relative to the study file's folder.")
    from gigapath.cli.main import app, in_one_line
    from gigapath.evaluation.results import score_names

    probes = [model["probe"] for model in planned["models"].values() if "probe" in model]
    tasks = [load_task(_task(planned, at)[1])] if planned["task"] else []
    names = [score_names(task) for task in [*tasks, *(None for options in probes if _own(planned, options))]]
    _known({planned["primary"]: None}, f"{who}, primary", [name for each in names for name in each])
    for part, words in _parts(planned, at).items():
        try:
            app.parse_args([*words, "--out", "OUT"], print_error=False, exit_on_error=False)
        except (CycloptsError, ValueError) as error:
            raise ValueError(f"{who}, {part.replace('/', ', ')}: {in_one_line(error)}") from None
    for name, test in planned["outside"].items():
        tested = ("features", "finetune"), ("embeddings", "probe")
        if "labels" not in test or not any(
            key in test and any(what in model for model in planned["models"].values()) for key, what in tested
        ):
            raise ValueError(
                f"{who}, outside, {name}: expected labels and features (to test what is fine-tuned) or embeddings (to "
                "test probes)."
            )
    return planned


_KINDS: dict[Any, str] = {
    "splits": "a number of folds, leave-site-out or a folder",
    str: "text",
    int: "a whole number from 0",
    bool: "true or false",
    dict: "names with values",
    list: "a list",
}


def _known(content: Any, who: str, keys: Collection[str] = ()) -> Mapping[str, Any]:
    """A mapping, none of whose keys is unknown; the nearest one is suggested."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{who}: expected keys and values, got {type(content).__name__}.")
    for key in content if keys else ():
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(keys)}."
            raise ValueError(f"{who}: unknown key {key!r}; {hint}")
    return content
