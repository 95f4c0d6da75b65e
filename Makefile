# make setup      an environment in .venv with everything that is needed
# make demo       setup, then the demonstration
# make check      format, lint, types, floors
# make test       the fast tests;  make test-slow: those that convert or run the bundled base
# make bench      side-by-side measurements
# make page       build the page of web/ into the package; needs node and npm, which nothing else does
# make docs       the documentation site in build/site, manual pages in build/man
# make release VERSION=0.2.0   stamps the version and cuts the changelog; make release-check builds wheel and sdist and checks them
# Another interpreter: make setup PYTHON=/path/to/python3.12

SHELL := /bin/bash
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.trimtab-setup
PYTEST_ARGS ?=
# pip's output without what nobody needs: a line a package, then that all of them are unpacked; errors stay.
# Not awk: some read a pipe in whole blocks, so that nothing would be seen for minutes.
PROGRESS := { n=0; steps='^ +(Downloading|Using|Preparing|Getting|Installing|Attempting|Found|Not|Uninstalling|Successfully|Checking|Building|Created|Stored) '; \
	others='^(WARNING: Location|Looking|Requirement already|Obtaining|Checking|Building|Created|Stored|Successfully installed)'; while IFS= read -r line; do \
	if [[ $$line =~ ^(Collecting|Processing)\ ([^\ ]+) ]]; then n=$$((n + 1)); echo "$$n $${BASH_REMATCH[2]\#\#*/}"; \
	elif [[ $$line == "Installing collected"* ]]; then echo "all $$n are here; unpacking them, which pip does in silence"; \
	elif [[ ! $$line =~ $$steps && ! $$line =~ $$others ]]; then printf '%s\n' "$$line"; fi; done; }

.PHONY: setup demo check format test test-slow bench page docs release release-check clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then echo "trimtab needs Python 3.11 or newer; none found. Install one, or: make PYTHON=/path/to/python3.11" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "trimtab needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "fetching and installing about 170 packages into $(VENV): a few minutes, most of them for torch"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[dev]' 2>&1 | $(PROGRESS)
	@touch $@

demo: setup
	$(BIN)/trimtab demo

check: setup
	$(BIN)/ruff format --check src tests scripts
	$(BIN)/ruff check src tests scripts
	$(BIN)/mypy src
	$(BIN)/python -m pytest -q tests/test_floors.py

format: setup
	$(BIN)/ruff format src tests scripts
	$(BIN)/ruff check --fix src tests scripts

# Two tests at a time, each on one core; those of a file together, since they share what it loads.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile $(PYTEST_ARGS)

test-slow: setup
	@failed=0; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not alone" -n 2 --dist loadfile $(PYTEST_ARGS) || failed=1; \
	$(BIN)/python -m pytest -m "slow and alone" $(PYTEST_ARGS) || failed=1; \
	exit $$failed

bench: setup
	$(BIN)/python bench/train_joint.py
	$(BIN)/python bench/serve_mixed.py
	@echo "bench/train_vs_trl.py needs the peer's own environment: docs/benchmarks.md has the command"

page:
	cd web && npm ci --ignore-scripts && npm run build

INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

docs: setup
	$(INSTALL) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python -m scripts.check_site build/site
	$(BIN)/python -m scripts.man build/man
	@echo "to read it: $(BIN)/python -m http.server --bind 127.0.0.1 --directory build/site 8001"

release: setup
	@if [ -z "$(VERSION)" ]; then echo "say which version: make release VERSION=0.2.0" >&2; exit 2; fi
	$(BIN)/python -m scripts.release cut $(VERSION)

release-check: setup
	$(INSTALL) -e '.[release]'
	$(BIN)/python -m scripts.release check

clean:
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
