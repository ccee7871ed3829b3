# Needs python3 (3.11 or newer), make and a C++ compiler; everything else goes into .venv.
PYTHON ?= python3
# One more than there are cores, since tests also wait; at most 8.
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(8, 1 + len(os.sched_getaffinity(0))))" 2>/dev/null || echo 3)

.PHONY: generate test slow fuzz mutants lint clean

generate: .venv/runtime
	.venv/bin/python generate.py --prompt "Once upon a time" -n 16 --top 4 --echo

test: lint
	.venv/bin/python -m pytest -n $(WORKERS)

slow: .venv/dev
	.venv/bin/python -m pytest --slow -n $(WORKERS)

fuzz: .venv/dev
	FUZZ_PROFILE=fuzz .venv/bin/python -m pytest -n $(WORKERS) tests/test_fuzz.py

mutants: .venv/dev
	nice .venv/bin/python scripts/mutants.py

lint: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check --quiet .
	.venv/bin/mypy

.venv/runtime: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/runtime
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
