# What a developer does with this checkout. `make setup` is part of all of it and does nothing the second time.

VENV ?= .venv
# Not called PYTHON, which scripts/setup.sh reads from the environment.
py := $(VENV)/bin/python
# Arguments for pytest, for example: make test PYTEST_ARGS='-k uart -x'
PYTEST_ARGS ?=
# Each test has files, sockets and ports of its own, so several run at once. By hand (pytest tests/…) they run one by one.
parallel := -n auto --maxprocesses 8 --dist worksteal

# Where bytecode may not be kept, each of the thousand processes that the tests start compiles this package anew.
unexport PYTHONDONTWRITEBYTECODE

COMPILED := build/compiled
C_SOURCES := vmm/kvm/build_ffi.py $(filter-out vmm/kvm/_%,$(wildcard vmm/kvm/*.[ch])) \
	vmm/guests/build.py $(wildcard vmm/guests/*.[ch] vmm/guests/*.ld)

# The tests here come first, since those in the box take longer to say that something is wrong.
.NOTPARALLEL:
.PHONY: help setup compile demo test test-host test-box bench lint lint-style lint-types lint-shell docs clean

help:
	@echo 'make demo    start a small guest, replace the process under it, and show that it went on'
	@echo 'make test    all tests: here, then those with stock Linux guests (in the box if need be)'
	@echo 'make bench   every figure of the README, side by side with QEMU'
	@echo 'make lint    ruff, mypy --strict, shellcheck'
	@echo 'make docs    generate the tables of the documentation from the sources'
	@echo 'make clean   remove what was built, the virtual environment included'

setup:
	@VENV='$(VENV)' scripts/setup.sh

compile: setup
	@$(MAKE) --no-print-directory $(COMPILED)

$(COMPILED): $(C_SOURCES) $(VENV)/installed
	$(py) vmm/kvm/build_ffi.py
	$(py) vmm/guests/build.py
	@mkdir -p $(@D) && touch $@

demo: compile
	$(VENV)/bin/trio-vmm demo

test: test-host test-box

test-host: compile
	VMM_REQUIRE_KVM=1 $(py) -m pytest $(parallel) $(PYTEST_ARGS)

# One box for all of them. Ends at once on a machine whose own KVM boots stock Linux: test-host ran them there.
test-box: compile
	$(py) -m tests.kvmbox

bench: compile
	$(py) -m bench

lint: lint-style lint-types lint-shell

lint-style: compile
	$(py) -m ruff check .
	$(py) -m ruff format --check .

lint-types: compile
	$(py) -m mypy

lint-shell: compile
	shellcheck scripts/*.sh .ci/run

docs: compile
	$(py) scripts/generate_docs.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .venv
	rm -f vmm/kvm/_*.c vmm/kvm/_*.o vmm/kvm/_*.so vmm/guests/*.elf
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
