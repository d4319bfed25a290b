# make demo | test | bench | lint | docs | clean
# Each makes .venv with $(PYTHON) when it is absent, and installs into it only when setup.py has changed.

PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test bench lint docs clean
.NOTPARALLEL:

demo: .venv/.installed-demo
	$(BIN)/python -m prompt_tuning_jax.demo

test: .venv/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests $(PYTEST_ARGS)

# For a machine that does nothing else. BENCH_ARGS=--data_dir=path/to/glue adds steps on the rows of its tasks.
bench: .venv/.installed-test
	$(BIN)/python -m experiments.benchmarks.page $(BENCH_ARGS)

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Into site/, which needs no network; a warning is an error.
docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Removes what the targets above make; never runs/.
clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -type d -name __pycache__ -prune -exec rm -rf {} +

# pip is the last file that venv writes, so an interrupted venv is made again.
.venv/bin/pip:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; prompt_tuning_jax needs Python 3.11 or newer (make PYTHON=...)" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; prompt_tuning_jax needs 3.11 or newer (make PYTHON=...)" % sys.version_info[:2])'
	@echo "making .venv"
	@$(PYTHON) -m venv .venv

.venv/.installed-demo: setup.py | .venv/bin/pip
	@echo "installing prompt_tuning_jax and what it needs into .venv (TensorFlow and JAX: a few minutes)"
	@$(PIP) -e .
	@touch $@

.venv/.installed-docs: setup.py | .venv/bin/pip
	@echo "installing prompt_tuning_jax and the documentation's packages into .venv (a few minutes)"
	@$(PIP) -e '.[docs]'
	@touch $@ .venv/.installed-demo

# torch comes first and alone, so that nothing else brings another build of it.
.venv/.installed-test: setup.py | .venv/bin/pip
	@echo "installing torch, for the tests, into .venv"
	@$(PIP) torch==2.13.0
	@echo "installing prompt_tuning_jax, the tests' and the linters' packages into .venv (a few minutes)"
	@$(PIP) -e '.[test,lint]'
	@touch $@ .venv/.installed-demo
