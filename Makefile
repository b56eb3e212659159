PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two workers on two cores; one thread each, or BLAS threads of both fight for the cores.
PYTEST_WORKERS ?= 2

.PHONY: env demo test quantized lint types imports clean

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: env
	$(BIN)/python examples/demo.py

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS)

# Beside the environment, not in it: where torchao is, transformers loads it with every model, and it complains.
quantized: env
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--upgrade --no-deps --target $(VENV)/quantized torchao bitsandbytes
	OMP_NUM_THREADS=1 PYTHONPATH=$(VENV)/quantized $(BIN)/python -m pytest tests/test_quantized.py tests/test_tradeoffs.py

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy

imports: env
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) demo_output
