"""Reports the modules that a loader worker has loaded. A worker can call only importable functions."""

import sys
from collections.abc import Callable
from typing import Any


def after(read: Callable[[Any], Any], item: Any) -> list[str]:
    """Read an item, and return the names of all loaded modules."""
    read(item)
    return sorted(sys.modules)
