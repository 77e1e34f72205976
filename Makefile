# Two commands: `make study` runs the main job, `make test` all quick tests. Each makes .venv first.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := lensclust probes studies tests
STUDIES := emergence realistic unseen identity_pretraining alignment component_reweighting \
	head_patterns icl_representations layer_by_layer

.PHONY: study test test-typed test-slow attack notebooks models calibrate docs check bench \
	bench-full readme lock newest clean

study: .venv/installed
	$(BIN)/lensclust run emergence --out runs/emergence --resume

test: .venv/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow"

# The same, with the types and shapes of every call checked: half as long again.
test-typed: .venv/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow" \
		--jaxtyping-packages=lensclust,probes,studies,beartype.beartype

# The longest first, so that no process is left alone with them.
test-slow: .venv/installed-test
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist worksteal --durations 20 -m slow \
		tests/test_calibration.py tests

# What must not be lost or believed: kills, signals, flipped bits, wrong values; up to 20 minutes.
attack: .venv/installed-test
	$(BIN)/python -m tests.attack

# Every notebook from its first cell to its last, on the site's copies, which keep the outputs.
notebooks: .venv/installed-test
	cp studies/notebooks/*.ipynb docs/notebooks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 2 --nbmake --overwrite --nbmake-timeout=900 --durations 6 docs/notebooks

# docs/models.md: every feature on a tiny model of every family, against plain torch hooks.
models: .venv/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.families

# The site, in docs/_build/html/index.html, after the notebooks that it shows.
docs: .venv/installed-docs notebooks
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

check: .venv/installed-test
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/lint-imports
	$(BIN)/codespell $(SOURCES) docs *.md
	$(BIN)/pyright

bench: .venv/installed-bench
	$(BIN)/python -m tests.benchmarks

# Every prompt of instruction_induction, and larger sizes: an hour.
bench-full: .venv/installed-bench
	$(BIN)/python -m tests.benchmarks --full

# Every p and interval, simulated: the tables of docs/calibration.md and docs/coverage.md.
calibrate: .venv/installed-test
	$(BIN)/python -m tests.calibration

# The claims of docs/results.md, the README's lines and its picture, from the runs that are there;
# then the tutorial's pictures.
readme: .venv/installed-test
	$(BIN)/python -m tests.benchmarks.readme $(wildcard $(STUDIES:%=runs/%))
	OMP_NUM_THREADS=1 $(BIN)/python docs/draw_pictures.py

# One universal lock for every supported Python; extras are pinned too.
lock: .venv/installed-test
	$(BIN)/pip install --quiet uv
	echo "torch==2.13.0" | $(BIN)/uv pip compile --quiet --universal --python-version 3.10 \
		--all-extras --no-annotate --no-header --constraint - pyproject.toml -o requirements.lock

# Can an upper bound be raised? A small test set beside the newest releases, whatever pyproject.toml
# allows. pip says which of our bounds are passed; what fails says why they stay.
NEWEST := .venv-newest/bin
newest:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	$(NEWEST)/pip install --quiet --disable-pip-version-check --editable ".[test]"
	$(NEWEST)/pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager \
		transformer-lens transformers torch xarray zarr peft
	$(NEWEST)/pip list --disable-pip-version-check | grep -E "^(transform|torch|xarray|zarr|peft)"
	$(NEWEST)/python -m pytest -m "not slow" tests/lensclust/models/test_cached_generation.py \
		tests/probes/steering/test_steering_generation.py tests/lensclust/models/test_models.py \
		tests/lensclust/activations/test_extraction.py tests/lensclust/inference/test_prefix.py \
		$(wildcard tests/families)

clean:
	rm -rf .venv .venv-newest docs/_build docs/notebooks/*.ipynb docs/reference/*.rst .ruff_cache .pytest_cache .hypothesis dist
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
