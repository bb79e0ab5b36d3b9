# make demo    see it work: real packets, two uplinks that fail, nothing touched outside namespaces of its own
# make bench   how fast it is on this machine, beside what else is installed; the same namespaces
# make test    all tests
# make check   format, lint, types, shell scripts, tests: what CI runs
# make soak    the long forms of the slow proofs
# make check-plain   the end-to-end tests with every offload switched off
# make picture what the terminal shows of a tunnel at work, as the README has it (needs tmux)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest

HOT_TESTS := $(addprefix tests/test_,$(addsuffix .py,\
	packet offload session burst messages path timers serverpeer clientpeer udp tun))
SHARING_TESTS := $(addprefix tests/test_,$(addsuffix .py,\
	bad_input checksums client_script gateway host_left_clean interop joining lab netlink notices paths scripts \
	super_packets tables tun))

.PHONY: demo bench test check check-plain lint format soak picture clean demo-tools test-tools

demo: demo-tools $(VENV)/.runs
	@$(BIN)/mptunnel demo

bench: demo-tools $(VENV)/.runs
	@$(BIN)/mptunnel bench

# The simulated ones see what is compiled, where it takes half the time; those that look into it, and those of the hot
# modules, see the sources as they are too. Those in namespaces run the program as it is installed. The simulated ones
# share the processors, and so do those in namespaces that ask what comes out; where it is about milliseconds a test has
# the machine to itself.
test: test-tools $(VENV)/.tests
	MPTUNNEL_COMPILED=1 $(PYTEST) -q -n auto -m "not netns and not slow and not interpreted"
	$(PYTEST) -q -n auto -m "interpreted and not netns and not slow"
	$(PYTEST) -q -n auto -m "not netns and not slow and not interpreted" $(HOT_TESTS)
	$(PYTEST) -q -n auto -m "netns and not slow" $(SHARING_TESTS)
	$(PYTEST) -q -m "netns and not slow" $(addprefix --ignore=,$(SHARING_TESTS))

check: test-tools $(VENV)/.tests lint test

lint: $(VENV)/.tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy scripts/compile.py
	shellcheck -s sh scripts/client.sh scripts/server.sh
	shellcheck .ci/run

format: $(VENV)/.tests
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

soak: test-tools $(VENV)/.tests
	$(PYTEST) -q -m slow --override-ini addopts="--strict-markers --strict-config -ra"

check-plain: test-tools $(VENV)/.tests
	MPTUNNEL_OFFLOAD=0 $(PYTEST) -q -m "netns and not slow"

picture: demo-tools $(VENV)/.tests
	@sh tests/tools.sh tmux:tmux
	@$(BIN)/python -m tests.screenshot

clean:
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# What the system must bring. Root gets it installed where there is apt-get; anybody else is told what to install.
demo-tools:
	@sh tests/tools.sh ip:iproute2 nft:nftables libIPSec_MB.so.1:libipsec-mb1

test-tools:
	@sh tests/tools.sh ip:iproute2 nft:nftables shellcheck:shellcheck wg:wireguard-tools wireguard-go:wireguard-go \
		tcpdump:tcpdump ping:iputils-ping openvpn:openvpn openssl:openssl libIPSec_MB.so.1:libipsec-mb1

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "no venv here: on Debian 'apt-get install python3-venv'" >&2; exit 1; }

# The hot modules are compiled by the installation, and again when a source has changed.
$(VENV)/.runs: $(VENV)/bin/python pyproject.toml scripts/compile.py $(wildcard mptunnel/*.py)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.tests: $(VENV)/bin/python pyproject.toml scripts/compile.py $(wildcard mptunnel/*.py)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.runs
