"""For a loader worker, which can say only what an importable function says: the modules loaded after a read."""

import sys
from collections.abc import Callable
from typing import Any


def after(read: Callable[[Any], Any], item: Any) -> list[str]:
    """Read, and name them."""
    read(item)
    return sorted(sys.modules)
