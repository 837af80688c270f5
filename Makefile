# Each target makes the environment it needs: .venv in this checkout, pinned by constraints.txt.
# Needed on the machine: Python 3.11 or newer, and make.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
DOCS_VENV := .venv-docs
TOOLS_VENV := .venv-tools
AXOLOTL_VENV := .venv-axolotl
LIBAIO := .libaio
PIP_VERSION := 26.3

# On few cores two OpenMP processes that spin while they wait slow each other down by 20 to 100 times.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0
export TOKENIZERS_PARALLELISM := false
# One thread a test process: their models are so small that a second thread only costs.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

# Tests side by side. A file's tests stay in one process, which makes their models once.
WORKERS ?= 2

# A dot every 20 seconds while the command that follows runs, also if it is interrupted
DOTS = shell=$$$$; (while sleep 20 >/dev/null 2>&1 && kill -0 $$shell 2>/dev/null; do printf .; done) & \
	trap "kill $$! 2>/dev/null" EXIT; trap "exit 130" INT TERM;

ARGS ?=
SECONDS ?= 600

.PHONY: docs docs-version help install demo test test-all test-zero libaio test-vllm test-peers test-versions test-axolotl fuzz lint format \
	types bench gpu wheel-test release-check release clean

help: ## Show this list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP) ## Make .venv with everything that the targets below need.

# Runs again only when the dependencies change.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	@echo "Installing into $(VENV): the first time that takes minutes and 2 GB or more; a dot is 20 seconds ..."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install -qq --disable-pip-version-check "pip==$(PIP_VERSION)"
	@$(DOTS) $(PY) -m pip install -qq --constraint constraints.txt --build-constraint constraints.txt --editable ".[all,sign,dev]"
	@echo; touch $@

demo: $(STAMP) ## Distil a real model both ways and verify its lineage. Options: make demo ARGS="--fresh"
	@$(VENV)/bin/kd-plugin demo $(ARGS)

