# make quickstart   install into .venv, then run the whole chain on real text, on a CPU
# make test         the tests;  make test-all adds the slow ones
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all

quickstart: .venv/installed
	$(BIN)/alma run recipes/quickstart.yaml

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

test-all: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --hypothesis-profile=random

# torch first: with it in place no other package pulls a build of its own choice.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

