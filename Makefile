PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
# Two processes; all tests of a file run in one of them. Every test has its own folders and ports.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-long test test-quick test-slow bench lint clean

# DAMSM and AttnGAN on the embedded data, then its scores: about 16 minutes on two cores, with the installation.
demo: $(INSTALLED)
	$(BIN)/python -m t2idist.run attngan storage=runs
	$(BIN)/python tools/score_demo.py runs/attngan-demo --judge runs/attngan-demo/judge/export

demo-long: $(INSTALLED)
	$(BIN)/python -m t2idist.run attngan preset=demo-long storage=runs

test: $(INSTALLED)
	$(PYTEST) -m "not slow"

test-quick: $(INSTALLED)
	$(PYTEST) -m "not slow and not whole"

test-slow: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --editable '.[test,text]'
	$(BIN)/python -m pytest -q -m slow

# A short comparison with the released training code on a CPU; fails if a ratio is below its floor.
bench: $(INSTALLED)
	$(BIN)/python tools/bench/bench_step.py attngan --preset cub --group-size 4 --steps 2 --floor 2
	$(BIN)/python tools/bench/bench_step.py stackgan_pp --preset cub --group-size 4 --steps 2 --floor 2
	$(BIN)/python tools/bench/bench_step.py damsm --preset cub --steps 2 --floor 3
	$(BIN)/python tools/bench/bench_step.py stargan --preset celeba128 --group-size 4 --steps 2 --floor 2.5
	$(BIN)/python tools/bench/bench_sample.py attngan --preset cub --steps 2 --floor 2.5

lint: $(INSTALLED)
	$(BIN)/ruff check t2idist tests tools
	$(BIN)/ruff format --check t2idist tests tools
	$(BIN)/mypy

$(INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give it as make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps torch-fidelity==0.4.0  # its torchvision does not import beside a CPU torch
	$(BIN)/python -m pip install --quiet --no-deps mlflow==3.17.2  # the server, for tests; it pins an older pyarrow
	test -n "$$(command -v chromium || command -v google-chrome)" -o "$$(id -u)" != 0 -o -z "$$(command -v apt-get)" \
		|| (apt-get -qq update && apt-get -qq install -y chromium) >/dev/null 2>&1 || true  # for tests of the page
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
