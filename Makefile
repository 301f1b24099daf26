# make demo | test | sanitize | lint | bench | docs | wheel | clean
#
# Everything runs in .venv, which is made on first use. On a machine without internet, name an interpreter that has
# torch, numpy, pytest, cmake and pybind11: `make test PYTHON=/path/to/python` uses it as it is and installs nothing.
# NORMKERN_CUDA, TORCH_CUDA_ARCH_LIST and MAX_JOBS reach the build (see setup.py).

VENV ?= .venv
EXTRAS ?= test,demo,bench,docs

ifdef PYTHON
  ENVIRONMENT :=
  INSTALL := $(PYTHON) setup.py -q build_ext --inplace
else
  PYTHON := $(abspath $(VENV))/bin/python
  ENVIRONMENT := $(VENV)/made
  INSTALL := $(PYTHON) -m pip install -q --no-build-isolation -e '.[$(EXTRAS)]'
endif
export PATH := $(dir $(PYTHON)):$(PATH)
# The pinned torch; where there is an NVIDIA GPU, any that fits its driver.
TORCH := $(shell if nvidia-smi -L >/dev/null 2>&1; then echo 'torch>=2.11'; else echo 'torch==2.13.0'; fi)
NATIVE_SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find cmake csrc -type f)
CXX_FILES := $(shell find csrc tests/emulator -name build -prune -o -name '*.h' -print -o -name '*.hpp' -print \
  -o -name '*.cuh' -print -o -name '*.cpp' -print -o -name '*.cu' -print)

.PHONY: demo test sanitize lint bench docs wheel clean force

demo: build/installed
	$(PYTHON) -m normkern demo

test: build/installed build/tests/passed build/emulator/made
	NORMKERN_EMULATOR_DIR=$(abspath build/emulator) \
	  $(PYTHON) -m pytest $(PYTEST_ARGS) $$($(PYTHON) -c 'import xdist' 2>/dev/null && printf '%s' '-n auto --maxprocesses 8')

# The C++ table of cases through the CPU kernels under AddressSanitizer and UBSan: several minutes of compiling.
sanitize: $(ENVIRONMENT)
	cmake -S . -B build/sanitized -DNORMKERN_CUDA=OFF -DNORMKERN_TORCH=OFF -DNORMKERN_PYTHON=OFF -DNORMKERN_TESTS=OFF \
	  -DNORMKERN_SANITIZE=ON >/dev/null
	cmake --build build/sanitized --target test_cpu_sanitized --parallel $(or $(MAX_JOBS),$(shell nproc))
	ctest --test-dir build/sanitized --output-on-failure

# Real layers, errors by mean/std and in ulps, the cost of a call; then plots and build/bench/report.html. BENCH_ARGS
# reach the first, as in BENCH_ARGS='--peers all'. The suite for pytest-benchmark is bench/bench_norms.py.
bench: build/installed
	$(PYTHON) -m normkern bench --dtype float32 --dtype bfloat16 --out build/bench/layers.csv $(BENCH_ARGS)
	$(PYTHON) bench/offset_error.py --csv build/bench/offset_error.csv
	$(PYTHON) bench/ulp_error.py --csv build/bench/ulp_error.csv
	$(PYTHON) bench/bench_overhead.py --csv build/bench/overhead.csv
	$(PYTHON) -m normkern report build/bench/*.csv --out build/bench

# Warnings are errors. The examples of the pages are run by tests/test_docs.py.
docs: build/installed
	$(PYTHON) -m sphinx -q -W --keep-going -b html docs build/docs
	@echo build/docs/index.html

lint: $(ENVIRONMENT)
	$(if $(ENVIRONMENT),$(PYTHON) -m pip install -q $$($(PYTHON) -c "$(LINT_TOOLS)"))
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	clang-format --dry-run -Werror $(CXX_FILES)

# pyproject.toml pins the tools; pip alone cannot install an extra without building the package.
LINT_TOOLS := import re; print(*re.findall('\"(.+?)\"', re.search('(?m)^lint = .*', open('pyproject.toml').read())[0]))

wheel: $(ENVIRONMENT)
	$(PYTHON) -m pip wheel -q --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf build dist *.egg-info normkern/*.so

$(VENV)/made: pyproject.toml
	@python3 -c 'import sys; sys.version_info >= (3, 10) or sys.exit("normkern needs Python 3.10 or later")'
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q '$(TORCH)' numpy 'setuptools>=77' 'pybind11>=3.0' ninja $$(command -v cmake >/dev/null || echo cmake)
	touch $@

# What the libraries in normkern/ were built with; the file changes only when that does.
build/options: force
	@mkdir -p build
	@echo '$(PYTHON) $(NORMKERN_CUDA) $(TORCH_CUDA_ARCH_LIST) $(NORMKERN_CMAKE_ARGS)' >$@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

build/installed: build/options $(ENVIRONMENT) $(NATIVE_SOURCES)
	$(INSTALL)
	touch $@

# Made before pytest, whose parallel workers would make it at the same time. It needs g++ and CUDA's headers; the tests
# say so themselves where it is missing.
EMULATOR_SOURCES := $(wildcard tests/emulator/*.cpp tests/emulator/*.h* tests/emulator/CMakeLists.txt)
build/emulator/made: $(ENVIRONMENT) $(NATIVE_SOURCES) $(EMULATOR_SOURCES)
	PYTHONPATH=tests $(PYTHON) -c 'from emulator.backend import MODES, build; [build(mode) for mode in MODES]' && touch $@ || true

# The C++ tests know neither Python nor torch.
build/tests/passed: $(ENVIRONMENT) $(NATIVE_SOURCES)
	cmake -S . -B build/tests -DNORMKERN_CUDA=OFF -DNORMKERN_TORCH=OFF -DNORMKERN_PYTHON=OFF -DNORMKERN_TESTS=ON >/dev/null
	cmake --build build/tests --parallel $(or $(MAX_JOBS),$(shell nproc))
	ctest --test-dir build/tests --output-on-failure
	touch $@
