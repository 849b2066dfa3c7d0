# make demo            everything from an empty machine to a scored, exported checkpoint
# make demo DATA=dir   the same on a folder of images with captions
# make test            the tests
#
# VARIANT=cpu|cuda     which lock to install (default: what the machine has)
# PIP_ARGS=...         more arguments for pip, e.g. an index that serves PyTorch's CPU build
# FROM=stage           makes this stage and those after it again, finished or not
# REMAKE=1             makes again what this version makes otherwise than the one whose results stand
# RECIPE=name          another recipe; SET="pretrain.samples=9600 seed=1" changes fields of it (no spaces inside a value)

PYTHON  ?= python3.11
VARIANT ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,cpu)
RECIPE  ?= mini
VENV    := .venv
BIN     := $(VENV)/bin
LOCK    := infra/locks/$(VARIANT).txt
READY   := $(VENV)/.installed-$(VARIANT)
TWO     := --numprocesses 2 --dist loadscope --no-loadscope-reorder

.PHONY: demo test test-unit test-kills up down setup clean

demo: $(READY)
	@$(BIN)/sd3 demo --recipe "$(RECIPE)" $(if $(DATA),--data "$(DATA)") $(if $(FROM),--from-stage $(FROM)) $(if $(REMAKE),--remake) $(foreach s,$(SET),--set "$(s)")

test: $(READY)
	@$(BIN)/python -m pytest $(TWO) -m "not slow"
	@$(BIN)/python -m pytest $(TWO) -m "slow and not kills" --durations=20

test-unit: $(READY)
	@$(BIN)/python -m pytest $(TWO) -m "not slow"

test-kills: $(READY)  # kills, Ctrl-C and full disks in every stage, stores that go away; takes about two hours
	@$(BIN)/python -m pytest -m kills

setup: $(READY)

up down: $(READY)
	@$(BIN)/sd3 $@

$(READY): $(LOCK) pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed; name a Python 3.11 with PYTHON=/path/to/python"; exit 1; }
	@echo "installing the $(VARIANT) lock into $(VENV) (once; two to three minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)  # a venv that was cut short has no pip
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r $(LOCK)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	@echo "make clean removes the environment only; what runs made is in local/ (rm -r local)"
	rm -rf $(VENV) build *.egg-info
