# The same commands in CI, in CONTRIBUTING.md and here.
VENV ?= .venv
PY := $(VENV)/bin/python

.PHONY: check test soak demo bench format protos

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

# Ten minutes of random kills; SOAK="--seconds 60 --seed 1" for other than that.
soak:
	PYTHONPATH=tests $(PY) tests/soak/soak.py $(SOAK)

demo:
	install/demo.sh

# BENCH=--local for what needs no server.
bench:
	install/bench.sh $(BENCH)

protos:
	$(PY) protos/generate.py
