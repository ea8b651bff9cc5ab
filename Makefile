# The suite's commands. Each one runs in the virtual environment .venv, made on first use from requirements.txt.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python
INSTALLED := .venv/.installed
FRAMEWORKS := .venv/frameworks
DOCS := .venv/docs
RIVALS := .venv/rivals
WORKERS ?= 2

# What make studies runs: configurations, the shortest first, and the benchmarks whose tables are no records. ALONE: where
# seconds are compared, one run has the machine for itself.
STUDIES ?= $(addprefix graduate_admissions/,paper rivals rates ablation) $(addprefix burgers_2d/,rates noise study) \
  burgers_100d/hour $(addprefix burgers_2d/,accurate residuals) burgers_100d/residuals $(addprefix burgers_2d/,rivals paper)
ALONE := burgers_2d/accurate burgers_2d/rivals burgers_100d/hour
TABLES ?= tuned_rates design_choices wrapped schedules single_steps linear_losses hunt where_it_pays deepxde_burgers
COMMAND_tuned_rates := tuned_rates results
COMMAND_design_choices := design_choices
COMMAND_wrapped := wrapped
COMMAND_schedules := schedules --first 5
COMMAND_single_steps := schedules --first 5 --store-each-nth 1 --frequency 2 --steps 60 200
COMMAND_linear_losses := linear_losses
COMMAND_hunt := hunt --cases 100
COMMAND_where_it_pays := where_it_pays --table results/tables/where_it_pays.csv --figure results/tables/where_it_pays.png
COMMAND_deepxde_burgers := deepxde_burgers

.DEFAULT_GOAL := help
.PHONY: help reproduce studies $(STUDIES:%=study/%) test test-slow test-all test-frameworks docs test-docs lint clean
.DELETE_ON_ERROR:
# Commands use all processors by themselves.
.NOTPARALLEL:

help:
	@echo 'make reproduce   run the experiments on this machine: HDF5 results, figures and a table, in results/'
	@echo '                   ONLY=graduate_admissions   this experiment alone'
	@echo '                   AADL_DATA_DIR=FOLDER       where the data files are (default: data/)'
	@echo 'make studies     make the long runs behind the tables of docs/, into results/: ten hours on two cores, and the'
	@echo '                 same command goes on where it was stopped'
	@echo '                   STUDIES=burgers_2d/study TABLES=   these alone'
	@echo 'make test        test all units, and each way to run once'
	@echo '                   TESTS=tests/cli   all tests of this folder or file instead'
	@echo '                   WORKERS=8         processes that share the tests (default: 2)'
	@echo 'make test-slow   run the tests that make test leaves out; make test-all runs both'
	@echo 'make test-frameworks   test aadl in Lightning, Accelerate, DeepXDE and others (installs them), the notebook, and types'
	@echo 'make docs        build the documentation site into site/; make test-docs tests it in Chromium, and the package'
	@echo 'make lint        check style, formatting and types'
	@echo 'make clean       remove .venv and the caches; results/ and data/ stay'
	@echo 'PYTHON=python3.12 picks the Python (3.10 or newer) that .venv is made with.'

reproduce: $(INSTALLED)
	$(VENV_PYTHON) -m experiments reproduce $(if $(ONLY),--only '$(ONLY)')

studies: $(STUDIES:%=study/%) $(TABLES:%=results/tables/%.md)
	$(VENV_PYTHON) -m experiments summarize

# Finished runs and tables are not made again.
$(STUDIES:%=study/%): $(RIVALS)/.installed
	PYTHONPATH='$(RIVALS)' $(VENV_PYTHON) -m experiments run $(@:study/%=%) $(if $(filter $(@:study/%=%),$(ALONE)),--jobs 1)

results/tables/%.md: | $(INSTALLED)
	@mkdir -p $(@D)
	OMP_NUM_THREADS=1 $(or $(PYTHON_$*),$(VENV_PYTHON)) -m benchmarks.$(COMMAND_$*) > $@

results/tables/deepxde_burgers.md: export DDE_BACKEND := pytorch
results/tables/deepxde_burgers.md: | $(FRAMEWORKS)/.installed
PYTHON_deepxde_burgers := $(FRAMEWORKS)/bin/python

# Files are shared out whole, in the order of tests/conftest.py: what a file sets up once is not set up twice.
PYTEST = $(VENV_PYTHON) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(INSTALLED)
	$(PYTEST) $(or $(TESTS),-m 'not slow')

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

test-all: test test-slow

test-frameworks: $(FRAMEWORKS)/.installed
	DDE_BACKEND=pytorch $(FRAMEWORKS)/bin/python -m pytest tests/frameworks
	OMP_NUM_THREADS=1 PYTHONPATH='$(CURDIR)' $(FRAMEWORKS)/bin/python -m pytest --nbmake examples/first_five_minutes.ipynb

docs: $(DOCS)/.installed
	$(DOCS)/bin/python -m mkdocs build --strict

# tests/conftest.py needs torch, which the environment of the docs has not: --confcutdir passes it over.
test-docs: $(DOCS)/.installed
	AADL_TORCH="$$($(VENV_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
	  $(DOCS)/bin/python -m pytest --confcutdir tests/docs tests/docs

lint: $(INSTALLED)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

# The stamp is written last, so an interrupted installation is taken up again by the next call.
$(INSTALLED): requirements.txt
	@rm -f $@
	@command -v '$(PYTHON)' >/dev/null || \
	  { echo "error: '$(PYTHON)' was not found: install Python 3.10 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: '$(PYTHON)' is older than Python 3.10: name a newer one with PYTHON=..." >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: '$(PYTHON)' cannot make virtual environments: install its venv module" \
	         "(Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo 'Installing the packages of requirements.txt into .venv (once; torch is large)'
	$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || '$(PYTHON)' -m venv --clear .venv
	$(VENV_PYTHON) -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@touch $@

# Optimizers to compare with, in a folder of their own, so that the tests do not see them.
$(RIVALS)/.installed: tests/frameworks/requirements-optimizers.txt | $(INSTALLED)
	@rm -rf $(RIVALS)
	$(VENV_PYTHON) -m pip install --disable-pip-version-check --quiet --no-deps --target $(RIVALS) \
	  $$(grep -E '^(pytorch_optimizer|schedulefree)==' $<)
	@touch $@

# An environment of its own: Lightning fails beside mpi4py where there is no MPI library. torch comes first, on its own,
# so that the frameworks take the build that is there.
$(FRAMEWORKS)/.installed: tests/frameworks/requirements.txt | $(INSTALLED)
	@rm -f $@
	@echo 'Installing the packages of tests/frameworks/requirements.txt into $(FRAMEWORKS) (once)'
	$(VENV_PYTHON) -m venv --clear $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --disable-pip-version-check --quiet "$$(grep '^torch==' $<)"
	$(FRAMEWORKS)/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

# An environment of its own, without torch: mkdocs reads aadl as text.
$(DOCS)/.installed: docs/requirements.txt | $(INSTALLED)
	@rm -f $@
	@echo 'Installing the packages of docs/requirements.txt into $(DOCS) (once)'
	$(VENV_PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check --quiet -r $<
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
