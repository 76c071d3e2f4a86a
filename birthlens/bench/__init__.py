"""Benchmarks: birthlens against plain code, timed in turn in one process and given as ratios."""
