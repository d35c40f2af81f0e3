"""Scores of a classifier, their bootstrap intervals, and the pictures that go with them; numpy alone,
but for `plots.write_events`, which hands curves to TensorBoard.

predictions = Predictions(truth, probabilities, class_names=("normal", "tumour"), groups=slide_of_tile)
evaluation = evaluate(predictions, replicates=2000, seed=0)
evaluation["auroc"].value, evaluation["auroc"].low, evaluation["auroc"].high
paired_difference(predictions, of_another_model)["auroc"]
"""

from gigapath.evaluation.calibration import calibration_slope
from gigapath.evaluation.intervals import Estimate, Evaluation, evaluate, paired_difference
from gigapath.evaluation.scores import (
    Predictions,
    Scorer,
    average_by_group,
    confusion_matrix,
    f1_weighted,
    macro_curves,
    prior_probabilities,
    site_probabilities,
)

__all__ = [
    "Estimate",
    "Evaluation",
    "Predictions",
    "Scorer",
    "average_by_group",
    "calibration_slope",
    "confusion_matrix",
    "evaluate",
    "f1_weighted",
    "macro_curves",
    "paired_difference",
    "prior_probabilities",
    "site_probabilities",
]
