"""The training log: every interval one JSON line in `log.jsonl` and one line for people on standard error.

Only the main process logs. A progress bar is the caller's: it gives a callback. Numbers that belong to a step may go to
TensorBoard too, where that is installed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.errors import Unsupported

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""


class Log:
    """Append-only log of one run.

    Args:
        path: the JSONL file; appended to, so that a resumed run continues it.
        enabled: False on processes other than the main one: then every call does nothing.
        progress: called with (stage, per cent done, 100).
        board: folder for TensorBoard; None for none.

    Raises:
        Unsupported: `board` is given and TensorBoard is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        enabled: bool = True,
        progress: Progress | None = None,
        board: str | Path | None = None,
    ) -> None:
        self.path, self.enabled, self.progress = Path(path), enabled, progress
        self.board: Any = None
        if board is not None and enabled:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise Unsupported(
                    "TensorBoard", "none installed", "training.tensorboard", "pip install 'engine[tensorboard]'"
                ) from None
            self.board = SummaryWriter(str(board))

    def bar(self, stage: str, share: float) -> None:
        """Show the share done (0 .. 1) of `stage`."""
        if self.enabled and self.progress is not None:
            self.progress(stage, int(100 * share), 100)

    def event(self, event: str, **fields: Any) -> None:
        """Write one line: `event` and its fields. Non-finite numbers become null: JSON has none."""
        if not self.enabled:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        line = json.dumps({"event": event, "time": round(time.time(), 3), **plain}, allow_nan=False)
        try:
            with self.path.open("ab+") as stream:
                # a run that was killed, or whose disk was full, may have left half a line
                cut = stream.tell() and stream.seek(-1, 2) >= 0 and stream.read(1) != b"\n"
                stream.write(("\n" if cut else "").encode() + line.encode() + b"\n")
        except OSError as error:  # the next checkpoint tells it better, and may find the disk mended
            print(f"the log could not be written: {error.strerror}", file=sys.stderr, flush=True)
        if self.board is not None and "step" in fields:
            for name, value in plain.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{event}/{name}", value, fields["step"])
            self.board.flush()
        words = " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in fields.items())
        print(f"{event}  {words}", file=sys.stderr, flush=True)
