# make demo    sets everything up, converts the shipped model to BF16 and back, and to INT4
# make test    sets everything up and runs the tests (CPU; GPU tests run where there is a GPU)
# make lint    ruff and mypy
# make bench   the benchmarks that this machine can run

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := $(if $(TMPDIR),$(TMPDIR),/tmp)/dsv3-demo

.PHONY: demo test lint bench clean

# torch by name first: the version in constraints.txt, from wherever pip finds it, CPU build or not.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt pip setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

demo: $(VENV)/.installed
	PATH=$(BIN):$$PATH DEMO=$(DEMO) bash examples/demo.sh

test: $(VENV)/.installed
	$(BIN)/pytest -n auto --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/cpu_kernels.py
	$(BIN)/python benchmarks/cpu_integer_kernels.py
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/convert.py --quantize
	$(BIN)/python benchmarks/quality.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
