"""These tests look at /proc, and at limits and signals as Linux has them."""
import shutil
import subprocess
import sys

import pytest

if sys.platform != "linux":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Flags for a server with a certificate of its own making."""
    # Only Linux can import it, so this does not stand above.
    from stage import known_flags

    if "--tls-cert" not in known_flags() or not shutil.which("openssl"):
        pytest.skip("there is no TLS, or no openssl to make a certificate")
    cert, key = (str(tmp_path_factory.mktemp("tls") / name) for name in ("cert.pem", "key.pem"))
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=localhost",
                    "-keyout", key, "-out", cert], check=True, capture_output=True)
    return "--tls-cert", cert, "--tls-key", key
