"""The settings of a run, read from YAML, JSON and the command line, checked and frozen."""
