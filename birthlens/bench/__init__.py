"""Benchmarks: birthlens against plain code, interleaved in one process, as ratios."""
