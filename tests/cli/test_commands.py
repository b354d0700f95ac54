"""The command line itself: quick to answer, exit codes, and every command written in the docs exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from engine.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "scripts" / "slurm").glob("*.sbatch")),
]


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, engine.cli\n"
        "try: engine.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'monai', 'numba', 'scipy', 'nibabel', 'pydicom'} & set(sys.modules)\n"
        "sys.exit(1 if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def written_commands() -> list[tuple[str, str]]:
    """(page, line) of every `engine ...` command in a code block of the docs or in a job script, continuations joined."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        blocks = re.findall(r"```(?:bash|sh|console)?\n(.*?)```", text, re.S) if page.suffix == ".md" else [text]
        for block in blocks:
            for line in block.splitlines():
                line = re.sub(r"^\s*(\$ |exec )?", "", line)
                if line.startswith("engine ") and "{" not in line.split()[1]:
                    found.append((page.name, line.split(" #")[0].strip()))
    return found


def test_the_docs_hold_commands() -> None:
    assert len(written_commands()) >= 10


@pytest.mark.parametrize(("page", "line"), written_commands())
def test_every_written_command_exists_with_its_options(page: str, line: str) -> None:
    command = typer.main.get_command(app)
    words = shlex.split(line.replace('"${resume[@]}"', ""), comments=True)[1:]
    if words[0].startswith("$"):  # `engine "$modality" finish` in a job script: both must do
        words[0] = "genomics"
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{page}: no command '{words[0]}' in: {line}"
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "--debug"}
    used = {word.split("=")[0] for word in words if re.match(r"^--?[a-zA-Z]", word) and word != "&"}
    assert used <= known, f"{page}: unknown options {used - known} in: {line}"


def test_exit_codes(engine, tmp_path: Path) -> None:
    assert engine("nonsense").code == 2
    assert engine("genomics", "fit").code == 2
    said = engine("doctor")
    assert said.code == 0
    assert {row["what"] for row in said.result["checks"]} >= {"torch", "numba", "triton", "gpu", "memory"}
    said = engine("files", "check", tmp_path / "absent.nii.gz")
    assert said.code == 0
    assert said.result["inputs"][0]["verdict"] == "reject"
    assert engine("files", "check", "--strict", tmp_path / "absent.nii.gz").code == 2


def test_debug_gives_the_trace(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engine", "--debug", "ld", str(tmp_path / "no.bcf"), "--out", str(tmp_path / "x")]
    assert "Traceback" in subprocess.run(command, capture_output=True, text=True, timeout=120).stderr
