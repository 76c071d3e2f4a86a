"""Reference predictors: exact or simple next-token laws, and the losses that they reach."""
