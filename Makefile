# make demo    install into .venv, then forget, add and infer a task on this machine, offline
# make test    install, lint and run every test; make quick: the unit tests only
# make paper-smoke  check that every effect of the paper shows, on the model and sets that ship with tva
# make results rewrite the tables of README and docs/results from the ledger, docs/results/data, and list what is older
# make test-oldest  unit tests of checkpoints, vectors, merging, composing and searching with the oldest dependencies allowed
# make docs    build the site in docs/_build/html; any warning is an error
PYTHON ?= python3
SEEDS ?= 0
PAPER := forgetting-images adding-images analogy-subpopulations
BIN := .venv/bin
# two processes, and a file's tests in one of them, which share what is made for all of them; a plain pytest is one process
TWO := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-oldest quick lint docs results paper-smoke install clean

demo: install
	$(BIN)/python -m examples.demo --seeds $(SEEDS)

test: install lint
	$(BIN)/python -m pytest $(TWO)

quick: install
	$(BIN)/python -m pytest $(TWO) -m "not slow"

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -q -m "not slow" -o filterwarnings=default $(addprefix tests/,checkpoints vectors merge compose search)

.venv-oldest/installed: pyproject.toml tests/oldest.py
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	$(PYTHON) tests/oldest.py > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --quiet -r .venv-oldest/requirements.txt "pytest>=8" "pytest-timeout>=2.3" --editable .
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/vulture

docs: install
	$(BIN)/python -m sphinx -q -E -W --keep-going docs docs/_build/html

results: install
	$(BIN)/python -m benchmarks tables
	$(BIN)/python -m benchmarks check

paper-smoke: install
	$(BIN)/tva paper run $(PAPER) --scale smoke --output runs/paper-smoke --jobs 2 --devices cpu
	$(BIN)/tva paper table $(PAPER) --scale smoke --output runs/paper-smoke --check

install: .venv/installed

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf build docs/_build docs/reference/commands runs .mypy_cache .pytest_cache .ruff_cache
