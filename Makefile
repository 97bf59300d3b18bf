# make quickstart   install into .venv, then run the whole chain on real text, on a CPU
# make test         the tests;  make test-all adds the slow ones
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-all

quickstart: .venv/installed
	$(BIN)/alma run recipes/quickstart.yaml

test: .venv/installed
	$(BIN)/python -m pytest -q -m "not slow"

test-all: .venv/installed
	$(BIN)/python -m pytest -q

# torch first: with it in place no other package pulls a build of its own choice.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

