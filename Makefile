# make iterate   environment, task pack, seed policy, EntroPO rounds (conf/local.yaml); every part resumes
# make evaluate  verifier and best-of-N on held-out tasks, for the seed policy and the trained one
# make test      environment and the whole test suite (tests of Docker sandboxes where an engine can be had)
PYTHON ?= python3
CONF   ?= conf/local.yaml
WORDS  ?=
VENV   := .venv
PY     := $(VENV)/bin/python
# a GPU machine gets the official vLLM, any other the CPU build
KIND   ?= $(if $(shell command -v nvidia-smi 2>/dev/null),gpu,cpu)
STAMP  := $(VENV)/.installed-$(KIND)

.PHONY: iterate evaluate test lint env bubblewrap engine lock clean
iterate: env bubblewrap
	$(PY) jobs/pack.py $(CONF) $(WORDS)
	$(PY) jobs/sft.py $(CONF) $(WORDS)
	$(PY) jobs/iterate.py $(CONF) $(WORDS)

evaluate: env bubblewrap
	$(PY) jobs/verifier.py $(CONF) $(WORDS)
	$(PY) jobs/evaluate.py $(CONF) $(WORDS) evaluate.name=seed 'evaluate.model=$${run_dir}/seed/policy'
	$(PY) jobs/evaluate.py $(CONF) $(WORDS)

test: env bubblewrap engine
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: env
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

env: $(STAMP)
$(STAMP): requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; give another: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments; install it: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(KIND),gpu)
	$(PY) -m pip install -q -e '.[gpu,dev,k8s]'
else
# two at a time: unpacking keeps a core busy, and without dependencies the packages do not touch each other
	grep -v '^#' requirements/cpu.txt | sort -r | xargs -P 2 -n 36 $(PY) -m pip install -q --no-deps --no-compile
	$(PY) -m pip install -q --no-deps --no-build-isolation -e .
# pip would compile every file on one core, architectures and tests that no run imports among them
	@$(PY) -m compileall -q -j 0 -x '/(models|tests?)/' $(VENV)/lib >/dev/null 2>&1 || true
endif
	@touch $@

bubblewrap:
	@command -v bwrap >/dev/null || { if [ "$$(id -u)" = 0 ]; then apt-get update -qq && apt-get install -y -qq bubblewrap git >/dev/null; \
	  else echo "error: bubblewrap is missing; install it: sudo apt-get install bubblewrap" >&2; exit 2; fi; }

# for the tests of Docker sandboxes alone, which skip without it
engine:
	@{ command -v debootstrap && { command -v dockerd || [ -n "$$DOCKER_HOST" ] || [ -S /var/run/docker.sock ]; }; } >/dev/null || \
	  { [ "$$(id -u)" = 0 ] && timeout 120 apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	  timeout 300 apt-get install -y -qq --no-install-recommends --no-remove docker.io debootstrap; } >/dev/null 2>&1 </dev/null || \
	  echo "note: no Docker engine can be had here (as root on Debian: apt-get install docker.io debootstrap); its tests are skipped"

# the CPU lock again, from what pyproject.toml asks for; look at the difference before committing it
lock:
	$(PYTHON) requirements/lock.py

clean:
	rm -rf $(VENV) build *.egg-info
