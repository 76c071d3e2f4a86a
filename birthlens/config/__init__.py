"""What a run is: every setting, read from YAML, JSON and the command line, checked, and frozen."""
