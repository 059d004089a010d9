# make                 the environment, under .venv (Python 3.11 or newer, versions as in constraints.txt)
# make quickstart      the environment, then the whole pipeline on the embedded world: a few minutes on two CPU cores
# make test            format, lint, types, tests
# make lint            format, lint, types
# make sanitize        the C++ core, and the CUDA kernels on the CPU, on random inputs under the address and
#                      undefined-behaviour sanitizers; FUZZ_SECONDS=60
# make docs-check      links, commands, recipes and examples of the documentation
# make clean           remove the environment, builds and caches; runs are kept
#
# PYTHON=python3.12    another interpreter
# TORCH_INDEX=URL      take torch from another index. On Linux the default index has the CUDA build (several GB);
#                      the CPU build is at https://download.pytorch.org/whl/cpu
# WORKERS=4            test processes, one torch thread each

PYTHON ?= $(shell for p in python3.11 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
TORCH_INDEX ?=
WORKERS ?= 2
FUZZ_SECONDS ?= 3

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)
TRITON := $(shell grep '^triton==' constraints.txt)

NATIVE := csrc/bindings.cpp $(wildcard csrc/packing/*)
CUDA := $(wildcard csrc/cuda/*)

.PHONY: env quickstart test lint sanitize docs-check clean

env: .venv/installed

# With a compiler at hand, C++ that does not compile is an error and not a slower installation. CUDA is compiled where
# nvcc is there and can; the tests compile it again and say why it cannot.
export NOVA_KERNELS_NATIVE ?= $(if $(shell command -v $(CXX)),1,auto)

# The environment is made only where there is none; a changed pin or C++ source is installed into the existing one.
.venv/installed: pyproject.toml setup.py constraints.txt $(NATIVE) $(CUDA)
	@test -x $(BIN)/pip || test -n "$(PYTHON)" || \
		{ echo "make: no Python 3.11 or newer found; pass PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) $(TORCH))
	$(INSTALL) --editable '.[train,report]'
	touch $@

# torch's CPU build brings no triton; its kernels are interpreted and compiled ahead of time in the tests.
.venv/installed-dev: .venv/installed
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps $(TRITON)
	touch $@

quickstart: .venv/installed
	$(BIN)/nova-train pipeline recipes/quickstart.yaml

lint: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Where there is no compiler, nothing was compiled and the plain Python runs. The CUDA kernels run on the CPU here.
sanitize:
	@if command -v $(CXX) > /dev/null; then \
		$(MAKE) --no-print-directory build/packing_test build/topk_select_test && \
		build/packing_test $(FUZZ_SECONDS) && build/topk_select_test $(FUZZ_SECONDS); \
		else echo "make: no $(CXX); the C++ core is not checked"; fi

SANITIZED := $(CXX) -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all \
	-Wall -Wextra -Werror -Icsrc

build/packing_test: csrc/tests/packing_test.cpp $(NATIVE)
	mkdir -p build
	$(SANITIZED) csrc/tests/packing_test.cpp csrc/packing/*.cpp -o $@

# Only nvcc knows `#pragma unroll`.
build/topk_select_test: csrc/tests/topk_select_test.cpp csrc/tests/cuda_on_cpu.h $(CUDA)
	mkdir -p build
	$(SANITIZED) -Wno-unknown-pragmas csrc/tests/topk_select_test.cpp -o $@

test: lint sanitize
	$(BIN)/pytest -n $(WORKERS) --dist worksteal

docs-check: .venv/installed-dev
	$(BIN)/pytest -n 0 tests/test_docs.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find nova_kernels nova_train tests -name __pycache__ -type d -prune -exec rm -rf {} +
