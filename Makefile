# demo | test | lint | bench: each sets up what it needs in .venv.
#
#   PYTHON  the interpreter of the virtual environment, 3.11 or later
#   TORCH   what pip installs as torch; pip's own settings are honoured (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS ...)

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint bench clean

demo: $(READY)
	$(BIN)/fastbert compare

test: lint
	$(BIN)/python -m pytest tests
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ops

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.model

# torch first, by itself: the version that the tests are run with, whatever else asks for one.
$(READY): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) build dist
