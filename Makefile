# make demo   merge real LoRA adapters on real images, a minute or two after the installation
# make test   linters, type checks and every test
# make coverage   what of both packages the tests run, by line and branch; build/coverage/html shows it
# make bench  the operator's contenders under pytest-benchmark; python -m nsc_kernels.bench measures better
# make docs   the documentation's site: build/docs/index.html
# make release   dist/release: the source and a manylinux wheel; needs nvcc, or NSC_BUILD_CUDA=0
# make hf-kernel   the kernels as a folder for Hugging Face kernels: dist/nsc-kernel
# make sanitize   the CPU kernels' tests and random trials under AddressSanitizer and UndefinedBehaviorSanitizer
# All create .venv and install everything into it. PYTHON=python3.12 picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A machine without a GPU is spared the gigabytes of CUDA's libraries; where that index is not reached, torch is PyPI's.
CPU_TORCH := --index-url https://download.pytorch.org/whl/cpu --retries 0 --timeout 20
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Idle OpenMP threads that spin slow everything down on shared cores.
export OMP_WAIT_POLICY := PASSIVE
# Where bytecode must not be written, each process that a test starts compiles torch and transformers anew: 10 s of it.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test unit coverage sanitize lint bench docs release info wheel hf-kernel clean

demo: $(INSTALLED)
	$(BIN)/nsc-merge demo --out demo-output

# The type checker runs on one core, beside the tests.
test: $(INSTALLED)
	$(MAKE) --no-print-directory -j2 lint unit

unit: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

coverage: $(INSTALLED)
	mkdir -p build/coverage
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --cov --cov-report=term \
	  --cov-report=html:build/coverage/html

# A copy of the package with a library of its own, found before the installed one. The sanitizer must be loaded before
# everything else, with the library whose exceptions it follows, and see Python's allocations; of those that are never
# freed, Python and torch have many.
SANITIZED := build/sanitize
sanitize: $(INSTALLED)
	$(BIN)/cmake -S . -B $(SANITIZED)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DNSC_SANITIZE=ON -DCMAKE_INSTALL_PREFIX=$(SANITIZED) \
	  -DNSC_TORCH_DIR=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])')
	$(BIN)/cmake --build $(SANITIZED)/cmake
	rm -rf $(SANITIZED)/nsc_kernels
	cp -R nsc_kernels $(SANITIZED)/
	$(BIN)/cmake --install $(SANITIZED)/cmake
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONMALLOC=malloc $(BIN)/python -m pytest -o pythonpath=$(SANITIZED) \
	  tests/kernels/test_random_problems.py tests/kernels/test_operator.py tests/kernels/test_cpu_kernels.py \
	  tests/kernels/test_entries.py \
	  --deselect tests/kernels/test_cpu_kernels.py::test_more_than_two_to_the_31_elements

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench/test_operator.py --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

docs: $(INSTALLED)
	$(BIN)/python tools/docs/build.py build/docs

info: $(INSTALLED)
	$(BIN)/python -m nsc_kernels.info

wheel: $(INSTALLED)
	$(BIN)/python -m pip wheel . --no-deps --no-build-isolation --wheel-dir dist

# The source, and of it a wheel with both libraries, for every Python and torch there is a build for, on systems as old as
# this one. Torch's and CUDA's own libraries stay outside.
release: export NSC_BUILD_CPU ?= 1
release: export NSC_BUILD_CUDA ?= 1
release: $(INSTALLED)
	rm -rf dist/release
	$(BIN)/python -m build --no-isolation --outdir dist/release/plain
	PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
	  --wheel-dir dist/release dist/release/plain/*.whl
	mv dist/release/plain/*.tar.gz dist/release
	rm -r dist/release/plain

hf-kernel: $(INSTALLED)
	$(BIN)/python -m nsc_kernels.integrations.hf_kernels dist/nsc-kernel

# torch comes first: the native library is compiled against its headers. Python compiles a module when it is first
# imported; pip would compile all of them, most of which are never used here.
$(INSTALLED): pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*/*)
	$(PYTHON) -m venv $(VENV)
	command -v nvidia-smi > /dev/null || $(BIN)/python -m pip install --quiet --no-compile torch $(CPU_TORCH) || true
	$(BIN)/python -m pip install --quiet --no-compile torch numpy setuptools wheel packaging cmake ninja
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --editable '.[all]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info nsc_kernels/lib nsc_kernels/_build.json
