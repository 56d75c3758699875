# `make test` and `make demo` do everything from a fresh checkout: they make .venv, build the ops
# and install the package into it, in place. Later calls do what has changed. CONTRIBUTING.md says
# more.

# Makes .venv. Only test-gpu, which makes none, runs it as it is.
PYTHON ?= python3
# Where pip finds PyTorch builds without CUDA. Not asked where there is a GPU, or where pip is
# configured with a folder of wheels (PIP_FIND_LINKS) that has one.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Further arguments: of pytest (test, test-gpu), of the command (demo, bench).
ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := test

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)
# A change of the pinned PyTorch makes .venv anew.
TORCH_STAMP := $(VENV)/.$(subst ==,-,$(TORCH))
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
LIBRARY := retro_ops/_C.abi3.so
RUNNER := build/retro_runner
SOURCES := $(wildcard csrc/*.* csrc/runner/*.* compile_tests/*.cpp)
# Modules for users: `make docs`.
DOCUMENTED := retro_ops retro_ops.testing retro_ops.models !retro_ops.models.spread \
    retro_ops.models.export retro_ops.models.load retro_ops.models.recall retro_ops.models.rope
# The package as it is installed, as links; mypy knows nothing of setup.py's package_dir.
LAYOUT := $(VENV)/layout/retro_ops
ROOMS = $(filter-out %.so %/__pycache__,$(wildcard retro_ops/*)) $(wildcard models benchmarks)

.PHONY: demo test test-gpu test-wheel bench runner docs lint format wheel check-wheel check-cuda clean

demo: $(LIBRARY)
	$(PY) -m retro_ops demo --model recall --compile $(ARGS)
	$(PY) -m retro_ops demo --model gemma --dtype bfloat16 $(ARGS)

test: lint $(LIBRARY)
	$(PY) -m pytest --timeout 600 $(if $(GPU),,-m "not gpu") $(ARGS)

# For machines without a network: builds and tests with the torch and pytest that PYTHON has.
test-gpu:
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("test-gpu: no GPU")'
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps -e .
	$(PYTHON) -m pytest -m gpu $(ARGS)

# With each torch of compile_tests/try_wheel.py, for GPUs: gigabytes from a package index, and
# minutes. ARGS='--torch 2.14.1' tries one.
test-wheel: check-wheel
	$(PY) compile_tests/try_wheel.py dist/*.whl $(ARGS)

bench: $(LIBRARY)
	$(PY) -m retro_ops bench $(ARGS)

# Runs exported models without Python: docs/export.md.
runner: $(RUNNER)

# What the docstrings say, as pages. From a folder without a `retro_ops` of its own, so that pdoc
# need not ask which one is meant; `spread` is a function of retro_ops.models, not its module.
docs: $(LIBRARY)
	rm -rf build/docs && mkdir -p build
	cd build && $(CURDIR)/$(PY) -W error::UserWarning -m pdoc --docformat google \
	    --output-directory docs $(DOCUMENTED)
	@echo "build/docs/index.html"

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@rm -rf $(LAYOUT) && mkdir -p $(LAYOUT) && ln -s $(addprefix $(CURDIR)/,$(ROOMS)) $(LAYOUT)
	cd $(LAYOUT)/.. && ../bin/python -m mypy \
	    --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/.installed
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

# Without build/lib, where files that are gone from the checkout would live on.
wheel: $(VENV)/.installed
	rm -rf build/lib* build/bdist* dist/*.whl
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	@ls dist/*.whl

# The stable Python ABI, what it needs of the system, and what an index would refuse.
check-wheel: wheel
	$(PIP) install -c $(VENV)/constraints.txt abi3audit auditwheel twine
	$(PY) -m abi3audit --strict dist/*.whl
	$(PY) -m auditwheel show dist/*.whl
	$(PY) -m twine check --strict dist/*.whl

# The CUDA kernels for compute capabilities 8.0 and 9.0, where there is nvcc: a GPU is not needed.
check-cuda: $(VENV)/.installed
	$(PY) setup.py --quiet check_cuda

clean:
	rm -rf $(VENV) build dist *.egg-info retro_ops/*.so
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# On a GPU machine PYTHON's own CUDA build of PyTorch serves, seen through a .pth file; if it has
# none, PyPI's. Other machines get a build without CUDA, a tenth of the size.
$(TORCH_STAMP):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit( \
	    f"retro_ops needs Python 3.10 or later, {sys.executable} is {sys.version.split()[0]}; " \
	    "name another one: make PYTHON=...")'
	@echo "Making $(VENV) with $(TORCH) and the development tools; this takes a few minutes."
	$(PYTHON) -m venv --clear $(VENV)
ifdef GPU
	if $(PYTHON) -c 'import torch; assert torch.version.cuda' 2>/dev/null; then \
	    site=$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	    $(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' \
	        > "$$site/torch_of_this_machine.pth"; \
	else $(PIP) install $(TORCH); fi
else
	$(PIP) install --no-deps --no-index $(TORCH) 2>/dev/null \
	    || $(PIP) install --no-deps --index-url $(TORCH_INDEX) $(TORCH)
endif
	touch $@

# PyTorch is settled above, in whatever version this machine has: its pin is left out.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt \
    $(wildcard models/__init__.py benchmarks/__init__.py) | $(TORCH_STAMP)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) install -c $(VENV)/constraints.txt torch setuptools ninja
	$(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e '.[models,dev]'
	touch $@

$(LIBRARY): csrc $(wildcard csrc/*.*) setup.py pyproject.toml | $(VENV)/.installed
	$(PY) setup.py --quiet build_ext --inplace
	touch $@

$(RUNNER): $(wildcard csrc/runner/*.*) setup.py | $(VENV)/.installed
	$(PY) setup.py --quiet build_runner --output $@
