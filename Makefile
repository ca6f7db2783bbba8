# demo | test | lint | sanitize | bench: each sets up what it needs in .venv, at the versions in requirements/lock.txt.
# test-versions: tests with the oldest supported and the newest transformers, torch and Triton; ONLY names some.
# mutants: which changes of the code no test would see, by tests/mutation/run.py; ONLY and ARGS are for it.
# lock: renews those versions; HOLD names the packages that keep theirs.
# gpu: builds for, and tests on, the GPUs of a machine whose PYTHON has torch; needs no network.
# gpu-kit: compiles here what such a machine would, for one of compute capability 9.0 and the versions in
#   requirements/gpu-kit.txt; PYTHON is of its minor version. `python -m benchmarks.gpu_kit unpack` is for there.
#
#   PYTHON  the interpreter of the virtual environment, 3.11 or later; for lock 3.11, so that pins fit the later ones
#   ONLY    parts of names, such as "transformers torch-oldest"; of paths for mutants, such as models/packing
#   HOLD    requirements in pip's form; torch===2.13.0 means the build with its CUDA libraries
#
# pip's own settings are honoured (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS ...).

PYTHON ?= python3
HOLD ?= torch===2.13.0
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/demo
READY := $(VENV)/ready
PEERS := $(VENV)/peers
PIP_READY := $(VENV)/pip
TORCH_READY := $(VENV)/torch
GPU_VENV := .venv-gpu
KIT := .gpu-kit
KIT_READY := $(KIT)/venv/ready
# Machine code for the GPUs that are there. Where there are none, the demo does without; the tests read that of all
# supported GPUs wherever they run.
FOR_THIS_GPU := -C cmake.define.CMAKE_CUDA_ARCHITECTURES=native
GPU_BUILD = $(shell nvidia-smi -L >/dev/null 2>&1 && echo $(FOR_THIS_GPU))
DEMO_BUILD = $(or $(GPU_BUILD),-C cmake.define.FASTBERT_CUDA=OFF)
# As many processes as cores; those that they start have a thread each, and threads that wait leave the core to others.
# What `make --jobs` says to its own programs isn't for the builds among the tests.
PYTEST := MAKEFLAGS= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8
TYPES := $(BIN)/mypy
LOCK := requirements/lock.txt
TRITON := requirements/triton.txt
# Modules are compiled as they are first imported: most never are. They are kept, also where the environment says
# otherwise, or every process would compile its own, for seven seconds.
export PYTHONDONTWRITEBYTECODE :=
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint $(LOCK) --build-constraint $(LOCK)
SOURCES := pyproject.toml CMakeLists.txt $(LOCK) $(TRITON) $(shell find csrc -type f)

.PHONY: demo test test-versions lint style sanitize mutants bench lock gpu gpu-kit clean

demo: $(DEMO)
	$(BIN)/fastbert compare

# Types take one core half a minute: they are checked beside the tests.
test: style
	$(TYPES) & types=$$!; \
		$(PYTEST) --dist=loadfile --no-loadscope-reorder tests \
		&& $(PYTEST) --triton --dist=worksteal tests/ops tests/models/test_kernels.py tests/models/test_encoder_inference.py tests/models/test_model_inference.py; \
		tests=$$?; wait $$types || { echo "mypy found errors: see the start of the tests"; exit 1; }; exit $$tests

test-versions: $(READY)
	$(BIN)/python tests/versions.py $(addprefix --only ,$(ONLY))

lint: style
	$(TYPES)

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Six minutes: the host kernels on all sizes under the sanitizers of addresses, undefined behaviour and threads, faults
# planted in the CUDA kernels, which run on the host here, and every Triton kernel compiled.
sanitize: $(READY)
	$(BIN)/python -m pytest tests/native tests/ops/test_compiled.py --everything

mutants: $(READY)
	PYTHONPATH=tests $(BIN)/python -m mutation.run $(addprefix --only ,$(ONLY)) $(ARGS)

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

gpu-kit: $(KIT_READY)
	$(KIT)/venv/bin/python -m benchmarks.gpu_kit make $(KIT)/made

$(KIT_READY): requirements/gpu-kit.txt
	$(PYTHON) -m venv $(KIT)/venv
	$(KIT)/venv/bin/python -m pip install --quiet --requirement requirements/gpu-kit.txt
	touch $@

lock: $(PIP_READY)
	$(BIN)/python -m pip install --quiet packaging
	$(BIN)/python requirements/lock.py $(HOLD)

# pip first: the one that a new environment comes with may not know --build-constraint.
$(PIP_READY): $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(LOCK) --upgrade pip
	touch $@

# Before what needs it: torch's builds with CUDA bring the Triton that they were released with, others bring none.
$(TORCH_READY): $(LOCK) $(TRITON) | $(PIP_READY)
	$(INSTALL) torch
	$(BIN)/python -m pip show torch | grep -q '^Requires:.*triton' || $(INSTALL) --requirement $(TRITON)
	touch $@

$(DEMO): $(SOURCES) | $(PIP_READY)
	$(INSTALL) $(DEMO_BUILD) --editable ".[demo]"
	touch $@

# What these install and build serves the demo too.
$(READY): $(SOURCES) | $(TORCH_READY)
	$(INSTALL) --editable ".[demo,test,lint]"
	touch $(DEMO) $@

$(PEERS): $(SOURCES) | $(TORCH_READY)
	$(INSTALL) --editable ".[demo,bench,peers]"
	touch $(DEMO) $@

clean:
	rm -rf $(VENV) $(GPU_VENV) $(KIT) .venv-versions build dist
