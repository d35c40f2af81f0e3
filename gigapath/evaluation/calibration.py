"""How far probabilities can be taken at their word; Brier's score and ECE are among the scores, the slope is here."""

import numpy as np

from gigapath.evaluation.scores import Predictions

MAX_STEPS = 100


def calibration_slope(predictions: Predictions) -> float:
    """The slope a of the recalibration softmax(a log p + b) that fits the truth best; b is one offset per class.

    1 = as sure as it should be, below 1 = too sure. For two classes this is the slope of Cox's logistic
    recalibration. NaN where it is not defined: one class only, or classes that the probabilities separate perfectly.
    """
    if predictions.multi_label:
        raise ValueError("calibration_slope: expected a task with one class a row. Call it for each label.")
    present, truth = np.unique(predictions.truth, return_inverse=True)
    probabilities = np.asarray(predictions.probabilities, dtype=np.float64)[:, present]
    rows, classes = probabilities.shape
    if classes < 2:
        return float("nan")
    logs = np.log(np.clip(probabilities, 1e-12, 1.0))
    # One design for all parameters: x[n, c] = (log p_nc, one-hot of c without its first entry).
    offsets = np.broadcast_to(np.eye(classes)[:, 1:], (rows, classes, classes - 1))
    design = np.concatenate([logs[:, :, None], offsets], axis=2)  # (N, C, P)
    parameters = np.zeros(classes)
    parameters[0] = 1.0
    for _ in range(MAX_STEPS):
        logits = design @ parameters
        softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
        softmax /= softmax.sum(axis=1, keepdims=True)
        expected = np.einsum("nc,ncp->np", softmax, design)
        gradient = (design[np.arange(rows), truth] - expected).sum(axis=0)
        spread = design - expected[:, None, :]
        curvature = np.einsum("nc,ncp,ncq->pq", softmax, spread, spread)
        try:
            step = np.linalg.solve(curvature, gradient)
        except np.linalg.LinAlgError:
            return float("nan")
        # Newton's step, held back where the start is far from the optimum.
        parameters = parameters + step * min(1.0, 5.0 / max(np.abs(step).max(), 1e-300))
        if np.abs(step).max() < 1e-8:
            return float(parameters[0])
        if np.abs(parameters).max() > 1e4:
            return float("nan")
    return float("nan")
