# Two commands for a fresh machine: `make demo` (all five steps on rendered leaves, CPU) and `make test` (lint and all tests).
PYTHON ?= python3

.PHONY: demo test

demo: .venv/installed
	.venv/bin/python -m tools.demo

test: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements-dev.txt
	touch $@
