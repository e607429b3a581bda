"""Types of the text keys whose values mean more than text. To everything but the command line they are plain strings.

A configuration declares them where it declares the key:

    run_dir: PathText = MISSING
    input: list[PathText] = MISSING
"""

from __future__ import annotations

import os
import re
from enum import Enum
from pathlib import Path
from typing import Annotated

from pretrain.errors import ConfigError


class Mark(Enum):
    """What a text key holds."""

    path = "path"
    manifest = "manifest"
    verbatim = "verbatim"


PathText = Annotated[str, Mark.path]
"""A path or URL. A leading `~` is the home folder."""
ManifestText = Annotated[str, Mark.manifest]
"""Path or URL of a corpus's manifest.json. The corpus's folder stands for the manifest in it."""
VerbatimText = Annotated[str, Mark.verbatim]
"""Any text, such as a prompt or the id of a document: nothing in it has a meaning of its own, not even quotes or `${`.
A list of such texts gets one text from each time that its key is given."""


def expanded_path(key: str, text: str) -> str:
    """`text` with a leading `~` or `~user` replaced by the home folder. Raises ConfigError where there is no such user.

    Shells expand `~` at the beginning of a word, so in KEY=~/folder they leave it to the program.
    """
    if not text.startswith("~"):
        return text
    found = os.path.expanduser(text)
    if found == text:
        raise ConfigError(
            f"{key}={text} begins with ~, but there is no user of that name; write ./{text} for a folder of that name"
        )
    return found


def manifest_in(path: str) -> str:
    """The manifest of a corpus: `path` itself, or manifest.json in it where it is a folder, or a URL like one."""
    if (
        "://" in path
    ):  # what has no dot in its last part is taken for a folder, since asking the store takes time
        is_folder = re.fullmatch(r"[^?#]+/([^/.?#]+/?)?", path) is not None
        return f"{path.rstrip('/')}/manifest.json" if is_folder else path
    return str(Path(path, "manifest.json")) if Path(path).is_dir() else path
