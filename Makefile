# make demo            everything from an empty machine to a scored, exported checkpoint
# make demo DATA=dir   the same on a folder of images with captions
# make test            the tests
#
# VARIANT=cpu|cuda     which lock to install (default: what the machine has)
# PYTHON=...           the Python to install with (default: python3.11, else python3.12, else python3.13)
# PIP_ARGS=...         more arguments for pip, e.g. an index of your own; PyTorch's CPU index is then not asked
# FROM=stage           makes this stage and those after it again, finished or not
# REMAKE=1             makes again what this version makes otherwise than the one whose results stand
# RECIPE=name          another recipe; SET="pretrain.samples=9600 seed=1" changes fields of it (no spaces inside a value)

PYTHONS := python3.11 python3.12 python3.13
PYTHON  ?= $(or $(shell for p in $(PYTHONS); do $$p -c '' 2>/dev/null && echo $$p && break; done),python3.11)
VARIANT ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
RECIPE  ?= mini
VENV    := .venv
BIN     := $(VENV)/bin
LOCK    := infra/locks/$(VARIANT).txt
READY   := $(VENV)/.installed-$(VARIANT)
TORCH   := $(shell grep ^torch== $(LOCK))
CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP     := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SWIFT   := .venv-swift
ON_S3   := tests/sd3core/data tests/sd3core/bench/test_bench_data.py tests/workers/test_unchanged_files.py tests/workers/trainer/test_loop.py tests/end_to_end/test_s3.py
TWO     := --numprocesses 2 --dist loadscope --no-loadscope-reorder

.PHONY: demo test lint test-unit test-kills test-s3 up down setup clean

demo: $(READY)
	@$(BIN)/sd3 demo --recipe "$(RECIPE)" $(if $(DATA),--data "$(DATA)") $(if $(FROM),--from-stage $(FROM)) $(if $(REMAKE),--remake) $(foreach s,$(SET),--set "$(s)")

test: lint
	@$(BIN)/python -m pytest $(TWO) --durations=20

lint: $(READY)
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "make: not formatted; run $(BIN)/ruff format"; exit 1; }

test-unit: $(READY)
	@$(BIN)/python -m pytest $(TWO) -m "not slow"

test-kills: $(READY)  # kills, Ctrl-C and full disks in every stage, stores that go away; takes about two hours
	@$(BIN)/python -m pytest -m kills

# The store, a chain and whatever else reads from S3, on a real server (OpenStack Swift), which this installs for itself.
test-s3: $(READY) $(SWIFT)/.installed
	@SD3_SWIFT="$(abspath $(SWIFT))" $(BIN)/python -m pytest -m "not kills" $(ON_S3)

setup: $(READY)

up down: $(READY)
	@$(BIN)/sd3 $@

# What is missing is told before anything is downloaded. PyPI's torch for Linux brings CUDA: three gigabytes that a machine
# without a GPU has no use for, so PyTorch's own index of CPU builds is asked first.
$(READY): $(LOCK) pyproject.toml
	@$(call need,$(PYTHON),python3.11 (3.12 and 3.13 do as well; PYTHON=/path/to/python names one))
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "make: $(PYTHON) is no Python 3.11, 3.12 or 3.13; name one with PYTHON=/path/to/python"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "make: $(PYTHON) lacks its venv module; install the package python3-venv (Debian, Ubuntu), or python3.N-venv of its version"; exit 1; }
	@$(call need,git,git)
	@$(call need,g++,g++)
	@echo "installing the $(VARIANT) lock into $(VENV) (once; two to three minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)  # a venv that was cut short has no pip
ifeq ($(VARIANT)$(PIP_ARGS),cpu)
	@why=$$($(PIP) --no-deps --retries 1 --timeout 10 --index-url $(CPU_INDEX) $(TORCH) 2>&1) || \
	  echo "PyTorch's CPU index gives no $(TORCH) ($$(echo "$$why" | tail -n 1)): it comes from pip's own index, PyPI's with CUDA for Linux (three gigabytes more)"
endif
	@$(PIP) $(PIP_ARGS) -r $(LOCK)
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

$(SWIFT)/.installed:
	@$(call need,memcached,memcached)
	@echo "installing OpenStack Swift into $(SWIFT) (once; half a minute)"
	@$(PYTHON) -m venv --clear $(SWIFT)
	@$(SWIFT)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) swift==2.38.3 lxml==6.1.3
	@$(SWIFT)/bin/python -c 'import pyeclib.ec_iface' 2>/dev/null || { echo "make: Swift lacks liberasurecode; install the package liberasurecode1"; exit 1; }
	@touch $@

# One line with the package to install where a program is missing.
need = command -v $(firstword $(1)) >/dev/null || { echo "make: $(firstword $(1)) is missing; install the package $(2)"; exit 1; }

clean:
	@echo "make clean removes the environment only; what runs made is in local/ (rm -r local)"
	rm -rf $(VENV) build *.egg-info
