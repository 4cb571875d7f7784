# Everything a fresh machine needs: `make quickstart` and `make test`. The environment lives in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install quickstart format lint test test-fast coverage benchmark clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	@echo "installing pinned packages into $(VENV): 7 GB, some minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dali-cuda13,dev]'
	@# Some packages hold files for newer Pythons only: what does not compile is of no concern.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	@touch $@

quickstart: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quickstart.sh

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The pre-commit hook and CI run this too.
lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources launch/*.sh .ci/run
	$(BIN)/hadolint launch/Dockerfile

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
REACHED = $$($(BIN)/coverage report --format=total) % of the lines

test-fast: $(STAMP)
	$(PYTEST) -m 'not slow'

# Coverage costs a quarter of the time, so that only the fast tests carry it here.
test: lint
	$(PYTEST) -m 'not slow' --cov --cov-report=xml
	$(PYTEST) --durations 10 -m slow
	@echo "the fast tests reach $(REACHED) (make coverage: all tests, and which lines)"

coverage: $(STAMP)
	$(PYTEST) --cov --cov-report=html --cov-report=xml
	@echo "all tests reach $(REACHED): build/coverage/index.html"

# QUICK=--quick: four minutes. IMG2DATASET=PYTHON: a Python that has it. SHARDS=DATASET: whole training steps too.
benchmark: $(STAMP)
	@mkdir -p build
	$(BIN)/python tests/benchmarks/preprocessing.py $(QUICK) $(IMG2DATASET:%=--img2dataset %) --json build/preprocessing.json
	$(BIN)/python tests/benchmarks/loader.py $(QUICK) --json build/loader.json
	$(BIN)/python tests/benchmarks/training.py $(QUICK) $(SHARDS:%=--shards %) --json build/training.json
	$(BIN)/python tests/benchmarks/evaluation.py $(QUICK) --json build/evaluation.json
	$(BIN)/python tests/benchmarks/render.py $(QUICK) $(patsubst %,build/%.json,preprocessing loader training evaluation)

clean:
	rm -rf $(VENV) *.egg-info build dist .hypothesis .pytest_cache .mypy_cache .ruff_cache
