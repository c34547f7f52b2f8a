# `make demo` and `make test` do all of the set-up themselves.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2
BIN    := $(VENV)/bin
SETUP  := $(VENV)/.installed
# the pinned set exists for Python 3.11 and later; Python 3.10 gets the newest that it can have
PINS    = $(shell $(PYTHON) -c 'import sys; print("-c constraints.txt" if sys.version_info >= (3, 11) else "")')
# no network while testing; one thread per process, since several processes run at a time
QUIET   = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help setup browser demo test export readme docs clean
help:
	@echo 'make demo    draw shapes, train on them, sample from held-out captions, train a student, into demo/'
	@echo 'make test    run every notebook, then the tests (JOBS=4: four notebooks at a time)'
	@echo 'make export  notebooks -> mdm/, README.md, llms.txt; settings.ini -> pyproject.toml; clean the notebooks'
	@echo 'make docs    the site, into _docs/ (with Quarto where it is installed, else a preview of it)'
	@echo 'make setup   only the set-up, in .venv'
	@echo 'make browser install Chromium and an emoji font where they are not found; tests need them'
	@echo 'make clean   remove caches and what was built; .venv, demo/ and runs/ stay'

setup: $(SETUP)
$(SETUP): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit(f"mdm needs Python 3.10 or later; {sys.executable} is {v[0]}.{v[1]}. Try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PINS) -e '.[dev]'
	@touch $@

# Found, or downloaded by Playwright, or the system's packages, or a last line that says what to install.
browser: $(SETUP)
	@$(BIN)/python tests/browser.py

demo: $(SETUP)
	$(BIN)/mdm_demo --output demo

# Both parts always run; the last line is pytest's, or says that a notebook failed. Test files keep their order, in which the
# slowest test comes first (conftest.py).
test: browser
	@failed=0; \
	$(QUIET) $(BIN)/python tests/run_notebooks.py --jobs $(JOBS) || failed=1; \
	$(QUIET) $(BIN)/python -m pytest tests -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=10 || exit 1; \
	if [ $$failed = 1 ]; then echo '1 failed: a notebook named above'; exit 1; fi

export: $(SETUP)
	$(BIN)/python tests/make_pyproject.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tests/make_readme.py

readme: $(SETUP)
	$(BIN)/python tests/make_readme.py

# nbdev writes a README.md of its own on the way; ours has the last word
docs: readme
	@if command -v quarto >/dev/null; then PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_docs && $(BIN)/python tests/make_readme.py; \
	else echo 'Quarto is not installed: making the preview'; $(BIN)/python tests/make_docs.py; fi

clean:
	rm -rf _docs _proc nbs/nbdev.yml build dist .pytest_cache
	find mdm nbs tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
