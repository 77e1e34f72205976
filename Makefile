# Two commands: `make study` runs the main job, `make test` all quick tests. Each makes .venv first.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := lensclust probes studies tests
STUDIES := emergence realistic unseen identity_pretraining alignment component_reweighting \
	head_patterns icl_representations layer_by_layer

.PHONY: study test test-slow notebooks docs check bench bench-full calibrate readme lock clean

study: .venv/installed
	$(BIN)/lensclust run emergence --out runs/emergence --resume

test: .venv/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow"

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist worksteal --durations 20 -m slow tests

# Every notebook from its first cell to its last; outputs go nowhere.
notebooks: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 2 --nbmake --nbmake-timeout=900 --durations 6 studies/notebooks

# The site, in docs/_build/index.html.
docs: .venv/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

check: .venv/installed-test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/pyright

bench: .venv/installed-bench
	$(BIN)/python -m tests.benchmarks

# Every prompt of instruction_induction, and larger sizes: an hour.
bench-full: .venv/installed-bench
	$(BIN)/python -m tests.benchmarks --full

# False-positive rates and power of every p, simulated: the table of docs/calibration.md.
calibrate: .venv/installed-test
	$(BIN)/python -m tests.calibration

# The README's claims and picture, from the runs that are there.
readme: .venv/installed-test
	$(BIN)/python -m tests.benchmarks.readme $(wildcard $(STUDIES:%=runs/%))

# One universal lock for every supported Python; extras are pinned too.
lock: .venv/installed-test
	$(BIN)/pip install --quiet uv
	echo "torch==2.13.0" | $(BIN)/uv pip compile --quiet --universal --python-version 3.10 \
		--all-extras --no-annotate --no-header --constraint - pyproject.toml -o requirements.lock

clean:
	rm -rf .venv docs/_build .ruff_cache .pytest_cache .hypothesis dist
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# The lock is a constraint: it pins every package, and pip takes those that the platform needs.
.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[test]"
	touch $@

.venv/installed-bench: .venv/installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[bench]"
	touch $@

.venv/installed-docs: .venv/installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[docs]"
	touch $@
