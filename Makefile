# make quickstart   install into .venv, then run the whole chain on real text, on a CPU
# make test         style, then the tests;  make test-all adds the slow ones
# make test-cluster jobs on a real Slurm that is started on this machine: needs root, and installs Debian's packages
# make test-quick   tests that start no stage, in less than a minute
# make test-wheel   wheel and sdist, installed into fresh environments of PYTHONS, and a small chain in each
# make test-browser alma report and alma serve's page in headless Chromium, which must be there (Debian: apt-get install chromium)
# make docs         the documentation as a site in site/, which needs no network to be read
# make style        the checks of form that `make test` begins with;  make format fixes most of them
PYTHON ?= python3
BIN := .venv/bin
CODE := pipeline tests benchmarks
QUICK := $(patsubst %,tests/data/%.py,sources/test_byte_ranges sources/test_globs sources/test_json_files \
	sources/test_text_encoding cleaning/test_rules tokenizer/test_bpe_merges tokenizer/test_encode \
	tokens/test_row_sampler chat/test_messages) \
	$(patsubst %,tests/%.py,core/test_positions core/test_recipe models/test_cost models/test_experts models/test_mup \
	rl/test_rollout)

PYTHONS ?= python3.11 python3.12

.PHONY: quickstart style format test test-quick test-all test-wheel test-browser docs

quickstart: .venv/installed
	$(BIN)/alma run recipes/quickstart.yaml

style: .venv/installed
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

format: .venv/installed
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

test-quick: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile $(QUICK)

test: style
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile

test-all: style
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --hypothesis-profile=random

.PHONY: test-cluster
test-cluster: .venv/installed
	command -v slurmctld >/dev/null || { apt-get update -qq && apt-get install -qq -y --no-install-recommends \
	  slurmctld slurmd slurm-client munge; }
	ALMA_TEST_CLUSTER=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/cluster/test_real_slurm.py

test-wheel: .venv/installed
	for python in $(PYTHONS); do \
	  ALMA_WHEEL_PYTHON=$$python OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_package.py || exit; done

test-browser: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/report/test_browser.py tests/serve/test_chat_page.py

docs: .venv/installed
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_site.py

# torch first: with it in place no other package pulls a build of its own choice.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

