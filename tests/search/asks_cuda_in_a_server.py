"""Asks the driver when a fork server imports it, and leaves it alone when it is tried out."""

import sys

if "multiprocessing.forkserver" in sys.modules:
    import tests.search.asks_cuda  # noqa: F401
