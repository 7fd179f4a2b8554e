# Two commands for a fresh machine: `make demo` (all five steps on rendered leaves) and `make test` (lint and all tests).
# Both run on the CPU, also where there are GPUs. `make quick` is for the one who edits: lint and the tests of the recipe.
# `make gpu-check` tells whether all is well on a GPU, and how long a reproduction will take.
# `make test-oldest` runs all tests with the oldest packages that requirements.txt allows, in an environment of its own.
PYTHON ?= python3
RECIPE = tests/test_augmentation.py tests/test_data.py tests/test_fidelity.py tests/test_prediction.py tests/test_training.py

demo quick test test-oldest: export CUDA_VISIBLE_DEVICES =

.PHONY: demo gpu-check lint quick test test-oldest

demo: .venv/installed
	.venv/bin/python -m tools.demo

test: lint
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || echo "No browser here: the tests of \
	error_analysis.html in one will be skipped. On Debian: apt-get install chromium chromium-driver"
	.venv/bin/python -m pytest -n 3 --dist load --maxschedchunk 1 --durations=15

quick: lint
	.venv/bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(RECIPE)

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

gpu-check: .venv/installed
	.venv/bin/python -m tools.gpu_check

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n 3 --dist load --maxschedchunk 1 --durations=15

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/python -m pip install --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

.venv-oldest/installed: requirements.txt requirements-dev.txt constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -r requirements-dev.txt -c constraints-oldest.txt
	touch $@
