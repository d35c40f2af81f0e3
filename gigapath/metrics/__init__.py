"""Scores of a classifier, their bootstrap intervals, and the pictures that go with them; numpy alone,
but for `events`, which hands curves to TensorBoard.

predictions = Predictions(truth, probabilities, class_names=("normal", "tumour"), groups=slide_of_tile)
evaluation = evaluate(predictions, replicates=2000, seed=0)
evaluation["auroc"].value, evaluation["auroc"].low, evaluation["auroc"].high
paired_difference(predictions, of_another_model)["auroc"]
"""

from gigapath.metrics.bootstrap import Estimate, Evaluation, evaluate, paired_difference
from gigapath.metrics.calibration import calibration_slope
from gigapath.metrics.cohorts import average_by_group, evaluate_by_site, prior_probabilities, site_probabilities
from gigapath.metrics.scores import Predictions, Scorer, confusion_matrix, f1_weighted

__all__ = [
    "Estimate",
    "Evaluation",
    "Predictions",
    "Scorer",
    "average_by_group",
    "calibration_slope",
    "confusion_matrix",
    "evaluate",
    "evaluate_by_site",
    "f1_weighted",
    "paired_difference",
    "prior_probabilities",
    "site_probabilities",
]
