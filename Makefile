# Everything below runs in .venv, which is made first when needed. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help course setup test test-fast lab labs book bench bench-gpu clean distclean

LABS ?=
STARTED := $(shell date +%s)
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PIP_INSTALL := $(PIP) install --progress-bar $(if $(CI),off,on)

export PYTHONUNBUFFERED := 1
export PIP_NO_INPUT := 1
# Nothing here reports to anybody.
export HF_HUB_DISABLE_TELEMETRY := 1

help:  ## this list
	@echo "llmcourse: make TARGET"
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
	  printf '  %-11s %s\n' "$$name" "$$text"; done
	@echo 'Only some labs: make course LABS="01 04".  Another Python: make course PYTHON=python3.12.'

course: setup  ## from a fresh clone to executed labs and a rendered book; later calls do what is stale
	@$(PY) -m llmcourse.course --labs "$(LABS)" --started $(STARTED)

setup: $(VENV)/.package  ## create .venv and install the pinned requirements and the package

$(VENV)/bin/python:
	@python="$$(.ci/find-python $(PYTHON))"; echo "creating $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "could not create $(VENV); on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# The interpreter's file is older than what pip installs, so it must only exist: hence order-only.
$(VENV)/.requirements: requirements.txt | $(VENV)/bin/python
	@echo "installing requirements.txt (the first time this downloads some GB)"
	@$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(VENV)/.package: pyproject.toml $(VENV)/.requirements
	@$(PIP_INSTALL) --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test: setup  ## everything that CI asks: style, tests, every lab executed, the book built and looked at
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/codespell
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal
	$(VENV)/bin/llmcourse build sft
	$(PY) -m llmcourse.labs check
	$(PY) -m llmcourse.book build --force
	$(PY) -m pytest -m book tests/test_book.py tests/test_browser.py
	@echo "make test: all passed in $$(( ($$(date +%s) - $(STARTED)) / 60 )) min"

test-fast: setup  ## style and the quick unit tests
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -m "not book and not slow"

lab: setup  ## open the labs in JupyterLab
	@$(PY) -m llmcourse.labs build
	@$(PY) -m jupyterlab labs

labs: setup  ## execute the labs that are stale
	@$(PY) -m llmcourse.labs execute --labs "$(LABS)"

book: setup  ## render the book into _build/html
	@$(PY) -m llmcourse.book build

bench: setup  ## measure the package beside its peers and check the bars
	@$(PY) -m benchmarks

bench-gpu: setup  ## the benchmarks that need a CUDA device
	@$(PY) -m benchmarks --gpu

clean:  ## remove the rendered book and caches of tools, not .venv and not trained models
	@rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find llmcourse tests book benchmarks labs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## clean, and remove .venv too
	@rm -rf $(VENV)
