"""Where Numba keeps what it has compiled: a folder of its own for every state of the sources.

Numba holds a cached function to be current while the function's own file is as it was. What the function calls may stand
in other files: after an update a cached caller would go on with the old callee, silently. So the folder's name is a hash of
names, sizes and times of change of the rooms that hold what compiled functions of other files call.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

_ROOMS = ("kernels", "files")
_KEPT_SECONDS = 30 * 86400


def keep_by_source(package: Path) -> Path | None:
    """Make Numba keep its cache in a folder that belongs to the present state of `package`'s rooms, and return the folder.

    It lies under $XDG_CACHE_HOME/engine/numba (~/.cache where that is not set). Folders that nobody has used for 30 days
    are removed. NUMBA_CACHE_DIR, where it is set, is left alone (None), and so is Numba's own choice where no folder can
    be made: then remove its files, *.nbi and *.nbc, after an update.
    """
    if os.environ.get("NUMBA_CACHE_DIR"):
        return None
    hasher = hashlib.sha256(os.fsencode(package))
    for path in sorted(path for room in _ROOMS for path in (package / room).rglob("*.py")):
        state = path.stat()
        hasher.update(os.fsencode(path) + f" {state.st_size} {state.st_mtime_ns}\n".encode())
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engine" / "numba"
        chosen = base / hasher.hexdigest()[:16]
        chosen.mkdir(parents=True, exist_ok=True)
        os.utime(chosen)
    except (OSError, RuntimeError):  # no home, or none that can be written
        return None
    os.environ["NUMBA_CACHE_DIR"] = str(chosen)
    if "numba" in sys.modules:  # it has read its settings already
        sys.modules["numba"].config.CACHE_DIR = str(chosen)
    with contextlib.suppress(OSError):
        for other in base.iterdir():
            if other.stat().st_mtime < time.time() - _KEPT_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
    return chosen
