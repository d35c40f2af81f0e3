"""A fitted head on other slides: predictions, and the test of a frozen head on another cohort."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.devices import resolve_device
from gigapath.evaluation.labels import bare_name, join_labels, read_labels, shown
from gigapath.evaluation.splits import TABLE
from gigapath.features import FeatureFileError
from gigapath.features.reading import SUFFIXES, find_feature_files
from gigapath.files import write_text_atomic
from gigapath.finetune import report
from gigapath.finetune.data import FileBags, FileFacts, look_at_all
from gigapath.finetune.evaluation import CohortResult, decisions, evaluate_cohort
from gigapath.finetune.fitted import FittedHead, load_head
from gigapath.finetune.inputs import check_folder
from gigapath.finetune.options import JoinOptions


@dataclass(frozen=True)
class Predicted:
    """Predictions for some slides, and the reasons why others have none."""

    rows: list[dict[str, Any]]
    failed: dict[str, str]


def predict(
    checkpoint: Path | str,
    features: Sequence[Path | str],
    *,
    join: JoinOptions | None = None,
    device: str = "auto",
    out: Path | str | None = None,
    on_failed: Callable[[str], None] = lambda reason: None,
) -> Predicted:
    """Apply a fitted head to feature files; a file that can't be read is recorded and the others go on.

    Args:
        checkpoint: the folder of a fitted head.
        features: feature files, and folders of them.
        join: how files are read.
        device: where it runs.
        out: a CSV to write, or None.
        on_failed: told why a file has no prediction.
    """
    join, head, place = join or JoinOptions(), load_head(checkpoint), resolve_device(device)
    files = find_feature_files(features)
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    for path in files:
        try:
            facts = _look(head, path, join)
            said = head.predict(FileBags([path], [facts], join.tile_size_level0), [0], place)
        except (FeatureFileError, FileNotFoundError, PermissionError) as error:
            failed[path.name] = str(error)
            on_failed(str(error))
            continue
        predicted = decisions(said, head.task, head.calibration)[0]
        shares = {f"p_{name}": float(share) for name, share in zip(head.task.classes, said[0], strict=True)}
        rows.append({"slide_id": bare_name(path), "predicted": predicted, **shares})
    if out is not None:
        write_text_atomic(out, _csv(head, rows))
    return Predicted(rows, failed)


def _look(head: FittedHead, path: Path, join: JoinOptions) -> FileFacts:
    if path.suffix not in SUFFIXES:
        raise FeatureFileError(f"{path.name}: expected a feature file ({', '.join(SUFFIXES)}).")
    facts = look_at_all([path], join, width=head.input_dim)[0]
    if not join.allow_mixed:
        head.check_features(facts.made, path.name)
    return facts


def _csv(head: FittedHead, rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "slide_id,predicted," + ",".join(f"p_{name}" for name in head.task.classes) + "\n"
    said = np.array([[row[f"p_{name}"] for name in head.task.classes] for row in rows])
    return report.predictions_csv(None, [row["slide_id"] for row in rows], said, head.task, head.calibration)


def evaluate_head(
    checkpoint: Path | str,
    features: Path | str,
    labels: Path | str,
    out: Path | str,
    *,
    join: JoinOptions | None = None,
    device: str = "auto",
    replicates: int = 2000,
    seed: int = 0,
    allow_seen: bool = False,
) -> CohortResult:
    """Test a frozen head (its label map, thresholds and temperature) on another cohort; nothing is fitted.

    Args:
        checkpoint: the folder of a fitted head.
        features: the folder of feature files.
        labels: a CSV with a row a slide.
        out: the folder that gets `predictions.csv`, `results.json` and `confusion.png`.
        join: how labels and files are read and joined.
        device: where the head runs.
        replicates: of the bootstrap; 0 for scores without intervals.
        seed: of the bootstrap.
        allow_seen: take slides that trained the head too.

    Raises:
        ValueError: features of another width, encoder, mpp or numerics, labels that the head does not know, slides
            that trained the head.
    """
    for name, value in (("--replicates", replicates), ("--seed", seed)):
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, got {value}.")
    check_folder(out)
    join, head = join or JoinOptions(), load_head(checkpoint)
    table = read_labels(labels, head.task, id_rule=join.id_rule)
    files = find_feature_files(features)
    joined = join_labels(table, files, id_rule=join.id_rule, id_regex=join.id_regex, allow_missing=join.allow_missing)
    if not allow_seen:
        _refuse_seen(Path(checkpoint), joined.labels.slide_ids)
    facts = look_at_all(joined.files, join, width=head.input_dim)
    if not join.allow_mixed:
        for path, fact in zip(joined.files, facts, strict=True):
            head.check_features(fact.made, path.name)
    bags = FileBags(joined.files, facts, join.tile_size_level0)
    said = head.predict(bags, range(len(joined.files)), resolve_device(device))
    result = evaluate_cohort(
        joined.labels, said, head.task, head.calibration, training=None, replicates=replicates, seed=seed
    )
    facts_of_run = {"checkpoint": Path(checkpoint).name, "missing": list(joined.missing), "fitted_here": "nothing"}
    report.write_cohort(
        Path(out),
        joined.labels,
        said,
        head.task,
        head.calibration,
        result,
        facts_of_run,
        what=f"{facts_of_run['checkpoint']} tested on {joined.labels.source}",
    )
    return result


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
