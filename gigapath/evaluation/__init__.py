"""Labels in, honest scores out: scores of a classifier, their bootstrap intervals, and the pictures that go with them.

`labels` reads tables, `splits` draws folds and audits them, `scores` and `intervals` compute, `results` writes.

predictions = Predictions(truth, probabilities, class_names=("normal", "tumour"), groups=slide_of_tile)
evaluation = evaluate(predictions, replicates=2000, seed=0)
evaluation["auroc"].value, evaluation["auroc"].low, evaluation["auroc"].high
paired_difference(predictions, of_another_model)["auroc"]
"""
