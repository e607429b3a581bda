"""Code that several tests share. Every test imports it in the same way: `from support.launching import Ranks`.

tests/ is on the path of pytest (pyproject.toml). A script of this package is started by its path, so it puts the
repository's root and tests/ on the path itself, before it imports from either.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The folder of the repository."""
