# make venv sets up .venv; the other targets need nothing before them.
#
# The parts of the set-up that can be overridden, as in `make venv PYTHON=python3.12`:
#   PYTHON   the Python that .venv is made with (default: the first one found)
#   PYTEST_ARGS   more arguments for pytest, as in `make test PYTEST_ARGS="-k spans"`

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test cover laws lint format types docs gallery bench-smoke wheel-test clean

PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10)
VENV := .venv
BIN := $(VENV)/bin
# Named after the folder: a tree that was copied or moved gets an environment of its own.
STAMP := $(VENV)/.complete-$(shell pwd | cksum | cut -d ' ' -f 1)
PACKED := build/wheel-test
PACKED_BIN := $(PACKED)/venv/bin
SITE := site() { "$$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# One thread for each of pytest's processes: more of them only wait for one another.
TEST_ENV := HF_HUB_OFFLINE=1 MKL_NUM_THREADS=1 MPLBACKEND=agg OMP_NUM_THREADS=1 \
	OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 $(PYTEST_ARGS)

help: ## what can be made
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

venv: $(STAMP) ## .venv with the package and all that its tests and benchmarks need

# Without a stamp the environment is new, moved, or half installed: it is made afresh.
$(STAMP): setup.cfg constraints.txt captum_cage/_version.py
	@if [ -f $@ ]; then rm $@; exit; fi; \
	for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 10))' \
	    >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; \
	    exec "$$python" -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "No Python 3.10 or newer with venv among: $(PYTHONS)." >&2; \
	echo "Install one, or name it: make venv PYTHON=/path/to/python" >&2; \
	exit 1
	$(BIN)/python -m pip install --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation \
	  --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## a small model solves a problem, and its answer is explained
	@$(BIN)/captum-cage demo

test: $(STAMP) ## all tests but those of the docs, which are run by `make docs`
	$(TEST_ENV) $(BIN)/python $(PYTEST) --ignore tests/test_docs.py

cover: $(STAMP) ## all tests, with the lines and branches that none of them ran
	$(TEST_ENV) $(BIN)/python $(PYTEST) --cov --cov-report=term-missing

# Slow: thousands of examples of each law, and thousands of broken inputs of each kind.
laws: $(STAMP) ## the laws and the fuzzer, with many times more examples than the tests
	HYPOTHESIS_PROFILE=deep $(TEST_ENV) $(BIN)/python $(PYTEST) tests/test_laws.py
	$(TEST_ENV) $(BIN)/python benchmarks/fuzz.py --runs 20000

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP) ## ruff writes what lint asks for
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

# The site is made afresh: what is left of an earlier one could hide a dead link.
docs: $(STAMP) ## the site, in build/site; examples are run, links followed, pictures compared
	$(TEST_ENV) $(BIN)/python $(PYTEST) --doctest-modules captum_cage tests/test_docs.py
	$(TEST_ENV) $(BIN)/python docs/gallery/make.py --check
	rm -rf build/site
	$(TEST_ENV) $(BIN)/sphinx-build -q -W --keep-going -d build/doctrees docs build/site
	$(BIN)/python docs/links.py build/site

gallery: $(STAMP) ## docs/gallery is made anew
	$(TEST_ENV) $(BIN)/python docs/gallery/make.py

bench-smoke: $(STAMP) ## every benchmark in its smallest size, two at a time
	@ls benchmarks/[!_]*.py | $(TEST_ENV) xargs -P 2 -n 1 sh -c ' \
	  out=$$($(BIN)/python "$$0" --smoke 2>&1); failed=$$?; \
	  printf "== %s --smoke\n%s\n" "$$0" "$$out"; exit $$failed'

# The wheel is made by way of the source archive and installed beside .venv, whose
# packages it sees through a path file; path files in .venv itself, the editable install
# among them, do not count there. The house and the docs are the tree's matter, and what
# a cluster does is that of `make test`.
wheel-test: $(STAMP) ## all tests, and those of docs/examples, on the wheel as it is installed
	rm -rf build captum_cage.egg-info
	$(BIN)/python -m build --no-isolation --outdir $(PACKED)
	$(BIN)/python -m venv --without-pip $(PACKED)/venv
	$(BIN)/python -m pip --python $(PACKED)/venv install --no-deps $(PACKED)/*.whl
	set -e; $(SITE); packages=$$(site $(BIN)/python); installed=$$(site $(PACKED_BIN)/python); \
	echo "$$packages" > "$$installed/dependencies.pth"; \
	diff -r -x __pycache__ captum_cage "$$installed/captum_cage"; \
	cd $(PACKED); imported=$$(venv/bin/python -c 'import captum_cage; print(captum_cage.__file__)'); \
	echo "The tests import $$imported"; \
	[ "$$imported" = "$$installed/captum_cage/__init__.py" ]; \
	venv/bin/captum-cage --help > help.txt; \
	venv/bin/python ../../benchmarks/install.py --smoke; \
	$(TEST_ENV) venv/bin/python $(PYTEST) -c ../../pyproject.toml --rootdir ../.. \
	  ../../tests --ignore ../../tests/test_house.py --ignore ../../tests/test_docs.py \
	  --ignore ../../tests/test_batch_on_ray.py
	cp -r docs/examples $(PACKED)/examples
	set -e; for example in $(PACKED)/examples/*/; do \
	  $(BIN)/python -m pip --python $(PACKED)/venv install --no-deps --no-index \
	    --no-build-isolation "$$example"; \
	  (cd "$$example"; $(TEST_ENV) ../../venv/bin/python -m pytest -p no:cacheprovider); \
	done

clean: ## removes all that is made here, .venv included
	rm -rf $(VENV) build dist captum_cage.egg-info .coverage .coverage.* \
	  .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find captum_cage tests benchmarks docs -name __pycache__ -type d -exec rm -rf {} +
