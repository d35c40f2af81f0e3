"""A fitted head as a file: its weights, the label map, what the features were made of, thresholds and temperature."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gigapath.devices import AUTOCAST_TYPES, at_most_threads, computing
from gigapath.evaluation.task import Task, task_from
from gigapath.files import sha256_of, write_json_atomic
from gigapath.finetune import checkpoints
from gigapath.finetune.data import Bags, ReadAhead, check_made
from gigapath.finetune.evaluation import Calibration, probabilities, threshold_count
from gigapath.finetune.heads import build_head, pack
from gigapath.finetune.options import ModelOptions
from gigapath.machine import available_cores
from gigapath.options import from_dict, to_dict
from gigapath.weights import assign_weights

HEAD = "head.json"
TENSORS = "head.safetensors"
FORMAT = 1
_KEYS = (
    "task", "model", "input_dim", "features", "temperature", "thresholds", "fitted_on", "precision", "tensors", "sha256"
)  # fmt: skip
TERMS = (
    "For research use only, not for diagnosis. A slide encoder and embeddings fall under the terms of the weights that "
    "made them; Prov-GigaPath's are for research."
)


@dataclass(frozen=True)
class FittedHead:
    """A model that can be applied to other cohorts.

    Attributes:
        model: with its weights.
        task: the classes.
        options: of the model.
        input_dim: width of the tile embeddings.
        made: what the features are made of (encoder, mpp, numerics), as in `data.FileFacts`.
        calibration: temperature and thresholds.
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

    def check_features(self, made: dict[str, Any], who: str) -> None:
        """Refuse features that state another encoder, mpp or numerics than those that trained."""
        check_made(made, self.made, who, "the features that trained the head")

    def predict(
        self,
        bags: Bags,
        rows: Sequence[int],
        device: torch.device,
        *,
        workers: int = 2,
        check_stop: Callable[[], None] = lambda: None,
    ) -> npt.NDArray[np.float64]:
        """Probabilities (len(rows), C), slide by slide, all tiles in the file's order.

        Args:
            bags: the slides' tile embeddings, by row.
            rows: which of them.
            device: where the head runs; it stays there.
            workers: threads that read ahead.
            check_stop: called before each slide; raises to end.
        """
        self.model.to(device).eval()
        found = []
        with torch.no_grad(), at_most_threads(available_cores()):
            for bag in ReadAhead(bags.__getitem__, workers=workers)(rows):
                check_stop()
                with computing(self.precision, device):
                    logits = self.model.forward_packed(*pack([bag], device))  # type: ignore[operator]
                found.append(logits[0].double().cpu().numpy())
        return probabilities(np.stack(found), self.task, self.calibration.temperature)


def save_head(folder: Path, head: FittedHead) -> None:
    """Write `head.safetensors` and then `head.json`, which names its checksum."""
    checkpoints.save_tensors(folder / TENSORS, dict(head.model.state_dict()))
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
        calibration = Calibration(float(held["temperature"]), tuple(map(float, held["thresholds"])), held["fitted_on"])
        if len(calibration.thresholds) != threshold_count(task):
            raise TypeError(calibration.thresholds)
        state = checkpoints.load_tensors(tensors)
        with torch.device("meta"):  # whatever sizes the JSON claims, only the tensors' own are laid out
            model = build_head(options, pretrained="", input_dim=held["input_dim"], n_classes=len(task.classes))
        assign_weights(HEAD, model, state)
    except (TypeError, AttributeError, RuntimeError, OverflowError) as error:  # words for numbers, sizes beyond all
        raise ValueError(f"{file}: expected the JSON of a fitted head, got a damaged one. Copy it anew.") from error
    made = held["features"]
    return FittedHead(model, task, options, held["input_dim"], made, calibration, held["precision"], held["sha256"])
