"""What a JSON Schema cannot say of p2pserver's texts, as Hypothesis strategies for schemathesis."""

import pathlib
import sys

import schemathesis
from hypothesis import strategies as st

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import p2pserver  # noqa: E402


def passes(check):
    """Whether the server's own check lets a value through."""
    def has_passed(value):
        try:
            check(value, p2pserver.Scope())
        except ValueError:
            return False
        return True
    return has_passed


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=64)
candidates = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.integers(1, 65535)).map("{0[0]}:{0[1]}".format),
    st.tuples(st.ip_addresses(v=6), st.integers(1, 65535)).map("[{0[0]}]:{0[1]}".format),
    texts)

schemathesis.openapi.format("game-name", st.one_of(st.just("castle"), texts).filter(passes(p2pserver.check_name)))
schemathesis.openapi.format("peer-id", st.one_of(st.just("ada"), texts).filter(passes(p2pserver.check_peer_id)))
schemathesis.openapi.format("candidate", candidates.filter(lambda text: not p2pserver.address_fault(text, False)))


@schemathesis.hook
def filter_body(context, body):
    """Whether the size of info is as its description has it."""
    return not isinstance(body, dict) or not isinstance(body.get("info"), dict) or passes(p2pserver.check_info)(body["info"])


@schemathesis.hook
def filter_case(context, case):
    """Not what is meant to break only the format of a text: by chance it may have it."""
    return case.meta is None or "violates `format`" not in (case.meta.phase.data.description or "")
