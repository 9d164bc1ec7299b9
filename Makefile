# Start with `make quickstart` or `make test`; every target creates .venv first.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
unexport PYTHONPATH PYTHONHOME
ifneq ($(wildcard wheels/*.whl),)  # made by `pip download -r requirements.txt -d wheels`: no index is asked
export PIP_NO_INDEX := 1
export PIP_FIND_LINKS := wheels
endif

.DEFAULT_GOAL := help
.PHONY: help pydocs quickstart check test test-all bench bench-gpu notebook notebooks lint format clean

help: ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

$(READY): requirements.txt pyproject.toml
	@echo "installing the pinned requirements into $(VENV) (a minute or two; elsewhere torch brings CUDA: some 3 GB)"
	@$(VENV)/bin/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "error: no virtual environment could be made; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# the documentation that comes with Python, numpy and torch, as shards with a tokenizer trained on it
pydocs: $(READY)
	python data/sources.py pydocs --part train --out data/cache/pydocs.jsonl
	python bpe/train_bpe.py --input data/cache/pydocs.jsonl --vocab-size 4096 --out data/cache/pydocs-4096
	python data/prepare.py pydocs --tokenizer data/cache/pydocs-4096.model --out data/corpora/pydocs --overwrite

# the CPU where torch cannot use the GPU, for example with a driver older than its CUDA
DEVICE = $(eval DEVICE := $(shell $(VENV)/bin/python -c 'from common import has_hidden_gpu as h; print("cpu" if h() else "auto")'))$(DEVICE)
quickstart: pydocs ## from raw text to a fine-tuned model, in five minutes on two cores
	python gpt2/train_gpt2.py quickstart --overwrite --device $(DEVICE)
	python gpt2/sample.py --model runs/quickstart --prompt "Return the" --temperature 0.8 --device $(DEVICE)
	python gpt2/export_hf.py --model runs/quickstart --out runs/quickstart/hf
	python lora/train_lora.py --base runs/quickstart/hf --task pydocs --run-dir runs/quickstart-lora --max-steps 60 --max-length 96 --lr 2e-3 --eval-rows 64 --metric-rows 0 --overwrite --device $(DEVICE)
	@echo
	@echo "done: the run and its loss curve are in runs/quickstart/, the adapter in runs/quickstart-lora/."
	@echo "GPT-2 (124M) on eight GPUs:"
	@echo "  python data/prepare.py fineweb-edu --tokenizer gpt2 --out data/corpora/fineweb-edu"
	@echo "  torchrun --standalone --nproc_per_node=8 gpt2/train_gpt2.py"

check: $(READY) ## the core of every package, in-process; under a minute
	python -m pytest -n auto --maxprocesses 4 --dist worksteal -q -m core

test: $(READY) ## all tests but the slow ones, without network; under ten minutes on two cores
	python -m pytest -n auto --maxprocesses 4 --dist worksteal

test-all: $(READY) ## the full matrix as well
	python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "slow or not slow"

bench: $(READY) ## speed against baselines on this CPU; some fifteen minutes, results in runs/
	python bench/bench_bpe.py --input report.md --vocab-size 1024 --rounds 3 --overwrite
	python bpe/train_bpe.py --input report.md --vocab-size 1024 --out data/cache/bench-1024
	python bench/bench_data.py --tokenizer data/cache/bench-1024.model --megabytes 10 --overwrite
	python bench/bench_gpt2.py ladder --device cpu --overwrite
	python bench/bench_gpt2.py peers --device cpu --size vocab-50304 --run-dir runs/bench_gpt2_peers_50304 --overwrite
	python bench/bench_gpt2.py peers --device cpu --size vocab-1024 --run-dir runs/bench_gpt2_peers_1024 --overwrite
	python bench/bench_lora.py --sizes small --overwrite

bench-gpu: pydocs ## GPT-2 124M on this GPU: ablation, baselines, resume, profile; ten minutes on an H100
	python bench/bench_gpt2.py ladder --device cuda --run-dir runs/gpu_ladder --overwrite
	python bench/bench_gpt2.py peers --device cuda --run-dir runs/gpu_peers --overwrite
	python bench/bench_gpt2.py resume --device cuda --run-dir runs/gpu_resume --overwrite
	python bench/bench_gpt2.py profile --device cuda --run-dir runs/gpu_profile --overwrite

notebook: $(READY) ## open notebooks/run.ipynb: your newest run, live
	jupyter lab --allow-root notebooks/run.ipynb  # containers run as root; elsewhere the flag does nothing

notebooks: $(READY) ## execute the report's notebooks on records/
	jupyter nbconvert --config notebooks/nbconvert.json --to notebook --execute --inplace notebooks/0*.ipynb

lint: $(READY) ## ruff: check and format
	ruff check .
	ruff format --check .

format: $(READY) ## let ruff fix what it can
	ruff check --fix .
	ruff format .

clean: ## remove the environment and caches; runs and corpora stay
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
