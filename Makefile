# Everything runs in a virtual environment that the first target builds:
# .venv (STACK=onedl, the default) or .venv-openmmlab (STACK=openmmlab).
PYTHON ?= python3
STACK ?= onedl
ARGS ?=
# Test processes side by side; 0 runs all tests in one, as debuggers need it.
JOBS ?= 2

VENV := $(if $(filter onedl,$(STACK)),.venv,.venv-$(STACK))
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PINS := requirements/pinned-$(STACK).txt
PIP := $(BIN)/python -m pip install --constraint $(PINS)

ifeq ($(wildcard $(PINS)),)
$(error STACK=$(STACK) is unknown: use onedl or openmmlab)
endif

# mmengine 0.10.7 resumes with a bare torch.load of a file that also holds its
# history buffers, which torch has refused by default since 2.6. Calls that say
# weights_only=True still mean it.
ifeq ($(STACK),openmmlab)
export TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD := 1
endif

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow docs quality lint format

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## build the environment and stop there

demo: $(STAMP)  ## prune a detector on the data in the repository
	$(BIN)/python tools/demo.py $(ARGS)

test: $(STAMP)  ## run the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' -n $(JOBS) --dist loadfile $(ARGS)

test-slow: $(STAMP)  ## run the tests that take minutes
	$(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

docs: $(STAMP)  ## build the site of docs/ in docs/_build/html (needs no network)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going docs docs/_build/html $(ARGS)

quality: $(STAMP)  ## lint, formatting and types
	@$(MAKE) --no-print-directory lint LINTER=$(BIN)/python

# Other versions of the tools would judge differently, so only the pinned ones count.
LINTER = $(or $(wildcard $(BIN)/python),$(PYTHON))

lint:  ## quality without building an environment (pre-commit runs it)
	@for tool in ruff mypy; do \
		version=$$($(LINTER) -m $$tool --version 2>/dev/null | cut -d' ' -f2); \
		grep -qx "$$tool==$$version" $(PINS) || { \
			echo "$(LINTER) has $$tool $${version:-not installed}, not the one of $(PINS);" \
				"run '$(LINTER) -m pip install -r requirements/lint.txt -c $(PINS)'" >&2; \
			exit 1; }; \
	done
	$(LINTER) -m ruff check .
	$(LINTER) -m ruff format --check .
	$(LINTER) -m mypy mmgfp mmgfp_command.py tools benchmarks

format: $(STAMP)  ## apply what quality would complain about
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# mmcv compiles its C++ ops against the torch of the environment, so torch
# comes first and nothing is built in isolation. Without nvcc it can only build
# its CPU ops, but tries CUDA wherever it sees a GPU: hide them from it then.
NVCC = $(firstword $(shell command -v nvcc) $(wildcard $(CUDA_HOME)/bin/nvcc /usr/local/cuda/bin/nvcc))
MMCV_ENV = CFLAGS='-g0' MMCV_WITH_OPS=1 PATH="$(CURDIR)/$(BIN):$$PATH" \
	$(if $(NVCC),,CUDA_VISIBLE_DEVICES=)

# opencv-python and opencv-python-headless are both required and write the same
# files; the headless one goes last, as it needs no libGL from the system.
$(STAMP): $(wildcard requirements/*.txt) setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'mmgfp needs Python 3.10 or newer: make PYTHON=/path/to/python3' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements/build.txt
	$(PIP) -r requirements/runtime.txt torchvision
	$(MMCV_ENV) $(PIP) --no-build-isolation -r requirements/$(STACK).txt \
		-r requirements/demo.txt -r requirements/onnx.txt -r requirements/nncf.txt \
		-r requirements/report.txt -r requirements/docs.txt \
		-r requirements/tests.txt -r requirements/lint.txt
	$(PIP) --no-deps --force-reinstall opencv-python-headless
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
