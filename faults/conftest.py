"""These tests look at /proc, and at limits and signals as Linux has them."""
import sys

if sys.platform != "linux":
    collect_ignore_glob = ["test_*.py"]
