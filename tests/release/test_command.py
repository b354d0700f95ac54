"""`engine release` and `engine verify-release` as they are typed: options, exit codes, one line for a refusal."""

from __future__ import annotations

import json
import subprocess

import pytest

from engine.cli import main


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    code = 0
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_release_and_verify(tmp_path, scans, audited, capsys):
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "k"], check=True, capture_output=True
    )
    subprocess.run(["openssl", "pkey", "-in", tmp_path / "k", "-pubout", "-out", tmp_path / "p"], check=True)
    (tmp_path / "ids.txt").write_text("CANARY-PATIENT-4711\nP2\n")
    out = tmp_path / "out"
    code, said, errors = run(
        capsys, "release", scans, "--audit", audited(scans), "--out", out, "--title", "Heads", "--bids", "T1w",
        "--keyword", "head", "--keyword", "MRI", "--derived-from", "10.1/x", "--sign", tmp_path / "k",
        "--forbid", tmp_path / "ids.txt", "--json",
    )  # fmt: skip
    assert code == 0, errors
    made = json.loads(said)
    assert made["keywords"] == ["head", "MRI"]
    assert made["title"] == "Heads"
    code, said, _ = run(capsys, "verify-release", out, "--key", tmp_path / "p", "--json")
    assert code == 0
    assert json.loads(said)["signature"] == "valid"
    (out / "DATA_CARD.md").write_text("")
    code, said, errors = run(capsys, "verify-release", out)
    assert code == 3
    assert said == ""
    assert errors.count("\n") == 1
    assert "changed" in errors


@pytest.mark.parametrize(
    ("more", "code", "word"),
    [
        (["--bids", "T1"], 2, "'T1w'"),
        (["--sign", "nowhere.pem"], 2, "Ed25519"),
        (["--model", "nowhere"], 2, "config.yaml"),
        (["--evaluation", "nowhere"], 2, "evaluation.json"),
        (["--forbid", "nowhere.txt"], 2, "one string a line"),
    ],
)
def test_bad_use_is_one_line(tmp_path, scans, audited, capsys, more, code, word):
    found, said, errors = run(capsys, "release", scans, "--audit", audited(scans), "--out", tmp_path / "out", *more)
    assert found == code
    assert said == ""
    assert errors.count("\n") == 1
    assert word in errors
    assert not (tmp_path / "out").exists()


def test_a_list_of_short_words_is_no_list(tmp_path, scans, audited, capsys):
    """It would look as if something were guarded."""
    (tmp_path / "ids.txt").write_text("1\n22\n")
    code, _, errors = run(capsys, "release", scans, "--audit", audited(scans), "--out", tmp_path / "o",
                          "--forbid", tmp_path / "ids.txt")  # fmt: skip
    assert code == 2
    assert "5 characters" in errors


def test_no_release_folder(tmp_path, capsys):
    code, _, errors = run(capsys, "verify-release", tmp_path)
    assert code == 2
    assert "SHA256SUMS" in errors


def test_report_puts_audit_and_evaluation_on_one_page(tmp_path, scans, audited, capsys):
    folder = tmp_path / "evaluation"
    folder.mkdir()
    figures = {
        "ld_decay": {"distance_bp": [100, 1000, 1e5], "real": [0.6, 0.3, 0.1], "synthetic": [0.5, 0.3, 0.1]},
        "sfs": {
            "minor_count_low": [1, 2],
            "minor_count_high": [1, 4],
            "haplotypes": 9,
            "real": [2, 1],
            "synthetic": [2, 2],
        },
        "pca": {"real": [[0, 1], [1, 0]], "synthetic": [[1, 1], [0, 0]]},
        "af": {"real": [0.1, 0.3], "synthetic": [0.1, 0.2]},
    }
    finding = {"name": "ld_r", "value": 0.97, "interval": None, "n": 300, "verdict": "none"}
    (folder / "evaluation.json").write_text(json.dumps({"findings": [finding], "figures": figures}))
    out = tmp_path / "r.html"
    code, said, errors = run(
        capsys, "report", "--audit", audited(scans, "fail"), "--evaluation", folder, "--real", scans, "--synthetic", scans,
        "--out", out, "--json",
    )  # fmt: skip
    assert code == 0, errors
    assert json.loads(said)["verdict"] == "fail"
    page = out.read_text()
    for words in ("Internal.", "Must not be released", "Random scans", "Covariates", "Linkage disequilibrium", "Principal comp",
                  "Site-frequency spectrum", "Planted controls", "People and rows"):  # fmt: skip
        assert words in page
    assert run(capsys, "report", "--audit", audited(scans), "--out", out)[0] == 2
    code, _, errors = run(capsys, "report", "--audit", audited(scans), "--real", scans, "--out", tmp_path / "s.html")
    assert code == 2
    assert "--real and --synthetic" in errors
