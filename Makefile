# make test    the whole suite              make demo    server, hosts and guest together
# make check   the linters                  make lab     hole punching through real NATs (root, Linux)
# make bench   beside the frameworks        make memory  what games and guests weigh
# make store-bench    what a store costs beside the registry in memory
# make faults  what the server survives     make soak    ten minutes of everything at once
# make store-test     servers that share a store, with real Redis and HAProxy (Debian's packages)
# make pictures       docs/*.svg, of the figures that make bench and the laboratory have left
# make docs-test      README and docs/ against the programs; the OpenAPI document against the live server, by schemathesis (root, Linux)
# make deploy-test    what is in deploy/, with real nginx, Caddy, HAProxy and coturn (root, Linux, Debian's packages)
# make examples-test  what is in examples/, in real browsers and other languages (root, Debian's packages)
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
LINTERS = $(VENV)/.linters
LAB = $(VENV)-lab/.ready
DEPLOY = $(VENV)-deploy/.ready
STORE = $(VENV)-store/.ready
DOCS = $(VENV)-docs/.ready
PICTURES = $(VENV)-pictures/.ready
EXAMPLES = $(VENV)-examples/.ready
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: test demo check lab bench memory faults soak pictures store-test store-bench deploy-test docs-test examples-test clean
.PHONY: deploy-packages store-packages examples-packages

test: $(READY)
	$(BIN)/python -m pytest

$(READY): requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

# The server picks a free port and prints it, so that the demo runs beside whatever else does.
demo: $(READY)
	@said=$$(mktemp); offers=$$(mktemp); $(BIN)/python p2pserver.py --port 0 --log-level warning > $$said & server=$$!; \
	trap 'kill $$hosts $$server 2>/dev/null; wait; rm -f $$said $$offers' EXIT; trap 'exit 130' INT TERM; \
	until grep -q listens $$said; do sleep 0.1; kill -0 $$server || exit 1; done; cat $$said; \
	url=$$(grep -o 'http://localhost:[0-9]*' $$said); \
	$(BIN)/python simulate_hosts.py --server $$url > $$offers & hosts=$$!; \
	until grep -q 'on offer' $$offers; do sleep 0.1; kill -0 $$hosts || exit 1; done; cat $$offers; \
	$(BIN)/python simulate_guest.py --server $$url --all

check: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/mypy p2pserver.py redis_registry.py p2pclient

$(LINTERS): $(READY)
	$(BIN)/python -m pip install --quiet ruff==0.17.6 mypy==2.4.1 types-requests==2.33.0.20261030
	touch $@

lab: $(LAB)
	$(VENV)-lab/bin/python lab/natlab.py check
	$(VENV)-lab/bin/python -m pytest lab

$(LAB): requirements.txt lab/requirements.txt
	$(PYTHON) -m venv $(VENV)-lab
	$(VENV)-lab/bin/python -m pip install --quiet -r lab/requirements.txt
	touch $@

deploy-test: deploy-packages $(DEPLOY)
	$(VENV)-deploy/bin/python -m pytest deploy

# nginx and systemd-analyze may be where only root looks. What is missing is installed, which takes root.
deploy-packages:
	@missing=; for program in nginx caddy haproxy turnserver curl openssl systemd-analyze; do PATH=$$PATH:/usr/sbin:/sbin command -v $$program >/dev/null || missing=yes; done; \
	test -z "$$missing" || { apt-get update -qq && apt-get install -y -qq --no-install-recommends nginx-light caddy haproxy coturn curl openssl systemd; }

$(DEPLOY): requirements.txt deploy/requirements.txt
	$(PYTHON) -m venv $(VENV)-deploy
	$(VENV)-deploy/bin/python -m pip install --quiet -r deploy/requirements.txt
	touch $@

store-test: store-packages $(STORE)
	$(VENV)-store/bin/python -m pytest test_p2pserver.py -k "redis or store"
	$(VENV)-store/bin/python -m pytest faults/test_store.py deploy/test_cluster.py

store-packages:
	@missing=; for program in redis-server redis-cli haproxy; do PATH=$$PATH:/usr/sbin:/sbin command -v $$program >/dev/null || missing=yes; done; \
	test -z "$$missing" || { apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server redis-tools haproxy; }

$(STORE): requirements.txt requirements-store.txt
	$(PYTHON) -m venv $(VENV)-store
	$(VENV)-store/bin/python -m pip install --quiet -r requirements-store.txt
	touch $@

store-bench: $(STORE)
	$(VENV)-store/bin/python bench/store.py

docs-test: $(DOCS)
	$(VENV)-docs/bin/python -m pytest docs

$(DOCS): requirements.txt docs/requirements.txt
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet -r docs/requirements.txt
	touch $@

LANGUAGES = nodejs lua5.1 lua-socket lua-cjson lua-bitop mono-mcs mono-runtime libmono-system-net-http4.0-cil libmono-system-runtime-serialization4.0-cil
examples-test: examples-packages $(EXAMPLES)
	$(VENV)-examples/bin/python -m pytest examples

# The browsers are Debian's: those that Playwright would fetch are not needed. Without Firefox, or coturn, their tests are skipped.
examples-packages:
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	@command -v firefox-esr >/dev/null || apt-get install -y -qq --no-install-recommends firefox-esr || true
	@command -v turnserver >/dev/null || apt-get install -y -qq --no-install-recommends coturn || true
	@missing=; for program in node lua5.1 mcs mono; do command -v $$program >/dev/null || missing=yes; done; \
	test -z "$$missing" || { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(LANGUAGES); }

$(EXAMPLES): requirements.txt examples/requirements.txt
	$(PYTHON) -m venv $(VENV)-examples
	$(VENV)-examples/bin/python -m pip install --quiet -r examples/requirements.txt
	touch $@

bench:
	$(PYTHON) bench/run.py
	$(MAKE) pictures

pictures: $(PICTURES)
	$(VENV)-pictures/bin/python docs/pictures.py

$(PICTURES): docs/pictures.txt
	$(PYTHON) -m venv $(VENV)-pictures
	$(VENV)-pictures/bin/python -m pip install --quiet -r docs/pictures.txt
	touch $@

memory: $(READY)
	$(BIN)/python bench/memory.py

FAULTS = faults
faults: $(READY)
	$(BIN)/python -m pytest $(FAULTS)

soak: $(READY)
	$(BIN)/python faults/soak.py --minutes 10

clean:
	rm -rf $(VENV) .venv-* .pytest_cache .mypy_cache .ruff_cache __pycache__ */__pycache__