test: $(STAMP) ## Run the tests. Some of them: make test ARGS="tests/core -k cache"
	@$(TEST_ENV) $(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not wheel and not zero and not vllm" $(ARGS)

test-all: $(STAMP) ## Run the tests, and those that need the real SmolLM2 weights.
	@OMP_NUM_THREADS=2 $(PY) -m pytest -m "not wheel and not vllm" $(ARGS)

# DeepSpeed compiles what offloads to NVMe against libaio: the machine's, or else one that is unpacked here. All
# processes must find one ninja: two of different versions would each compile all again.
test-zero: $(STAMP) ## Run the tests of several ranks under DeepSpeed, on CPU; takes half an hour.
	@echo 'int main(){}' | cc -x c - -laio -o /dev/null 2>/dev/null || $(MAKE) --no-print-directory libaio || \
		echo "libaio is not installed and cannot be unpacked here: the test of NVMe offloading skips itself."
	@PATH="$(abspath $(VENV))/bin:$$PATH" CPATH="$(abspath $(LIBAIO))/include$${CPATH:+:$$CPATH}" \
		LIBRARY_PATH="$(abspath $(LIBAIO))/lib$${LIBRARY_PATH:+:$$LIBRARY_PATH}" \
		LD_LIBRARY_PATH="$(abspath $(LIBAIO))/lib$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH}" \
		$(TEST_ENV) $(PY) -m pytest -m zero $(ARGS)

libaio: $(LIBAIO)/lib/libaio.so ## Unpack libaio into .libaio, for offloading to NVMe; needs apt, and no root.

$(LIBAIO)/lib/libaio.so:
	@bash integrations/deepspeed/unpack_libaio.sh $(LIBAIO)

docs: $(DOCS_VENV)/.installed ## Build the documentation as a site in site/, offline; a broken link fails.
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build $(ARGS)
	@echo "site/index.html"

# Each version is a directory of the branch gh-pages, and a list on every page leads from one to another; nothing is pushed.
docs-version: $(DOCS_VENV)/.installed ## Add the documentation of a release to the branch gh-pages: make docs-version VERSION=0.2.0
	@test -n "$(VERSION)" || { echo "Name the version: make docs-version VERSION=0.2.0"; exit 1; }
	@PATH="$(abspath $(DOCS_VENV))/bin:$$PATH" DOCS_VERSIONS=mike NO_MKDOCS_2_WARNING=1 \
		sh -c 'mike deploy --update-aliases $(ARGS) $(VERSION) latest && mike set-default latest'
	@echo "The branch gh-pages has it; $(DOCS_VENV)/bin/mike serve shows it, and git push origin gh-pages publishes it."

$(DOCS_VENV)/.installed: pyproject.toml
	@test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip install -qq --disable-pip-version-check "mkdocs-material>=9.7,<10" "mkdocstrings[python]>=1.0,<2" "mike>=2.1,<3"
	@touch $@

lint: $(STAMP) ## Check style and types, as CI does.
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

format: $(STAMP) ## Put the code into the project's format.
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(STAMP) ## Run a benchmark: make bench NAME=panel_loss ARGS="--help"; without NAME it lists them.
ifdef NAME
	@$(PY) -m tests.benchmarks.$(NAME) $(ARGS)
else
	@grep -l __main__ tests/benchmarks/*.py | xargs -n 1 basename -s .py
endif

# On a machine with a card the environment is often there already; GPU_PYTHON names its Python, .venv is taken if made.
GPU_PYTHON ?= $(if $(wildcard $(PY)),$(PY),$(PYTHON))

gpu: ## Check and measure on one GPU, under eight minutes; writes gpu-results.md. Needs torch, transformers and trl alone.
	@PYTHONPATH="$(CURDIR)" HF_HUB_OFFLINE=1 $(GPU_PYTHON) -m tests.gpu $(ARGS)

# vLLM pins another transformers, so it lives apart. KD_VLLM_PYTHON names one that is there; KD_VLLM_MODELS is where
# the demo's model is kept.
test-vllm: $(STAMP) ## Compare with a real vLLM server. Makes .venv-vllm (3.4 GB) unless KD_VLLM_PYTHON is set.
	@test -n "$$KD_VLLM_PYTHON" || test -x $(VLLM_VENV)/.installed || { echo "Installing vLLM into $(VLLM_VENV) (takes minutes) ..."; \
		$(PY) -m tests.vllm.make_environment $(VLLM_VENV) && install -m 755 /dev/null $(VLLM_VENV)/.installed; }
	@KD_VLLM_PYTHON=$${KD_VLLM_PYTHON:-$(abspath $(VLLM_VENV)/bin/python)} KD_VLLM_MODELS=$${KD_VLLM_MODELS:-$(VLLM_VENV)/models} \
		OMP_NUM_THREADS=1 $(PY) -m pytest tests/vllm -m vllm -v -rP $(ARGS)

# TRL is a checkout, a bare git directory or an archive of its repository; it is read, and nothing of it stays here.
test-peers: $(STAMP) ## Run TRL's own trainer tests on TRL's classes and on ours: make test-peers TRL=PATH; takes half an hour.
	@test -n "$(TRL)" || { echo "Name a checkout or archive of TRL's repository: make test-peers TRL=path/to/trl"; exit 1; }
	@$(TEST_ENV) $(PY) -m tests.peers.run "$(abspath $(TRL))" $(ARGS)

# Each environment takes 2 to 6 GB, of which torch is most. The tests of several ranks take minutes each.
test-versions: $(TOOLS_VENV)/.installed ## Run a part of the tests at both ends of the supported versions. One: ARGS="oldest"
	@$(TEST_ENV) $(TOOLS_VENV)/bin/python -m tests.versions.run $(ARGS)

test-axolotl: $(AXOLOTL_VENV)/.installed ## Run Axolotl with the plugin, on CPU; makes .venv-axolotl (4 GB).
	@$(TEST_ENV) AXOLOTL_DO_NOT_TRACK=1 $(AXOLOTL_VENV)/bin/python -m pytest tests/axolotl $(ARGS)

$(AXOLOTL_VENV)/.installed: $(TOOLS_VENV)/.installed
	@test -x $(AXOLOTL_VENV)/bin/python || $(TOOLS_VENV)/bin/uv venv -q --python $(PYTHON) $(AXOLOTL_VENV)
	@UV_FIND_LINKS=$$PIP_FIND_LINKS $(TOOLS_VENV)/bin/uv pip install -q --python $(AXOLOTL_VENV)/bin/python "axolotl==0.19.0" \
		--editable . pytest pytest-timeout
	@touch $@

# Every target in turn until the time is over. What it finds stays in .hypothesis/lineage_fuzz and comes first next time.
fuzz: $(STAMP) ## Fuzz what lineage reads from strangers: make fuzz SECONDS=600
	@$(TEST_ENV) $(PY) -m tests.lineage_fuzz $(SECONDS)

wheel-test: $(STAMP) ## Build the wheel, install it alone with [trl], and run the demo's first minute from it.
	@$(PY) -m pytest tests/hosts/test_demo_wheel.py -m wheel -v $(ARGS)

release-check: $(TOOLS_VENV)/.installed ## Build a release and check it: reproducible, each extra, metadata, licences, SBOM; into dist/.
	@$(TOOLS_VENV)/bin/python -m tests.release.check $(if $(VERSION),--version $(VERSION)) $(ARGS)

release: $(TOOLS_VENV)/.installed ## Cut a release in CHANGELOG.md and the package: make release VERSION=0.2.0
	@$(TOOLS_VENV)/bin/python -m tests.release.changelog $(VERSION)

$(TOOLS_VENV)/.installed: Makefile
	@test -x $(TOOLS_VENV)/bin/python || $(PYTHON) -m venv $(TOOLS_VENV)
	@$(TOOLS_VENV)/bin/python -m pip install -qq --disable-pip-version-check "uv>=0.9" "twine>=6.2" "cyclonedx-bom>=7.2" "check-jsonschema>=0.35"
	@touch $@

clean: ## Remove what these targets made, .venv included.
	rm -rf $(VENV) $(VLLM_VENV) $(DOCS_VENV) $(TOOLS_VENV) $(AXOLOTL_VENV) .venv-versions $(LIBAIO) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .cache
