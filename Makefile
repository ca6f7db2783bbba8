# demo | test | lint | bench: each sets up what it needs in .venv.
# gpu: builds for, and tests on, the GPUs of a machine whose PYTHON has torch; needs no network.
#
#   PYTHON  the interpreter of the virtual environment, 3.11 or later
#   TORCH   what pip installs as torch; pip's own settings are honoured (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS ...)

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PEERS := $(VENV)/peers
TORCH_READY := $(VENV)/torch
GPU_VENV := .venv-gpu
# Machine code for the GPUs that are there; for all that are supported where there are none.
GPU_BUILD = $(shell nvidia-smi -L >/dev/null 2>&1 && echo -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native)
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint bench gpu clean

demo: $(READY)
	$(BIN)/fastbert compare

test: lint
	$(BIN)/python -m pytest tests
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 tests/ops tests/models/test_kernels.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(PEERS)
	$(BIN)/fastbert bench --out benchmarks/results
	$(BIN)/fastbert bench report

# An environment that sees the packages of PYTHON's, so that nothing is changed or fetched there.
gpu:
	$(PYTHON) -m venv --without-pip $(GPU_VENV)
	$(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(GPU_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth
	$(GPU_VENV)/bin/python -m pip install --quiet --no-index --no-deps --no-build-isolation $(GPU_BUILD) --editable .
	$(GPU_VENV)/bin/python -m benchmarks.gpu

# torch first, by itself: the version that the tests are run with, whatever else asks for one.
$(TORCH_READY):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(READY): $(SOURCES) | $(TORCH_READY)
	$(BIN)/python -m pip install --quiet --editable ".[test,lint]"
	touch $@

$(PEERS): $(SOURCES) | $(TORCH_READY)
	$(BIN)/python -m pip install --quiet --editable ".[bench,peers]"
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) build dist
