"""docs/openapi.yaml says what the server does: held against its table of routes and its limits, and tried by schemathesis on a live server."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import p2pserver  # noqa: E402

DOCUMENT = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text(encoding="utf-8"))
SCHEMAS = DOCUMENT["components"]["schemas"]
OPERATIONS = {(method.upper(), path): operation for path, item in DOCUMENT["paths"].items() for method, operation in item.items() if method != "parameters"}
ROUTES = {(method, path.replace("<name>", "{name}")): route for path, routes in p2pserver.ROUTES.items() for method, route in routes.items()}
TRIAL_SECONDS = os.environ.get("TRIAL_SECONDS", "120")


def body_of(operation):
    """The schema of a request's body."""
    return operation.get("requestBody", {"content": {"application/json": {"schema": {}}}})["content"]["application/json"]["schema"]


def test_every_route_is_an_operation_and_the_other_way_round():
    assert OPERATIONS.keys() == ROUTES.keys()
    assert DOCUMENT["info"]["version"] == p2pserver.__version__
    names = {key: operation["operationId"] for key, operation in OPERATIONS.items() if key[0] != "PUT"}
    assert names == {key: ROUTES[key].endpoint.__name__ for key in names}, "PUT does the same as PATCH, and needs a name of its own"


@pytest.mark.parametrize("key", ROUTES, ids=" ".join)
def test_an_operation_has_the_fields_of_its_route(key):
    schema, fields = body_of(OPERATIONS[key]), ROUTES[key].fields
    assert schema.get("properties", {}).keys() == fields.keys()
    for name, check in fields.items():
        with contextlib.nullcontext() if name not in schema["required"] else pytest.raises(ValueError):
            assert check(None, p2pserver.Scope()) is None


def test_the_limits_are_the_servers():
    settings, poll = p2pserver.Settings(), body_of(OPERATIONS["POST", "/games/poll"])["properties"]
    assert (SCHEMAS["Name"]["maxLength"], SCHEMAS["PeerId"]["maxLength"]) == (p2pserver.MAX_NAME, p2pserver.MAX_PEER_ID)
    assert SCHEMAS["Address"]["anyOf"][0]["maxLength"] == p2pserver.MAX_ADDRESS and SCHEMAS["Addresses"]["anyOf"][0]["maxItems"] == p2pserver.MAX_ADDRESSES
    assert poll["replies"]["maxProperties"] == poll["dismiss"]["anyOf"][0]["maxItems"] == settings.max_guests
    numbers = {int(number) for number in re.findall(r"[0-9]+", DOCUMENT["components"]["responses"]["ContentTooLarge"]["description"])}
    assert numbers == {settings.max_body, p2pserver.POLL_FACTOR * settings.max_body}
    assert all(name in SCHEMAS["Name"]["description"] for name in p2pserver.RESERVED_NAMES)
    assert f"at most {p2pserver.MAX_INFO} bytes" in SCHEMAS["Info"]["description"].lower() and f"({settings.max_wait})" in SCHEMAS["Wait"]["description"]


def test_schemathesis_finds_nothing():
    flags = ["--port", "0", "--host", "127.0.0.1", "--rate", "0", "--max-wait", "0", "--max-guests-per-client", "64", "--max-games-per-client", "10000"]
    with subprocess.Popen([sys.executable, ROOT / "p2pserver.py", *flags, "--log-level", "warning"], stdout=subprocess.PIPE, text=True) as server:
        try:
            url = re.search("http://127.0.0.1:[0-9]+", server.stdout.readline())[0]
            trial = subprocess.run(
                [pathlib.Path(sys.executable).parent / "schemathesis", "run", "docs/openapi.yaml", "--url", url, "--checks", "all", "--max-time", TRIAL_SECONDS,
                 "--continue-on-failure", "--no-color"],
                cwd=ROOT, env={**os.environ, "SCHEMATHESIS_HOOKS": "docs.openapi_hooks", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        finally:
            server.terminate()
    assert trial.returncode == 0, trial.stdout[-8000:] + trial.stderr[-2000:]
