"""Readings of a run: the weight wing (numpy only) and the activation wing (which takes a model)."""
