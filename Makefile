# PaliGemma from Scratch. Every target works on a fresh machine with python3 and make.
#
#   make book       build the pages (no torch needed) and say where they are
#   make serve      build them and serve them on http://localhost:8000
#   make test       install everything and run every check
#   make lab        open the chapters in JupyterLab
#   make chapters   export modules, execute stale notebooks, normalise (CH=02 for one)
#   make colab      run the chapters as Colab does (CH=02 for one)
#   make soak       the slow checks: every page at every size, many more random cases
#   make links      follow every link that leaves the book (needs the network)

PYTHON ?= python3
PORT ?= 8000
CH ?=
BIN := .venv/bin
# uv does not read pip's configuration: hand it the wheels that pip would find.
INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode \
	--constraint constraints.txt $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS))
PYTEST = $(BIN)/python -m pytest --quiet
# Two threads, as when the chapters were rendered: sums come out the same.
export OMP_NUM_THREADS ?= 2
export MKL_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= passive

.PHONY: book serve test lint unit notebooks pages lab chapters colab soak links clean
.DEFAULT_GOAL := book

book: .venv/.book
	@$(BIN)/jupyter-book build . -W --keep-going --quiet
	@echo "The book: file://$(CURDIR)/_build/html/index.html  (make serve shows it in a browser)"

serve: book
	$(BIN)/python -m http.server --directory _build/html $(PORT)

test: .venv/.dev lint unit notebooks book pages

lint: .venv/.dev
	$(BIN)/ruff check pgcore tools tests
	$(BIN)/ruff format --check pgcore tools tests
	$(BIN)/basedpyright --level error
	$(BIN)/python tools/export.py --check
	$(BIN)/python tools/render.py --check

unit: .venv/.dev
	$(PYTEST) tests --jaxtyping-packages=pgcore,beartype.beartype \
		--ignore tests/test_pages.py --ignore tests/test_colab.py

notebooks: .venv/.dev
	$(PYTEST) --nbval-lax --nbval-current-env --nbval-cell-timeout=300 chapters

pages: .venv/.dev book
	$(PYTEST) tests/test_pages.py tests/test_colab.py

lab: .venv/.lab
	$(BIN)/jupyter lab chapters

chapters: .venv/.dev
	$(BIN)/python tools/render.py $(CH)

colab: .venv/.dev
	PGCORE_COLAB="$(or $(CH),all)" $(PYTEST) tests/test_colab.py

soak: .venv/.dev book
	HYPOTHESIS_PROFILE=soak PGCORE_PAGES=all $(PYTEST) tests \
		--jaxtyping-packages=pgcore,beartype.beartype

links: .venv/.book
	$(BIN)/jupyter-book build . --builder linkcheck

clean:
	rm -rf _build .venv

$(BIN)/uv:
	@echo "Creating .venv ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet uv

.venv/.book: pyproject.toml constraints.txt | $(BIN)/uv
	@echo "Installing what building the book needs ..."
	@$(BIN)/python tools/requirements.py book | $(INSTALL) -r -
	@touch $@

.venv/.lab: pyproject.toml constraints.txt | $(BIN)/uv
	@echo "Installing what running the chapters needs ..."
	@$(INSTALL) -e ".[lab]"
	@touch $@

.venv/.dev: pyproject.toml constraints.txt | $(BIN)/uv
	@echo "Installing everything ..."
	@$(INSTALL) -e ".[dev]"
	@touch $@ .venv/.book .venv/.lab
