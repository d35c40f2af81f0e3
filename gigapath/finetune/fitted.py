"""A fitted head as a file (its weights, the label map, what the features were made of, thresholds and temperature), and
on other slides: predictions, and its test on another cohort."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gigapath.cohort.stage import check_same
from gigapath.devices import AUTOCAST_TYPES, at_most_threads, computing, resolve_device
from gigapath.evaluation.calibration import Calibration, decisions, outputs, scale_count, threshold_count
from gigapath.evaluation.labels import Labels, Task, bare_name, shown, task_from
from gigapath.evaluation.results import (
    EVALUATION,
    RESULTS,
    TERMS,
    Predicted,
    Results,
    Scores,
    TestSet,
    groups_of,
    lock_words,
    numbers_csv,
    numbers_of,
    pictures_of,
    score,
    truth_columns,
    write_results,
)
from gigapath.evaluation.scores import Predictions
from gigapath.evaluation.splits import TABLE
from gigapath.features import FeatureFileError
from gigapath.features.folders import SUFFIXES, find_feature_files
from gigapath.files import check_replaceable, sha256_of, small_json, write_json_atomic, write_text_atomic
from gigapath.finetune.data import Bags, FileBags, check_folder, join_features, look_at_all, prints_of
from gigapath.finetune.heads import build_head, pack
from gigapath.finetune.loop import load_tensors, save_tensors
from gigapath.finetune.options import JoinOptions, ModelOptions
from gigapath.machine import available_cores
from gigapath.options import from_dict, to_dict
from gigapath.read_ahead import read_ahead
from gigapath.weights import assign_weights

HEAD = "head.json"
TENSORS = "head.safetensors"
FORMAT = 1
_KEYS = (
    "task", "model", "input_dim", "features", "temperature", "thresholds", "fitted_on", "precision", "tensors", "sha256"
)  # fmt: skip


@dataclass(frozen=True)
class FittedHead:
    """A model that can be applied to other cohorts.

    Attributes:
        input_dim: width of the tile embeddings.
        made: what the features are made of (encoder, mpp, numerics), as in `data.FileFacts`.
        precision: in which it was evaluated.
        sha256: of the file of its tensors; "" of a head that was never in one.
    """

    model: nn.Module
    task: Task
    options: ModelOptions
    input_dim: int
    made: dict[str, Any]
    calibration: Calibration
    precision: str
    sha256: str = ""

    @property
    def expects(self) -> dict[str, Any]:
        """What `look_at_all` holds features against: the width, encoder, mpp and numerics of those that trained."""
        return {"width": self.input_dim, "made": self.made}

    def predict(self, bags: Bags, rows: Sequence[int], device: torch.device) -> npt.NDArray[np.float64]:
        """`calibration.outputs` of the rows, such as probabilities (len(rows), C), slide by slide, all tiles in the
        file's order; the head stays on the device."""
        self.model.to(device).eval()
        found = []
        with torch.no_grad(), at_most_threads(available_cores()):
            for bag in read_ahead(bags.__getitem__, rows, threads=2):
                with computing(self.precision, device):
                    logits = self.model.forward_packed(*pack([bag], device))  # type: ignore[operator]
                found.append(logits[0].double().cpu().numpy())
        return outputs(np.stack(found), self.task, self.calibration)


def save_head(folder: Path, head: FittedHead) -> None:
    """Write `head.safetensors` and then `head.json`, which names its checksum."""
    save_tensors(folder / TENSORS, dict(head.model.state_dict()))
    write_json_atomic(
        folder / HEAD,
        {
            "format": FORMAT,
            "task": head.task.to_dict(),
            "model": to_dict(head.options),
            "input_dim": head.input_dim,
            "features": head.made,
            "temperature": head.calibration.temperature,
            "thresholds": list(head.calibration.thresholds),
            "fitted_on": head.calibration.fitted_on,
            **({"scale": list(head.calibration.scale)} if head.calibration.scale else {}),
            "precision": head.precision,
            "tensors": TENSORS,
            "sha256": sha256_of(folder / TENSORS),
            "terms": TERMS,
        },
    )


