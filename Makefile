# Everything a fresh machine with Python >= 3.11 and make needs: each target makes .venv first.
#   make bench    data, training, evaluation, table and pictures of single-view reconstruction
#   make test     lint, types, import contracts, tests
#   make lint | make docs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OPEN3D_LIBRARIES := libusb-1.0-0 libgl1 libegl1 libgomp1 libx11-6 libvulkan1 mesa-vulkan-drivers
# Threads wait asleep, not spinning: on a machine that others use, spinning takes the cores that work needs.
export OMP_WAIT_POLICY := PASSIVE
# glibc keeps what was freed: giving a step's tensors back to the system and getting them again takes a third of its time.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 4294967296

CONFIG ?= configs/single_view_quick.yaml
RUN ?= runs/single_view_quick

.PHONY: bench test lint docs setup system-libraries clean

bench: setup
	$(BIN)/python benchmarks/single_view.py --config $(CONFIG) --out $(RUN)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/mkdocs build --strict

setup: $(VENV)/.installed system-libraries

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vision3dgen needs Python >= 3.11, this is %d.%d: pass PYTHON=python3.11" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[viz,dev]"
	touch $@

# Open3D loads these when it is imported and when it draws without a display.
system-libraries:
	@missing=""; for so in libusb-1.0.so.0 libX11.so.6 libGL.so.1 libEGL.so.1 libgomp.so.1 libvulkan.so.1; do \
	  [ "$$(uname)" = Linux ] || continue; \
	  $(BIN)/python -c "import ctypes; ctypes.CDLL('$$so')" 2>/dev/null || missing="$$missing $$so"; done; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(OPEN3D_LIBRARIES) >/dev/null; \
	  else echo "Open3D needs$$missing; install them with: sudo apt-get install $(OPEN3D_LIBRARIES)  (pictures fall back to the built-in renderer)"; fi; fi

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
