# `make mnist` trains the main model, `make test` runs the tests. Both create a virtual environment first if necessary;
# set PYTHON and VENV to choose the interpreter and the directory.
PYTHON ?= python3
VENV ?= .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
INPUTS := setup.cfg constraints.txt pyproject.toml
# One process per core, at most four, since each may take 2 GB; tests of a file share what its fixtures made. Files
# run in the order that tests/conftest.py gives.
PYTEST := $(VENV)/bin/python -m pytest -n logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.PHONY: mnist test test-all lint format bench bench-nerf bench-llama bench-llama-quality torture clean

mnist: $(VENV)/.jax
	$(VENV)/bin/python -m blacksmith.launch --gin_file=gin/mnist_jax.gin $(ARGS)

test: $(VENV)/.all
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.all
	$(PYTEST) -m "slow or not slow" $(ARGS)

lint: $(VENV)/.all
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

format: $(VENV)/.all
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(VENV)/.all
	$(VENV)/bin/python benchmarks/mnist.py $(ARGS)

bench-nerf: $(VENV)/.all
	$(VENV)/bin/python benchmarks/nerf.py $(ARGS)

bench-llama: $(VENV)/.all
	$(VENV)/bin/python benchmarks/llama.py $(ARGS)

bench-llama-quality: $(VENV)/.all
	$(VENV)/bin/python benchmarks/llama_quality.py $(ARGS)

torture: $(VENV)/.all
	$(VENV)/bin/python benchmarks/reliability.py $(ARGS)

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "blacksmith needs Python 3.11 or newer; choose one with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.jax: $(INPUTS) | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[jax]'
	touch $@

$(VENV)/.all: $(INPUTS) | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@ $(VENV)/.jax

clean:
	rm -rf $(VENV) build dist *.egg-info
