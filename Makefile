# PaliGemma from Scratch. Every target works on a fresh machine with python3 and make.
#
#   make book       build the pages (no torch needed) and say where they are
#   make serve      build them and serve them on http://localhost:8000
#   make demo       ask the small model that ships all about a picture: demo.png (SEED=3)
#   make test       install everything and run every check
#   make lab        open the chapters in JupyterLab
#   make chapters   export modules, execute stale notebooks, normalise (CH=02 for one)
#   make siglip     train the emoji SigLIP that ships (an hour and more; go on by repeating)
#   make tiny       train the tiny PaliGemma (an hour and a half; go on by repeating)
#   make eval-tiny  score it on scenes that it has not seen
#   make colab      run the chapters as Colab does (CH=02 for one)
#   make bench      measure pgcore beside transformers (half an hour, on a quiet machine)
#   make soak       the slow checks: every page at every size, many more random cases
#   make links      follow every link that leaves the book (needs the network)
#   make clean      remove the built pages and the environment

PYTHON ?= python3
PORT ?= 8000
CH ?=
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
# uv does not read pip's configuration: hand it the folders where pip finds wheels.
INSTALL = $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode \
	--constraint $(CONSTRAINTS) $(foreach folder,$(PIP_FIND_LINKS),--find-links $(folder))
PYTEST = $(BIN)/python -m pytest --quiet
SHAPES = --jaxtyping-packages=pgcore,beartype.beartype
# As when the chapters were rendered: two threads, so that sums come out the same, and
# none that spins while it waits, which starves a busy machine.
export OMP_NUM_THREADS ?= 2
export MKL_NUM_THREADS ?= 2
export OMP_WAIT_POLICY ?= passive

.PHONY: book serve demo test lint unit notebooks pages lab chapters siglip tiny eval-tiny \
	colab bench soak links clean
.DEFAULT_GOAL := book
.NOTPARALLEL: # one environment, two cores

# From nothing each time: warnings of a page that was not read again would be lost.
book: .venv/.book
	@rm -rf _build/html _build/.doctrees
	@echo "Building the book ..."
	@$(BIN)/jupyter-book build . -W --keep-going --quiet > _build.log 2>&1 \
		|| { cat _build.log; rm -f _build.log; exit 1; }
	@rm -f _build.log
	@echo "The book: file://$(CURDIR)/_build/html/index.html  (make serve shows it)"

serve: book
	$(BIN)/python -m http.server --directory _build/html $(PORT)

demo: .venv/.lab
	$(BIN)/pgcore demo $(if $(SEED),--seed $(SEED))

test: .venv/.dev lint unit notebooks book pages

lint: .venv/.dev
	$(BIN)/ruff check --quiet pgcore tools tests
	$(BIN)/ruff format --quiet --check pgcore tools tests
	$(BIN)/basedpyright --level error
	$(BIN)/python tools/export.py --check
	$(BIN)/python tools/render.py --check

unit: .venv/.dev
	$(PYTEST) tests $(SHAPES) --ignore tests/test_pages.py --ignore tests/test_colab.py

notebooks: .venv/.dev
	$(PYTEST) --nbval-lax --nbval-current-env --nbval-cell-timeout=300 chapters

pages: .venv/.dev book
	$(PYTEST) tests/test_pages.py tests/test_colab.py

lab: .venv/.lab
	$(BIN)/jupyter lab chapters

chapters: .venv/.dev
	$(BIN)/python tools/render.py $(CH)

siglip: .venv/.lab
	$(BIN)/pgcore train emoji_siglip --out runs/emoji_siglip

tiny: .venv/.lab
	$(BIN)/pgcore train tiny --out runs/tiny

eval-tiny: .venv/.lab
	$(BIN)/pgcore train tiny_eval --model runs/tiny/shipped \
		--out runs/tiny/scores.json --card runs/tiny/shipped/README.md

colab: .venv/.dev
	PGCORE_COLAB="$(or $(CH),all)" $(PYTEST) tests/test_colab.py

bench: .venv/.dev
	$(BIN)/python tools/bench.py

soak: .venv/.dev book
	HYPOTHESIS_PROFILE=soak PGCORE_PAGES=all $(PYTEST) tests $(SHAPES)

links: .venv/.book
	$(BIN)/jupyter-book build . --builder linkcheck

clean:
	rm -rf _build .venv

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
		"Python 3.11 or later is needed, this is " + sys.version.split()[0] + \
		"; name another one with: make PYTHON=python3.12")'
	@echo "Creating .venv ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet uv

.venv/.book: pyproject.toml $(CONSTRAINTS) | $(BIN)/uv
	@echo "Installing what building the book needs ..."
	@$(BIN)/python tools/requirements.py book > .venv/book.txt
	@$(INSTALL) -r .venv/book.txt
	@touch $@

.venv/.lab: pyproject.toml $(CONSTRAINTS) | $(BIN)/uv
	@echo "Installing what running the chapters needs ..."
	@$(INSTALL) -e ".[lab]"
	@touch $@

.venv/.dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/uv
	@echo "Installing everything ..."
	@$(INSTALL) -e ".[dev]"
	@touch $@ .venv/.book .venv/.lab
