"""One family of exceptions, so that a user sees one line that says what to do next.

The command line prints `str(error)` and exits with `error.exit_code`; a programming error (anything that is not an
`EngineError`) keeps its traceback. Nothing here imports anything.
"""

from __future__ import annotations


class EngineError(Exception):
    """What was expected, what came, where, and what to try, on one line.

    Args:
        expected: what the engine needed, e.g. "a 3D volume".
        got: what it found instead, e.g. "2D image of 24 x 20".
        where: file, record, slice, or argument.
        hint: the next step for the user; may be empty.
    """

    exit_code = 2

    def __init__(self, expected: str, got: str = "", where: object = "", hint: str = "") -> None:
        self.expected, self.got, self.where, self.hint = expected, got, str(where), hint
        line = f"expected {expected}" if got else expected
        if got:
            line += f", got {got}"
        if self.where:
            line = f"{self.where}: {line}"
        if hint:
            line += f"; try: {hint}"
        super().__init__(" ".join(line.split()))


class InputError(EngineError):
    """A file or table given by the user cannot be used. Exit code 2."""


class UsageError(EngineError):
    """An argument or a config is wrong. Exit code 2."""


class Unsupported(EngineError):
    """A named implementation, device or format cannot do this here; it is never silently replaced. Exit code 2."""


class CorruptRun(EngineError):
    """A run folder or checkpoint is incomplete or does not match its checksums. Exit code 2."""


class GateRefused(EngineError):
    """A gate (audit, release) says no. Exit code 3."""

    exit_code = 3


def closest(name: str, known: list[str]) -> str:
    """Hint naming the nearest known spelling of `name`; the full list when nothing is near."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"'{near[0]}'" if near else "one of " + ", ".join(sorted(known))
