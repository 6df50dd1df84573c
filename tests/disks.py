"""Disks that are full."""

import contextlib
import resource


@contextlib.contextmanager
def largest_file(size):
    """Writes beyond this size fail, after a part of them, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
