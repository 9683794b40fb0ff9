PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
# Two processes of one thread each: more would not fit two cores, nor the memory.
# Compiled modules are kept, whatever the environment says: many processes import them.
PYTEST  = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: learn test check lint notebooks bench clean

learn: $(VENV)/.installed
	$(BIN)/python -m soups.learn configs/digits.yaml

test: $(VENV)/.installed-dev
	$(PYTEST)

check: lint
	$(PYTEST) -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

notebooks: $(VENV)/.installed-dev
	$(BIN)/python -m pytest notebooks --overwrite

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/soup_construction.py
	$(BIN)/python benchmarks/merge_throughput.py
	$(BIN)/python benchmarks/mix.py
	$(BIN)/python benchmarks/grouped_forward.py
	$(BIN)/python benchmarks/candidate_soups.py
	$(BIN)/python benchmarks/joint_training.py
	$(BIN)/python benchmarks/compressed_rows.py

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
