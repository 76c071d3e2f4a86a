"""Make `python -m birthlens` the same as `birthlens`."""

from birthlens.cli import main

main()
