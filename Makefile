# The same commands in CI, in CONTRIBUTING.md and here.
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: check test demo bench format protos

check:
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(PY) -m mypy -p floe
	$(VENV)/bin/lint-imports

format:
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

test:
	install/test.sh

demo:
	install/demo.sh

bench:
	$(PY) -m bench

protos:
	$(PY) protos/generate.py