def load_head(path: Path | str) -> FittedHead:
    """Read a fitted head from its folder (`OUT/fold_0`), its JSON or its tensors.

    Raises:
        FileNotFoundError: there is none.
        ValueError: not a head, or tensors that are not those of the JSON.
    """
    path = Path(path)
    folder = path.parent if path.name in (HEAD, TENSORS) else path
    file = folder / HEAD
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: expected a fitted head (a folder with {HEAD}, such as OUT/fold_0), found none. Has the run ended?"
        )
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        version = held["format"]
        lacking = sorted({*_KEYS} - held.keys()) if version == FORMAT else []
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: expected the JSON of a fitted head, got something else.") from error
    if version != FORMAT:
        raise ValueError(f"{file}: expected format {FORMAT}, got {version!r}. Another version of gigapath wrote it.")
    if held.get("unit") == "tile":
        raise ValueError(f"{file}: expected a head of slides, got one of tiles, which gigapath predict takes.")
    if lacking:
        raise ValueError(f"{file}: expected the JSON of a fitted head, got one without {lacking[0]}. Copy it anew.")
    tensors = folder / str(held["tensors"])
    if not tensors.is_file() or sha256_of(tensors) != held["sha256"]:
        raise ValueError(f"{tensors}: not the tensors that {HEAD} was written with. Copy both anew.")
    try:
        if held["precision"] not in {"fp32", *AUTOCAST_TYPES}:
            raise TypeError(held["precision"])
        task = task_from(held["task"], HEAD)
        options = from_dict(ModelOptions, held["model"])
        thresholds, scale = (tuple(map(float, held.get(key, ()))) for key in ("thresholds", "scale"))
        calibration = Calibration(float(held["temperature"]), thresholds, held["fitted_on"], scale)
        if len(thresholds) != threshold_count(task) or len(scale) != scale_count(task):
            raise TypeError(calibration)
        state = load_tensors(tensors)
        with torch.device("meta"):  # whatever sizes the JSON claims, only the tensors' own are laid out
            model = build_head(options, task, pretrained="", input_dim=held["input_dim"])
        assign_weights(HEAD, model, state)
    except (TypeError, AttributeError, RuntimeError, OverflowError) as error:  # words for numbers, sizes beyond all
        raise ValueError(f"{file}: expected the JSON of a fitted head, got a damaged one. Copy it anew.") from error
    made = held["features"]
    return FittedHead(model, task, options, held["input_dim"], made, calibration, held["precision"], held["sha256"])


def predict(
    checkpoint: Path | str,
    features: Sequence[Path | str],
    *,
    join: JoinOptions | None = None,
    device: str = "auto",
    out: Path | str | None = None,
    overwrite: bool = False,
    on_failed: Callable[[str], None] = lambda reason: None,
) -> Predicted:
    """Apply a fitted head to feature files; a file that can't be read is recorded and the others go on.

    Args:
        out: a CSV to write, or None; other content of that name stays, with a ValueError, without `overwrite`.
    """
    join, head, place = join or JoinOptions(), load_head(checkpoint), resolve_device(device)
    ids, shares_of = [], []
    failed: dict[str, str] = {}
    for path in find_feature_files(features):
        try:
            if path.suffix not in SUFFIXES:
                raise FeatureFileError(f"{path.name}: expected a feature file ({', '.join(SUFFIXES)}).")
            bags = FileBags([path], look_at_all([path], join, **head.expects), join.tile_size_level0)
            shares_of.append(head.predict(bags, [0], place)[0])
        except (FeatureFileError, FileNotFoundError, PermissionError) as error:
            failed[path.name] = str(error)
            on_failed(str(error))
            continue
        ids.append(bare_name(path))
    task = head.task
    shares = np.stack(shares_of) if shares_of else np.zeros((0, len(task.classes) + len(task.times)))
    predicted = decisions(shares, task, head.calibration)
    columns = numbers_of(shares, task)
    if out is not None:
        shown: dict[str, Sequence[str]] = {"slide_id": ids, "predicted": predicted}
        text = numbers_csv(shown, columns)
        check_replaceable(out, text, overwrite)
        write_text_atomic(out, text)
    rows = []
    for row, (slide_id, what) in enumerate(zip(ids, predicted, strict=True)):
        numbers = {name: float(column[row]) for name, column in columns.items()}
        rows.append({"slide_id": slide_id, "predicted": what, **numbers})
    return Predicted(rows, failed)


