# Every target needs Python >= 3.11 and builds a virtual environment: .venv, and .venv-NAME for `make ... PYTHON=NAME`.
PYTHON ?= python3
VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
TINY := runs/tiny

.PHONY: demo test test-quick test-slow lint tiny plan-all clean

demo: $(VENV)/.run
	JAX_PLATFORMS=cpu $(BIN)/qwen3-jax demo

# Every test but the slow ones, parity with PyTorch included.
test: $(VENV)/.parity
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Tests marked quick, at most 3 minutes with warm caches. Needs no PyTorch.
test-quick: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m quick

# Tests marked slow: recipes compiled for their slices; RL over four processes; and 10,000 inputs to all that reads from outside. By hand.
test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow
	QWEN3_JAX_EXAMPLES=850 $(BIN)/python -m pytest tests/cli/test_outside_data.py

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Trains the model that ships, from nothing, and exports it into the package.
tiny: $(VENV)/.run
	$(BIN)/qwen3-jax tiny-data $(TINY)/data
	JAX_PLATFORMS=cpu $(BIN)/python train.py configs/tiny/pretrain.yaml
	rm -rf $(TINY)/model
	$(BIN)/qwen3-jax convert $(TINY)/pretrain $(TINY)/model
	$(BIN)/qwen3-jax demo --model $(TINY)/model --plot $(TINY)/budget.png

# Compiles every recipe for its slice, hours on two cores; pages in runs/plan, what was compiled before is not again.
plan-all: $(VENV)/.test
	mkdir -p runs/plan
	for recipe in configs/pretrain/qwen3-*.yaml; do for stage in s1 s3; do \
	  $(BIN)/qwen3-jax plan --config $$recipe --stage $$stage > runs/plan/$$(basename $$recipe .yaml)-$$stage.txt \
	    || exit 1; done; done
	for mesh in configs/infer/*.yaml; do size=$$(basename $$mesh .yaml); \
	  $(BIN)/qwen3-jax plan --infer --model $$size --mesh $$mesh > runs/plan/$$size-infer.txt || exit 1; done
	cat runs/plan/*.txt

clean:
	rm -rf $(VENV) runs

$(VENV)/bin/pip:
	@$(PYTHON) -c '' || { echo "error: PYTHON: $(PYTHON) did not run; use the name or path of a Python that does"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: PYTHON: $(PYTHON) is too old; use 3.11 or newer"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make virtual environments; install its venv package (Debian: python3-venv)"; exit 2; }

$(VENV)/.run: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

$(VENV)/.parity: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,parity]'
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[lint]'
	@touch $@
