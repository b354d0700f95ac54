from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.cohort.tables import read_table, write_table
from engine.errors import InputError


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_round_trip(tmp_path: Path, suffix: str) -> None:
    table = {"id": np.array(["a", "b,c"], dtype=object), "k": np.array([1, 2]), "x": np.array([0.25, -1.5])}
    write_table(tmp_path / f"t.{suffix}", table)
    back = read_table(tmp_path / f"t.{suffix}")
    assert all(list(back[name]) == list(table[name]) for name in table)
    assert back["k"].dtype == np.int64
    assert back["x"].dtype == np.float64


def test_faults_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1\n")
    with pytest.raises(InputError, match="2 cells"):
        read_table(tmp_path / "t.csv")
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(InputError, match="equal length"):
        write_table(tmp_path / "u.csv", {"a": np.array([1]), "b": np.array([1, 2])})
