# Two commands do all set-up on a fresh machine: `make run` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 1)
export OMP_NUM_THREADS ?= 1

SETTING := partition=rotations rounds=60 evaluate_every=5
METHODS := fedmerge fedavg local fesem

.PHONY: run test bench check docs clean

run: $(VENV)/run.ready  ## compare FedMerge with FedAvg, Local and FeSEM on Fashion-MNIST (digits if it cannot be fetched)
	@if $(BIN)/fedmerge data get fashion-mnist size=14; then \
		$(BIN)/fedmerge compare $(METHODS) source=fashion-mnist source.size=14 $(SETTING) --seeds 0-4 --jobs $(JOBS); \
	else \
		echo "Fashion-MNIST could not be fetched (reason above): using the embedded digits, a much smaller set."; \
		$(BIN)/fedmerge compare $(METHODS) source=digits rounds=60 evaluate_every=5 --seeds 0-4 --jobs $(JOBS); \
	fi

# `worksteal`: neighbours stay together, as fixtures and compiled graphs want it, until a process has nothing left.
test: $(VENV)/test.ready  ## all tests on JOBS processes, with branch coverage of the mathematics
	$(BIN)/python -m pytest --numprocesses $(JOBS) --maxprocesses 8 --dist worksteal --cov --cov-report=term:skip-covered
	$(BIN)/python -m coverage report --include='src/fedmerge/core/*,src/fedmerge/algorithms/*' --fail-under=95

bench: $(VENV)/run.ready  ## every method on three small settings, a page of results in bench-short/
	$(BIN)/fedmerge bench short --jobs $(JOBS)

check: $(VENV)/test.ready  ## lint, format, types, import contracts, generated documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/test.ready  ## writes the generated pages of docs/
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) build src/*.egg-info .coverage* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# torch first and by its exact pin: a range may pick a build with gigabytes of GPU libraries.
$(VENV)/torch.ready: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	touch $@

$(VENV)/run.ready: $(VENV)/torch.ready pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/test.ready: $(VENV)/torch.ready pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/run.ready
