# The verbs: install, demo, test, check, bench, docs. Each sets up what it needs; only Python 3.11 and make must be there.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: install demo test check bench bench-llm docs proto clean

install:
	@$(PYTHON) bootstrap.py

demo:  ## the iris recipe from a CSV to an endpoint; STAY=1 leaves it running
	@$(PYTHON) bootstrap.py demo
	@$(BIN)/modelworks demo $(if $(STAY),--stay)

test: check  ## the whole suite; what fails beside other tests is run once more, alone
	@$(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder $(ARGS) || { \
		echo "What failed runs once more, alone. What passes now failed because the machine was busy: mend that test too."; \
		$(BIN)/pytest --last-failed --last-failed-no-failures none --maxfail 20 $(ARGS); }

check: install  ## style, types and the layers
	@$(BIN)/ruff check modelworks tests bench bootstrap.py
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: install
	@$(BIN)/python -m bench.compare $(ARGS)

bench-llm: install  ## language models beside other servers and the engines alone; ARGS=--quick for a short run
	@$(BIN)/python -m bench.llm $(ARGS)

docs: install  ## the references that are generated from the code
	@$(BIN)/python -m modelworks.cli.reference

proto: install  ## descriptors.bin anew, after a change of a .proto file
	@$(BIN)/pip install -q grpcio-tools
	@$(BIN)/python -m modelworks.api.proto.generate

clean:
	rm -rf .venv .demo build dist *.egg-info
