# `make run` tries the proxy, `make test` checks everything. Both need python3 (3.11 or later) with venv.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SOURCES = pyproject.toml setup.cfg
# Scans our TLS, in the long form of the hostile inputs.
SSLYZE = 6.3.1

# What these test passes on Twisted's own HTTP channel too; so does all the rest.
CLIENT_SIDE = $(addprefix tests/test_,$(addsuffix .py,site downstream exchange forward form cancellation \
  backpressure auth audio clients))

.DELETE_ON_ERROR:
.PHONY: run test lint check faults hostile openapi lock audit clean

run: $(VENV)/installed
	$(BIN)/python -m llmproxy --demo

test: lint check

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

check: $(VENV)/installed-dev mongod
	$(BIN)/python -m pytest
	LLMPROXY_HTTP=twisted $(BIN)/python -m pytest $(CLIENT_SIDE)

# The long form of the experiments on the ledger: an hour or more.
faults: $(VENV)/installed-dev mongod
	LLMPROXY_FAULTS=long $(BIN)/python -m pytest tests/faults

# The long form of the suites of hostile inputs. Counts what was tried and what passed.
hostile: $(VENV)/installed-dev $(VENV)/sslyze/$(SSLYZE)
	@command -v slowhttptest >/dev/null || { \
	  echo "make hostile: needs slowhttptest: apt-get install slowhttptest" >&2; exit 1; }
	LLMPROXY_HOSTILE=long $(BIN)/python -m pytest tests/hostile tests/threats

# docs/openapi.yaml as the JSON that the admin site serves.
openapi: $(VENV)/installed-dev
	$(BIN)/python -c 'import json, sys, yaml; json.dump(yaml.safe_load(sys.stdin), sys.stdout, indent=1)' \
	  < docs/openapi.yaml > llmproxy/openapi.json

# What the proxy costs, beside nginx and sglang-router: 25 minutes, or `make bench BENCH=--quick`.
# Needs Linux with two cores and gcc, and wants nginx-light. docs/performance.md tells more.
BENCH ?=
.PHONY: bench
bench: $(VENV)/installed
	$(BIN)/python bench/run.py $(BENCH)

.PHONY: mongod
mongod: $(VENV)/installed-dev
	@ldconfig -p | grep -q 'libcurl\.so\.4' || { \
	  echo "make test: the MongoDB server for tests needs libcurl4: apt-get install libcurl4" >&2; exit 1; }
	$(BIN)/python tests/mongod.py --fetch

# What the container installs, with hashes; for the Dockerfile's Python, whichever runs this. What is
# locked stays where it can: `make lock UPGRADE=--upgrade` takes the newest of all.
UPGRADE ?=
LOCK = deploy/requirements.lock
lock: $(VENV)/installed-lock
	$(BIN)/uv pip compile pyproject.toml $(UPGRADE) --quiet --generate-hashes --no-annotate \
	  --custom-compile-command 'make lock' --only-binary :all: --python-platform linux \
	  --python-version "$$(sed -n 's/^FROM python:\([0-9.]*\).* AS build$$/\1/p' Dockerfile)" -o $(LOCK)

# Known holes in what is locked. It asks PyPI for its advisories, so CI does not depend on it.
audit: $(VENV)/installed-lock
	@$(BIN)/pip-audit --strict --disable-pip --require-hashes -r $(LOCK) || { \
	  echo "make audit: not clean. Either holes are listed above, or PyPI's advisories could not be" \
	    "had from here ('could not be audited', or an error): then nothing is known." >&2; exit 1; }

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "llmproxy needs Python 3.11 or later: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

# Building a wheel without isolation, as the tests do, needs a later setuptools than some venvs have.
$(VENV)/installed-dev: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-lock: $(VENV)/bin/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[lock]'
	touch $@

# A venv in the venv, since sslyze needs an older cryptography than we do.
$(VENV)/sslyze/$(SSLYZE): $(VENV)/bin/python
	$(BIN)/python -m venv $(VENV)/sslyze
	$(VENV)/sslyze/bin/python -m pip install --quiet --disable-pip-version-check sslyze==$(SSLYZE)
	touch $@

clean:
	rm -rf $(VENV) bench/.venv bench/build bench/results build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
