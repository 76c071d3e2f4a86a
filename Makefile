# Everything runs in .venv, which is made on first use from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check docs format reproduce bench break clean

demo: $(READY)            ## train, probe and report on real text statistics
	$(BIN)/birthlens demo runs/demo

test: $(READY)            ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

check: $(READY) docs      ## lint, format, types, documentation
	$(BIN)/ruff check birthlens tests analyses data
	$(BIN)/ruff format --check birthlens tests analyses data
	$(BIN)/mypy

docs: $(READY)            ## the documentation site, in site/; a broken link or a missing docstring fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	$(BIN)/ruff check --quiet --select D100,D101,D102,D103,D104 birthlens

format: $(READY)
	$(BIN)/ruff check --fix birthlens tests analyses data
	$(BIN)/ruff format birthlens tests analyses data

reproduce: $(READY)       ## check the paper's claims one by one: a scorecard, and its page
	$(BIN)/birthlens reproduce all --tier laptop --out runs/reproduce

break: $(READY)           ## 10,000 hostile inputs, 500 kills, 500 flips (docs/reliability.md)
	$(BIN)/python tests/breaking/fuzz.py 10000
	PYTHONPATH=tests $(BIN)/python -m breaking --count 500

bench: $(READY)
	$(BIN)/birthlens bench

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
