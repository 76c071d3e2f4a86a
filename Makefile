# Everything runs in .venv, which is made on first use from constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# TransformerLens 4 has an environment of its own, which takes all other packages from .venv.
VENV4 := .venv-tl4
READY4 := $(VENV4)/.ready
TESTS4 := tests/model/test_model.py tests/model/test_components.py tests/model/test_directory.py \
	tests/model/test_hooked_transformer.py tests/cli/test_other_models.py tests/cli/test_series_commands.py \
	tests/analysis/interventions/test_spec.py tests/analysis/behaviour/test_monitor.py \
	tests/analysis/interventions/test_patching.py::test_equal_to_transformer_lens

.PHONY: demo test test-tl4 check docs format reproduce bench break clean

demo: $(READY)            ## train, probe and report on real text statistics
	$(BIN)/birthlens demo runs/demo

test: $(READY)            ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

test-tl4: $(READY4)       ## the tests that run a TransformerLens model, with TransformerLens 4
	OMP_NUM_THREADS=1 $(VENV4)/bin/python -m pytest $(TESTS4)

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

break: $(READY)           ## long tests, 10,000 hostile inputs, 500 kills, 500 flips (docs/reliability.md)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m long
	$(BIN)/python tests/breaking/fuzz.py 10000
	PYTHONPATH=tests $(BIN)/python -m breaking --count 500

bench: $(READY)
	$(BIN)/birthlens bench

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

$(READY4): $(READY) constraints-tl4.txt
	$(BIN)/python -m venv --without-pip $(VENV4)
	$(BIN)/pip --python $(VENV4)/bin/python install --quiet --no-deps --requirement constraints-tl4.txt
	$(BIN)/python -c "import sysconfig; print(f'import site; site.addsitedir({sysconfig.get_path(\"purelib\")!r})')" \
		> "$$($(VENV4)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_of_venv.pth"
	$(BIN)/pip --python $(VENV4)/bin/python check
	touch $(READY4)

clean:
	rm -rf $(VENV) $(VENV4) runs dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
