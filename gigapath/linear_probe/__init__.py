"""Probes of frozen embeddings: a linear layer on tiles by the published recipe, logistic regression, nearest
neighbours; and the same question asked of slide embeddings. Nothing heavy is imported before it is used."""
