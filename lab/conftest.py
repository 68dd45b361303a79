"""Runs the tests marked `at_once` all together, as they mostly wait: each in a thread, and its test waits for that alone.

Such a test takes no fixtures, only the values of `parametrize`.
"""
import concurrent.futures

import pytest

AT_ONCE = 16    # threads: two CPUs still have time to spare, and all is over in three minutes
_running = pytest.StashKey()


def pytest_configure(config):
    config.addinivalue_line("markers", "at_once: run together with the others that are so marked")


def pytest_pyfunc_call(pyfuncitem):
    if not pyfuncitem.get_closest_marker("at_once"):
        return None
    stash = pyfuncitem.session.stash
    if _running not in stash:
        pool = concurrent.futures.ThreadPoolExecutor(AT_ONCE)
        items = [item for item in pyfuncitem.session.items if item.get_closest_marker("at_once")]
        # sorted() keeps the order: first those that are marked as taking long.
        items.sort(key=lambda item: -item.get_closest_marker("at_once").kwargs.get("seconds", 0))
        stash[_running] = pool, {item: pool.submit(item.function, **item.callspec.params if hasattr(item, "callspec") else {}) for item in items}
    stash[_running][1][pyfuncitem].result()
    return True


def pytest_sessionfinish(session):
    if _running in session.stash:
        session.stash[_running][0].shutdown(cancel_futures=True)
