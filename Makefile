# The same commands in CI, in CONTRIBUTING.md and here.
VENV ?= .venv
PY := $(VENV)/bin/python
# By their first lines, wherever they lie; what was installed or built here is others'.
SCRIPTS = $(shell grep -rIlE '^\#!.*[ /](ba|da)?sh( |$$)' . --exclude-dir=.git --exclude-dir=.venv --exclude-dir=.tools --exclude-dir=build \
	| xargs awk 'FNR == 1 && /^\#!/ { print FILENAME }')

.PHONY: check test soak boot fuzz demo bench format protos

check:
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(PY) -m mypy -p floe
	$(VENV)/bin/lint-imports
	$(VENV)/bin/shellcheck $(SCRIPTS)

format:
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

test:
	install/test.sh

# Thirty minutes of random work, kills and faults; SOAK="--seconds 300 --seed 1" for other than that.
soak:
	PYTHONPATH=tests $(PY) -m soak $(SOAK)

# bootstrap-node.sh on a machine that boots; BOOT="-k interrupted" for less.
boot:
	install/setup.sh boot
	$(PY) -m pytest -m slow tests/boot $(BOOT)

# Ten minutes of processor time for every parser; FUZZ="tree --seconds 60 --keep" for other than that.
fuzz:
	PYTHONPATH=tests $(PY) tests/fuzz/runner.py $(FUZZ)

demo:
	install/demo.sh

# BENCH=--local for what needs no server.
bench:
	install/bench.sh $(BENCH)

protos:
	$(PY) protos/generate.py