def evaluate_head(
    checkpoint: Path | str,
    features: Path | str | Sequence[Path | str],
    labels: Path | str,
    out: Path | str,
    *,
    join: JoinOptions | None = None,
    device: str = "auto",
    replicates: int = 2000,
    seed: int = 0,
    allow_seen: bool = False,
    lock: bool = False,
    overwrite: bool = False,
) -> Scores:
    """Test a frozen head (its label map, thresholds and temperature) on another cohort; nothing is fitted.

    Args:
        replicates: of the bootstrap; 0 for scores without intervals.
        lock: keep the digest of labels and features beside the labels; evaluations on what is locked are counted with
            or without it.
        overwrite: test again where the folder holds results of another head, test set or options.

    Raises:
        ValueError: results of another head or test set, or of other options, are there; labels or features that are not
            those that were locked, features of another width, encoder, mpp or numerics, labels that the head does not
            know, slides that trained the head.
    """
    for name, value in (("--replicates", replicates), ("--seed", seed)):
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}.")
    check_folder(out)
    join, head = join or JoinOptions(), load_head(checkpoint)
    joined, facts = join_features(labels, head.task, features, join, **head.expects)
    if not allow_seen:
        _refuse_seen(Path(checkpoint), joined.labels.slide_ids)
    prints = prints_of(facts)
    test_set = TestSet(Path(labels), joined.labels.digest, str(facts[0].made["encoder"] or ""), prints)
    test_set.evaluations()
    given: dict[str, Any] = {"head": head.sha256, "labels": joined.labels.digest, "features": prints}
    given |= {"replicates": replicates, "seed": seed}
    before = None if overwrite else small_json(Path(out) / RESULTS)
    if isinstance(before, dict):
        check_same(out, before.get("options") or {}, given)
    bags = FileBags(joined.files, facts, join.tile_size_level0)
    shares = head.predict(bags, range(len(joined.files)), resolve_device(device))
    labels_of, task = joined.labels, head.task
    predictions = predictions_of(labels_of, shares, task)
    found = score_slides(labels_of, predictions, task, head.calibration, replicates=replicates, seed=seed)
    name = Path(checkpoint).name
    details: dict[str, Any] = {"options": given, "checkpoint": name, "missing": list(joined.missing)}
    details |= {"fitted_here": "nothing", **groups_of(found, task)}
    if lock or test_set.file.is_file():
        details["locked_test_set"] = test_set.count(head.sha256)
        found = replace(found, notes=(*found.notes, lock_words(details["locked_test_set"])))
    notes = (*labels_of.class_notes(task.classes), *found.notes)
    results = Results(EVALUATION, task.described(), {"frozen head": found}, details=details, notes=notes)
    texts = {"predictions.csv": slides_csv(labels_of, shares, task, head.calibration)}
    pictures = pictures_of(found, task, f"{name} tested on {labels_of.source}")
    write_results(Path(out), results, texts=texts, pictures=pictures)
    return found


def predictions_of(labels: Labels, shares: npt.NDArray[np.float64], task: Task) -> Predictions:
    """What `calibration.outputs` gives of labelled slides, with their truth and patients."""
    patients = None if labels.patients is None else np.asarray(labels.patients)
    return Predictions(
        labels.truth,
        shares,
        task.classes,
        groups=patients,
        ordinal=task.ordinal,
        times=task.times,
        horizons=task.horizons,
    )


def score_slides(
    labels: Labels, predictions: Predictions, task: Task, how: Calibration | None, *, sites: bool = True, **more: Any
) -> Scores:
    """`score` over patients and, with `sites`, by site, scanner and stain where the labels know them."""
    of_sites = np.asarray(labels.sites) if sites and labels.sites is not None else None
    strata = labels.strata if sites else None
    known = labels.patients is not None
    return score(predictions, patients=known, sites=of_sites, strata=strata, task=task, how=how, **more)


def slides_csv(labels: Labels, shares: npt.NDArray[np.float64], task: Task, how: Calibration) -> str:
    """One row a slide: id, patient and site where known, truth, what is predicted, probabilities or risks."""
    columns: dict[str, Sequence[str]] = {"slide_id": labels.slide_ids}
    columns |= {"patient_id": labels.patients} if labels.patients else {}
    columns |= {"site": labels.sites} if labels.sites else {}
    columns |= truth_columns(labels.truth, task) | {"predicted": decisions(shares, task, how)}
    return numbers_csv(columns, numbers_of(shares, task))


def _refuse_seen(checkpoint: Path, slide_ids: Sequence[str]) -> None:
    """Refuse slides that trained the head, as far as the split table of its run tells: a fold's folder lies beside it,
    a control's in one of the fold."""
    folder = (checkpoint if checkpoint.is_dir() else checkpoint.parent).absolute()
    fold = next((place for place in (folder, *folder.parents) if (place.parent / TABLE).is_file()), None)
    if fold is None:
        return
    with (fold.parent / TABLE).open(newline="", encoding="utf-8") as file:
        sets = {row.get("slide_id"): row.get(fold.name, "") for row in csv.DictReader(file)}
    seen = [slide_id for slide_id in slide_ids if sets.get(slide_id) in ("train", "val")]
    if seen:
        raise ValueError(
            f"{len(seen):,} of the slides trained or chose this head ({shown(seen)}). Test on others, or insist "
            "with --allow-leakage."
        )
