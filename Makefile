# make demo [SEED=0]   set-up, and the main job on the embedded data set, into runs/demo
# make test            set-up, and the tests that CI runs
# make test-all        those and the slow ones
# make soak            kills the demo at random moments, 20 runs: see docs/concepts/reliability.md
# make lint            ruff, shellcheck, the floors of the package, and types
# make docs            the documentation site, into site/
# make setup           .venv with everything; the others call it
PYTHON ?= python3
SEED ?= 0

BIN := .venv/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
INSTALLED := .venv/installed-$(VERSION)

.PHONY: setup demo test test-all soak lint docs clean

setup: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --editable '.[dev,docs]'
	touch $@

# One folder a seed; runs/demo points to the one that ran last.
demo: setup
	mkdir -p runs
	ln -sfn demo-seed$(SEED) runs/demo
	$(BIN)/python -m instdisc_jax.main --config=configs/digits.py --workdir=runs/demo-seed$(SEED) \
	  --config.seed=$(SEED)

test: setup
	$(BIN)/pytest -n 2 --dist loadfile -m 'not slow'

test-all: setup
	$(BIN)/pytest -n 2 --dist loadfile

soak: setup
	$(BIN)/python -m tests.soak_kill

lint: setup
	$(BIN)/ruff check .
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch
	$(BIN)/lint-imports
	$(BIN)/basedpyright

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv build site *.egg-info
