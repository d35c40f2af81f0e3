"""How far probabilities can be taken at their word; Brier's score and ECE are among the scores, the slope is here."""

import numpy as np

from gigapath.evaluation.scores import FloatArray, Predictions

FLAT = 1e-7  # curvature of the mean log loss below which it falls for ever: the classes are separated


def calibration_slope(predictions: Predictions) -> float:
    """The slope a of the recalibration softmax(a log p + b) that fits the truth best; b is one offset per class.

    1 = as sure as it should be, below 1 = too sure. For two classes this is the slope of Cox's logistic
    recalibration. NaN where it is not defined: one class only, or classes that the probabilities separate perfectly.
    """
    from scipy.optimize import minimize

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
    of_truth = design[np.arange(rows), truth]

    def softmax(parameters: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(probabilities (N, C), log loss (N,))."""
        logits = design @ parameters
        logits -= logits.max(axis=1, keepdims=True)
        total = np.exp(logits).sum(axis=1)
        return np.exp(logits) / total[:, None], np.log(total) - logits[np.arange(rows), truth]

    def loss(parameters: FloatArray) -> tuple[float, FloatArray]:
        said, losses = softmax(parameters)
        return float(losses.mean()), (np.einsum("nc,ncp->np", said, design) - of_truth).mean(axis=0)

    def curvature(parameters: FloatArray) -> FloatArray:
        said, _ = softmax(parameters)
        spread = design - np.einsum("nc,ncp->np", said, design)[:, None, :]
        return np.asarray(np.einsum("nc,ncp,ncq->pq", said, spread, spread) / rows)

    start = np.eye(classes)[0]
    best = minimize(loss, start, jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-9}).x
    return float(best[0]) if np.linalg.eigvalsh(curvature(best))[0] > FLAT else float("nan")
