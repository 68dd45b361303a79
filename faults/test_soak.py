"""A short soak: see soak.py, which `make soak` runs for ten minutes. SOAK_MINUTES in the environment makes it longer."""
import os
import random

from soak import soak


def test_a_minute_of_everything_at_once_leaves_the_server_as_it_was():
    seed = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().getrandbits(32))
    assert not soak(float(os.environ.get("SOAK_MINUTES") or 1), seed)
