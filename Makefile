# Everything a fresh machine needs: `make quickstart` and `make test`. The environment lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart test test-fast lint benchmark clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dali-cuda13,dev]'
	-$(BIN)/python -m compileall -q -j 0 $(VENV)/lib
	@touch $@

quickstart: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quickstart.sh

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m 'not slow' --numprocesses 2 --dist loadfile

benchmark: $(STAMP)
	@mkdir -p build
	$(BIN)/python tests/benchmarks/preprocessing.py --json build/preprocessing.json
	$(BIN)/python tests/benchmarks/loader.py --json build/loader.json
	$(BIN)/python tests/benchmarks/training.py --json build/training.json
	$(BIN)/python tests/benchmarks/evaluation.py --json build/evaluation.json

clean:
	rm -rf $(VENV) *.egg-info build dist .pytest_cache .mypy_cache .ruff_cache
