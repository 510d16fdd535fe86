PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

# Slim a ResNet-20 on scikit-learn's digits: the main job, under five minutes on two cores.
demo: .venv/ready
	$(BIN)/rmprune slim --sparsity 1e-2 --threshold 5e-3 --batch-size 64 --epochs 30 \
		--finetune-epochs 20 --out runs/demo --resume

test: .venv/ready
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "rmprune needs Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
