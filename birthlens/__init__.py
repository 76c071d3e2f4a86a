"""birthlens: watch an induction head being born."""

__version__ = "0.1.0"
