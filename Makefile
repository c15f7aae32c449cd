# Every line here is a command to type; `make demo` is the place to start.

PYTHON = python3
WORKDIR = runs/scenes
ARGS =
SCORE_ARGS =
# A step of the demo is a sixth faster without one kind of fusion that XLA's CPU backend tries, and
# another eighth if glibc keeps the memory of a step for the next one instead of giving it back.
CPU = JAX_PLATFORMS=cpu XLA_FLAGS="--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT $$XLA_FLAGS" \
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000

.PHONY: setup demo test parity tpu lint clean

setup: .venv/installed

.venv/installed: requirements.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "t2i_jax needs Python 3.11 or newer, $(PYTHON) is %d.%d: make setup PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --no-compile -r requirements.txt
	.venv/bin/python -m pip install --quiet -e . --no-deps
	touch $@

demo: setup  # e.g. make demo WORKDIR=runs/short ARGS=--config.train.steps=200
	$(CPU) .venv/bin/python launch/train.py --config=configs/scenes.py --workdir=$(WORKDIR) $(ARGS)
	$(CPU) .venv/bin/python launch/sample.py --checkpoint=$(WORKDIR) --num_images=3 --out=$(WORKDIR)/samples.png
	$(CPU) .venv/bin/python launch/evaluate.py --benchmark=scenes --checkpoint=$(WORKDIR) --out=$(WORKDIR)/report.json $(SCORE_ARGS)
	@echo "The outputs: $(WORKDIR)/samples.png, loss.png, metrics.jsonl, report.json and report.html"

test: setup
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations=60

parity: .venv/parity  # against published implementations in torch, which nothing else needs
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q -n 2 tests/parity

.venv/parity: .venv/installed requirements-parity.txt
	.venv/bin/python -m pip install --quiet --no-compile -r requirements-parity.txt -c requirements.txt
	.venv/bin/python -m pip install --quiet --no-compile --no-deps torch-fidelity==0.4.0
	touch $@

tpu: .venv/tpu  # what the TPU's compiler makes of the flagship; no TPU is needed
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q tests/tpu

.venv/tpu: .venv/installed
	.venv/bin/python -m pip install --quiet --no-compile -e ".[tpu]" -c requirements.txt
	touch $@

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
