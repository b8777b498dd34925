# Two commands do all the set-up: `make demo` and `make test`.
VENV   ?= .venv
PYTHON ?= python3
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
# Two files of tests at a time: those of jobs wait for processes half of their time, and hold 3 GB each.
PYTEST := $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

.PHONY: setup demo test test-quick check bench docs ui clean

setup: $(STAMP)

# One install into .venv. The versions of constraints.txt are those that were tested together; torch and torchvision
# are the plain builds of the index, which run on CPU and GPU.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "LEMON needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(RUN) jobs/demo.py

test: setup
	$(PYTEST) -m "not gpu"

test-quick: setup
	$(PYTEST) -m "not gpu and not slow and not ray"

check: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache

# MLflow's page of the runs in a database, on this machine only; it prints the links to the runs.
DB ?= mlflow.db
ui: setup
	$(RUN) jobs/ui.py database=$(abspath $(DB))

bench: setup
	$(RUN) -m benchmarks.hoverfast
	$(RUN) -m benchmarks.encoding
	$(RUN) -m benchmarks.memory
	$(RUN) -m benchmarks.views
	$(RUN) -m benchmarks.feed
	$(RUN) -m benchmarks.pretrain
	$(RUN) -m benchmarks.embed
	$(RUN) -m benchmarks.probe
	$(RUN) -m benchmarks.cost --no-speed
	$(RUN) -m benchmarks.local_cluster

# The documentation's site, in dist/docs; needs no network but for the packages.
docs: setup
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean:
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache
