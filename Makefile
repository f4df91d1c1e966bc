PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO ?= demo

# Packages come without bytecode. It is written where a module is first imported, also where the shell forbids that.
export PYTHONDONTWRITEBYTECODE :=

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo test test-cluster lint format clean

demo: $(VENV)/.installed  ## pretrain on generated images, with the task and without, probe both and write a report
	BIN=$(BIN) tools/demo.sh $(DEMO)

test: $(VENV)/.installed-dev  ## all tests except test-cluster
	$(PYTEST) --dist worksteal -m "not cluster" tests

test-cluster: $(VENV)/.installed-dev  ## a real SLURM with two nodes, torchrun, and processes that are killed
	$(PYTEST) --dist loadscope -m cluster tests

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO)
