# Everything a newcomer needs: `make demo` shows the engine at work, `make test` proves it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NATIVE := CMakeLists.txt pyproject.toml $(shell find csrc/cpu -type f)

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/paceline demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/backends/torch/interpreted
	OMP_NUM_THREADS=1 PACELINE_TEST_DEVICE=torch:cpu $(BIN)/python -m pytest tests/property tests/parity/test_transformers.py

lint: $(VENV)/.installed-test
	$(BIN)/ruff format --check src tests
	$(BIN)/ruff check src tests
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable: Python sources are used where they lie, the native part is compiled again when it changes.
$(VENV)/.installed: $(BIN)/python $(NATIVE)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	$(BIN)/python -m nanobind.stubgen -q -m paceline._cpu -o src/paceline/_cpu.pyi
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
