# make demo   merge real LoRA adapters on real images, about a minute after the installation
# make test   linters, type checks and every test
# Both create .venv and install everything into it. PYTHON=python3.12 picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Idle OpenMP threads that spin slow everything down on shared cores.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo test lint bench info wheel clean

demo: $(INSTALLED)
	$(BIN)/nsc-merge demo --out demo-output

test: $(INSTALLED) lint
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m nsc_kernels.bench --out bench-results

info: $(INSTALLED)
	$(BIN)/python -m nsc_kernels.info

wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel . --no-deps --no-build-isolation --wheel-dir dist

# torch comes first: the native library is compiled against its headers.
$(INSTALLED): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch numpy setuptools wheel packaging cmake ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[all]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info nsc_kernels/lib nsc_kernels/_build.json
