"""Reference predictors: exact or simple next-token distributions, and the losses that they reach."""
