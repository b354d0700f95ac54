"""The command line: parse, load, call one function, print.

Every command takes `--json` (one JSON object on standard output, everything else on standard error) and exits 0 when
done, 2 on bad input or use, 3 when a gate says no. Heavy imports happen inside the command that needs them, so that
`engine --help` answers at once.
"""

from __future__ import annotations

import sys

import typer

from engine.cli import audit, benchmark, cohort, files, genomics, imaging, kernels, machine, release
from engine.errors import EngineError

app = typer.Typer(
    name="engine",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Learn from real 3D scans and genotypes, make synthetic ones, show with evidence if they may be released.",
)
app.add_typer(genomics.app, name="genomics")
app.add_typer(imaging.app, name="imaging")
app.add_typer(cohort.app, name="cohort")
app.add_typer(files.app, name="files")
app.add_typer(benchmark.app, name="benchmark")
audit.register(app)
release.register(app)
kernels.register(app)
machine.register(app)


def _debug_wanted(arguments: list[str]) -> bool:
    """`--debug` may stand anywhere on the line; it is taken out here so that no command has to declare it."""
    if "--debug" in arguments:
        arguments.remove("--debug")
        return True
    return False


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `engine` and `python -m engine`: one line for a user's mistake, a traceback only with --debug."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = _debug_wanted(arguments)
    try:
        app(args=arguments, prog_name="engine")
    except EngineError as error:
        if debug:
            raise
        _complain(str(error))
        raise SystemExit(error.exit_code) from None
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        if debug:
            raise
        _complain(f"{error.filename or 'file'}: {error.strerror or error}")
        raise SystemExit(2) from None
    except OSError as error:
        if debug:
            raise
        place = f"{error.filename}: " if error.filename else ""
        _complain(f"{place}{error.strerror or error}; try: another --out, or free some space")
        raise SystemExit(2) from None
    except MemoryError as error:
        if debug:
            raise
        _complain(f"not enough memory{f' ({error})' if str(error) else ''}; try: a smaller region, batch or volume")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _complain("interrupted; what was finished is kept")
        raise SystemExit(130) from None


def _complain(line: str) -> None:
    print("engine: " + " ".join(line.split()), file=sys.stderr)
