# Every target makes the environment it needs: a machine with Python >= 3.11, git and make is enough.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# What Python has compiled is kept: a check starts hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install test quick lint demo poc poc-stop bench docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP) ## make .venv with everything in constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("histoflare needs Python >= 3.11; set PYTHON=python3.11 or newer") if sys.version_info < (3, 11) else None'
	@echo "Installing histoflare into $(VENV): up to $$(grep -c == constraints.txt) packages, 2 GB on disk with PyTorch for the CPU, more with CUDA. This takes minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,demo,dev]'
	@touch $@
	@echo "Installed: $(BIN)/histoflare -h"

lint: $(STAMP) ## ruff (style and imports) and mypy (types, strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(STAMP) ## lint beside the quick tests, then the tests with processes of their own, two files at a time
	@$(MAKE) --no-print-directory --jobs 2 lint quick
	$(BIN)/python -m pytest -m slow -n 2 --dist loadfile --durations 10

quick: $(STAMP) ## the quick tests
	$(BIN)/python -m pytest -m 'not slow' -n logical --maxprocesses 4 --dist loadfile --durations 10

# What a person gives as SLIDES, OUT, TASK, SITES and BAGS reaches the shell in its environment: paths may have blanks.
demo: $(STAMP) ## four hospitals and an external one through FLARE: demo-run/report.json (SLIDES=folder for your own: folder-run/; TASK=segmentation)
	$(BIN)/histoflare demo --out "$${OUT:-$$(basename "$${SLIDES:-$${TASK:-demo}}")-run}" $${SLIDES:+--slides "$$SLIDES"} $${TASK:+--task "$$TASK"} $(DEMO_ARGS)

poc: $(STAMP) ## start a federation for the console and leave it up (SITES=folder BAGS=folder for your own)
	$(BIN)/histoflare poc start --workspace poc-run $${SITES:+--sites "$$SITES"} $${BAGS:+--bags "$$BAGS"} $(POC_ARGS)

poc-stop: $(STAMP) ## end what 'make poc' started
	$(BIN)/histoflare poc stop --workspace poc-run

bench: $(STAMP) ## the figures of docs/measured.md, one after the other
	@for bench in tests/benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python -m tests.benchmarks.$$(basename $$bench .py) || exit 1; done

docs: $(STAMP) ## build the documents to site/index.html; a link that leads nowhere is an error
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean: ## remove the environment, the demo and caches; what has a privacy ledger in it stays
	@test ! -f poc-run/federation.json || $(BIN)/histoflare poc stop --workspace poc-run
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site custom/*.egg-info
	@for run in demo-run segmentation-run poc-run; do \
	  if [ -n "$$(find $$run -name '*.sqlite' 2>/dev/null | head -n 1)" ]; then \
	    echo "$$run stays: it has privacy ledgers, which say what was spent on whom; to remove it all the same: rm -r $$run"; \
	  else rm -rf $$run; fi; done
