"""The data: a corpus, the task that samples token batches from it, and predictors with known probabilities."""
