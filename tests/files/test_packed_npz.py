"""NumPy archives of haplotypes: sites, people and alleles as written, and damage that is named."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import InputError
from engine.files.packed_npz import read_npz
from engine.genomics.panel import read_panel

LEGEND = "id position a0 a1\n1:10_C_T 10 C T\n1:20_A_G 20 A G\n2:5_G_GT 5 G GT\n"


def write(folder, alleles_nl, names, legend=LEGEND, **changed):
    path = folder / "train.npz"
    arrays = {"haplotypes": np.packbits(alleles_nl, axis=1), "ids": np.array(names), "n_sites": alleles_nl.shape[1]}
    np.savez_compressed(path, **{key: value for key, value in (arrays | changed).items() if value is not None})
    if legend is not None:
        (folder / "sites.legend").write_text(legend, encoding="utf-8")
    return path


def test_alleles_sites_and_people(tmp_path):
    rng = np.random.default_rng(0)
    alleles_nl = (rng.random((5, 3)) < 0.5).astype(np.uint8)
    panel = read_panel(write(tmp_path, alleles_nl, ["P1_A", "P1_B", "single", "P2_A", "P2_B"]))
    np.testing.assert_array_equal(panel.alleles_nl(), alleles_nl)
    assert panel.samples.ids == ["P1", "single", "P2"]
    assert panel.samples.first_haplotype.tolist() == [0, 2, 3, 5]
    assert panel.sites.contig.tolist() == ["1", "1", "2"]
    assert panel.sites.position_bp.tolist() == [10, 20, 5]
    assert panel.sites.ref.tolist() == ["C", "A", "G"]
    assert panel.sites.alt.tolist() == ["T", "G", "GT"]
    assert panel.phased


def test_more_sites_than_are_unpacked_at_a_time(tmp_path):
    sites = 2_050
    alleles_nl = (np.random.default_rng(1).random((67, sites)) < 0.3).astype(np.uint8)
    lines = "".join(f"7:{at + 1}_A_C {at + 1} A C\n" for at in range(sites))
    panel = read_panel(write(tmp_path, alleles_nl, [f"h{n}" for n in range(67)], "id position a0 a1\n" + lines))
    np.testing.assert_array_equal(panel.alleles_nl(), alleles_nl)


def test_without_a_table_the_sites_of_a_model(tmp_path):
    alleles_nl = np.eye(3, dtype=np.uint8)
    like = read_npz(write(tmp_path, alleles_nl, ["a", "b", "c"]))
    (tmp_path / "sites.legend").unlink()
    with pytest.raises(InputError, match="table of sites"):
        read_npz(tmp_path / "train.npz")
    again = read_npz(tmp_path / "train.npz", like)
    np.testing.assert_array_equal(again.bits_lw, like.bits_lw)
    assert again.position_bp.tolist() == [10, 20, 5]
    with pytest.raises(InputError, match="2 sites"):
        read_npz(write(tmp_path, alleles_nl[:, :2], ["a", "b", "c"], legend=None), like)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ids": None}, "no 'ids'"),
        ({"haplotypes": np.zeros((3, 2), np.uint8)}, "bytes a row"),
        ({"haplotypes": np.zeros((3, 1), np.int64)}, "uint8"),
        ({"ids": np.array(["a", "b"])}, "ids"),
        ({"ids": np.array(["a", "b c", "d"])}, "without blanks"),
        ({"ids": np.array(["a", {}, "d"], dtype=object)}, "pickled"),
        ({"n_sites": np.array([3.0])}, "n_sites"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changed, message):
    with pytest.raises(InputError, match=message):
        read_npz(write(tmp_path, np.eye(3, dtype=np.uint8), ["a", "b", "c"], **changed))


def test_damage_is_named(tmp_path):
    path = write(tmp_path, np.eye(3, dtype=np.uint8), ["a", "b", "c"])
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(InputError, match="NumPy archive"):
        read_npz(path)
    path.write_bytes(whole)
    (tmp_path / "sites.legend").write_text(LEGEND.replace("1:20_A_G 20", "1:20_A_G x"), encoding="utf-8")
    with pytest.raises(InputError, match="line 3"):
        read_npz(path)
    with pytest.raises(InputError, match="can be read"):
        read_npz(tmp_path / "absent.npz")
