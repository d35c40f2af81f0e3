"""What the scores are called where people read them."""

SCORE_WORDS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "auroc_micro": "micro AUROC",
    "auprc_micro": "micro AUPRC",
    "kappa_quadratic": "quadratic-weighted kappa",
    "f1_weighted": "weighted F1",
    "f1_macro": "macro F1",
    "precision_macro": "macro precision",
    "recall_macro": "macro recall",
    "brier": "Brier score",
    "ece": "calibration error (ECE)",
    "log_loss": "log loss",
}
