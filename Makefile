# make train   set everything up, then negotiate and learn (ARGS="--steps 20" and the like are passed on)
# make test    set everything up, then run the tests (ARGS="-k attention" and the like are passed on)
# make check   linter, formatter and type checker
# make test-sglang   the tests against real SGLang servers, in an environment of their own (make sglang)
# make env, make model, make clean

PYTHON ?= python3
MODEL := models/SmolLM2-135M-Instruct

# Waiting OpenMP threads sleep instead of spinning; on the CPU that makes torch several times faster.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# torch for CPUs comes without Triton; the tests interpret its kernels and compile them for a GPU that is not there.
TRITON := triton==3.6.0

DEPENDENCIES := .venv/dependencies.stamp
PACKAGE := .venv/package.stamp
SGLANG := .venv-sglang/environment.stamp

.PHONY: train test test-sglang check env model sglang clean

train: env model
	.venv/bin/python -m negotiator.train --config configs/quickstart.yaml $(ARGS)

test: env model
	.venv/bin/python -m pytest -m "not sglang" -n auto --dist worksteal $(ARGS)

test-sglang: env model sglang
	.venv/bin/python -m pytest -m sglang $(ARGS)

check: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

env: $(PACKAGE)

model: $(MODEL)/model.safetensors

sglang: $(SGLANG)

# A recipe's first line, for both environments.
IS_PYTHON = @command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "$(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=/path/to/python3.11" >&2; exit 2; }

$(DEPENDENCIES): requirements.txt
	$(IS_PYTHON)
	$(PYTHON) -m venv .venv
	@echo "installing the dependencies; the first time takes some minutes"
	.venv/bin/python -m pip install --quiet "$$(grep '^torch==' requirements.txt)"
	@.venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)' || \
		.venv/bin/python -m pip install --quiet --no-deps $(TRITON)
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	@touch $@

# The package is installed in place: only its native code and its metadata ever need this again.
$(PACKAGE): $(DEPENDENCIES) pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	.venv/bin/python -m pip install --quiet --no-build-isolation --editable '.[dev,model]'
	@touch $@

$(SGLANG): requirements-sglang.txt scripts/sglang_env.sh scripts/sglang_cpu.py
	$(IS_PYTHON)
	@scripts/sglang_env.sh $(PYTHON)
	@touch $@

# Renamed into place when it is complete, so that it is there means that it is whole.
$(MODEL)/model.safetensors: | $(PACKAGE)
	.venv/bin/python -m negotiator.fetch_model --to $(MODEL)

clean:
	rm -rf .venv .venv-sglang build models .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
