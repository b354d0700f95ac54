# Two commands do everything on a fresh machine: `make demo` and `make test`. Both create .venv where it is missing.
.DELETE_ON_ERROR:
.PHONY: demo test test-slow perf gpu env help clean
VENV ?= .venv
TEST_WORKERS ?= 2
DEMO ?= runs/demo
export VENV

help:            ## list the targets
	@grep -hE '^[a-z-]+: .*##|^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | sort

env:             ## create or update the virtual environment (CPU or CUDA build of PyTorch, whichever fits this machine)
	@bash scripts/make_env.sh demo

demo: env        ## the main job on the embedded cohort; ends in runs/demo/report.html
	@$(VENV)/bin/engine demo $(DEMO)

test:            ## lint, types and tests
	@bash scripts/make_env.sh demo,test
	@bash scripts/test_tools.sh
	@bash scripts/federated_env.sh || echo "[federated] no Flower: the tests of its example are skipped" >&2
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile

test-slow:       ## the expensive checks as well
	@bash scripts/make_env.sh demo,test
	@bash scripts/test_tools.sh
	$(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m 'slow or not slow'

perf:            ## benchmarks on the CPU beside their peers, at most 15 minutes; a record under perf/history, runs/perf/report.html
	@begin=$$(date +%s) && bash scripts/make_env.sh demo,perf && bash scripts/perf_peers.sh && \
	$(VENV)/bin/python -m perf run --peers --budget-seconds $$((840 - $$(date +%s) + begin)) && \
	$(VENV)/bin/python -m perf report

gpu:             ## tests and benchmarks on a GPU machine with only torch, numpy, numba and triton; no environment is made
	@$${PYTHON:-python3} -m perf.gpu

clean:           ## remove the environment and the runs
	rm -rf $(VENV) runs
