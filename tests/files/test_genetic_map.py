"""Genetic maps: every format, interpolation by hand, and the mismatches that must be found before a run."""

from __future__ import annotations

import gzip
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from engine.errors import InputError
from engine.files import genetic_map
from engine.files.genetic_map import GeneticMap, check_build, read_map, read_maps

FORMATS = {
    "glimpse.gmap": "pos\tchr\tcM\n100\t22\t0.0\n200\t22\t0.5\n400\t22\t0.5\n",
    "hapmap.txt": "Chromosome\tPosition(bp)\tRate(cM/Mb)\tMap(cM)\n22 100 5000 0\n22 200 0 0.5\n22 400 0 0.5\n",
    "plink.map": "22 . 0 100\n22 rs1 0.5 200\n22 . 0.5 400\n",
    "genetic_map_chr22_combined_b37.txt": "position COMBINED_rate(cM/Mb) Genetic_Map(cM)\n100 5000 0\n200 0 0.5\n400 0 0.5\n",
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_map(tmp_path, name, zipped):
    path = tmp_path / (name + (".gz" if zipped else ""))
    path.write_bytes(gzip.compress(FORMATS[name].encode()) if zipped else FORMATS[name].encode())
    made = read_map(path)
    assert made.contig == "22"
    assert made.position_bp.tolist() == [100, 200, 400]
    assert made.position_bp.dtype == np.int64
    assert made.position_cm.tolist() == [0.0, 0.5, 0.5]


def test_interpolation_inside_and_the_end_slopes_outside():
    made = GeneticMap("1", np.array([100, 200, 400]), np.array([1.0, 2.0, 2.5]))
    got = made.interpolate(np.array([100, 150, 200, 300, 400, 0, 500]))
    # outside: mean slope of the (here all three) outermost points, 1.5 cM over 300 bp
    np.testing.assert_allclose(got, [1.0, 1.5, 2.0, 2.25, 2.5, 1.0 - 0.5, 2.5 + 0.5])
    assert GeneticMap("1", np.array([10]), np.array([3.0])).interpolate(np.array([10, 1_000_010])).tolist() == [
        3.0,
        4.0,
    ]


def test_the_end_slope_is_that_of_the_end():
    bp = np.arange(1, 301) * 100
    cm = np.concatenate([np.zeros(150), np.arange(1, 151) * 1.0])
    made = GeneticMap("1", bp, cm)
    np.testing.assert_allclose(made.interpolate(np.array([0, 30_100])), [0.0, 151.0])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty file"),
        ("pos chr cM\n", "header without lines"),
        ("pos chr cM\n10 1 0\n10 1 1\n", "line 3.*ascend"),
        ("pos chr cM\n10 1 0\n9 1 1\n", "ascend"),
        ("pos chr cM\n10 1 1\n20 1 0.5\n", "line 3.*descend"),
        ("pos chr cM\n10 1 nan\n", "finite"),
        ("pos chr cM\n10 1\n", "line 2"),
        ("pos chr cM\n10.5 1 0\n", "line 2"),
        ("a b c\n1 2 3\n", "header 'pos chr cM'"),
        ("pos cM\n1 2\n", "chr"),
        ("1 . 0 1\n1 . 0 3000000\n", "Morgans"),
        ("1 . 0 1\n1 . 1.2 100000000\n", "Morgans"),
    ],
)
def test_faults_name_file_and_line(tmp_path, text, why):
    path = tmp_path / "x.map"
    path.write_text(text)
    with pytest.raises(InputError, match=why):
        read_map(path)


def test_damaged_and_absent_files(tmp_path):
    whole = gzip.compress(FORMATS["glimpse.gmap"].encode())
    path = tmp_path / "x.gz"
    for data in (whole[:-10], whole[:20] + b"\0\0" + whole[22:], b"\xff\xfe\0"):
        path.write_bytes(data)
        with pytest.raises(InputError):
            read_map(path)
    with pytest.raises(InputError, match="no such file"):
        read_map(tmp_path / "none")


def test_a_file_of_several_contigs(tmp_path):
    path = tmp_path / "x.map"
    path.write_text("1 . 0 10\n1 . 1 20\n2 . 0 5\n2 . 2 50\n")
    assert list(read_maps(path)) == ["1", "2"]
    assert read_map(path, contig="chr2").position_bp.tolist() == [5, 50]
    with pytest.raises(InputError, match="one contig"):
        read_map(path)
    with pytest.raises(InputError, match="contig '3'"):
        read_map(path, contig="3")


def test_contig_names_with_and_without_chr():
    assert genetic_map.same_contig("chr22", "22")
    assert genetic_map.same_contig("chrX", "23")
    assert genetic_map.same_contig("NC_000022.11", "chr22")
    assert genetic_map.same_contig("chrM", "MT")
    assert not genetic_map.same_contig("2", "22")


def test_mismatches_are_found(real_data):
    maps = real_data / "genomics" / "maps"
    b37, b38 = (read_map(maps / b / f"chr15.{b}.gmap.gz") for b in ("b37", "b38"))
    sites = np.linspace(27_379_578, 29_630_000, 50).astype(int)
    check_build(b37, "chr15", sites, assembly="GRCh37", contig_length=102_531_392)
    check_build(b37, "15", sites)
    for own, contig, more, why in [
        (b37, "22", {}, "of '15'"),
        (b38, "15", {"assembly": "hg19"}, "GRCh37"),
        (b38, "15", {"contig_length": 102_531_392}, "GRCh37"),
        (b37, "15", {"contig_length": 101_991_189}, "within 15's"),
        (b37, "15", {"assembly": "GRCh38"}, "GRCh38"),
    ]:
        with pytest.raises(InputError, match=why):
            check_build(own, contig, sites, **more)
    with pytest.raises(InputError, match="0% of 50 sites"):
        check_build(b37, "15", sites + 80_000_000)


cached_map = lru_cache(read_map)
LENGTHS = {"GRCh37": {"15": 102_531_392, "22": 51_304_566}, "GRCh38": {"15": 101_991_189, "22": 50_818_468}}


@pytest.mark.parametrize("contig", ["15", "22"])
@pytest.mark.parametrize(
    ("of_map", "of_sites"), [("b37", "GRCh38"), ("b38", "GRCh37"), ("b37", "GRCh37"), ("b38", "GRCh38")]
)
@pytest.mark.parametrize("prefix", ["", "chr"])
@pytest.mark.parametrize("stated", ["length", "name", "position"])
def test_a_map_of_another_build_is_found_whatever_states_it(real_data, contig, of_map, of_sites, prefix, stated):
    """Real maps of both builds under a name that says nothing; the panel says its build by contig length, name or reach."""
    own = cached_map(real_data / f"genomics/maps/{of_map}/chr{contig}.{of_map}.gmap.gz")
    own = GeneticMap(own.contig, own.position_bp, own.position_cm, "map.gz")
    sites = np.linspace(25_000_000, 45_000_000, 40).astype(int)
    said = {
        "length": {"contig_length": LENGTHS[of_sites][contig]},
        "name": {"assembly": {"GRCh37": "hs37d5", "GRCh38": "GRCh38_full_analysis_set"}[of_sites]},
        "position": {},
    }[stated]
    if stated == "position":  # the last site lies where GRCh38, the shorter one, has no room
        of_sites = "GRCh37"
        sites[-1] = LENGTHS["GRCh38"][contig] + 1
    if of_map[1:] == of_sites[-2:]:
        assert check_build(own, prefix + contig, sites, **said) is None
    else:
        with pytest.raises(InputError, match=r"GRCh3[78]"):
            check_build(own, prefix + contig, sites, **said)


def test_what_cannot_be_told_is_said(real_data):
    own = read_map(real_data / "genomics/maps/b37/chr20.b37.gmap.gz")
    told = check_build(own, "20", np.array([1_000_000, 2_000_000]))
    assert told == "the panel does not say of which build contig 20 is; its map is of GRCh37"
    mouse = GeneticMap("scaffold_7", np.array([10, 2_000]), np.array([0.0, 1.0]), "x.map")
    assert check_build(mouse, "scaffold_7", np.array([100])) is None


def test_sites_beyond_the_end_of_their_contig(real_data):
    own = read_map(real_data / "genomics/maps/b37/chr22.b37.gmap.gz")
    sites = np.array([20_000_000, 51_304_567])
    for said in ({"contig_length": 51_304_566}, {"assembly": "GRCh37"}):
        with pytest.raises(InputError, match=r"within the 51,304,566 bp of contig 22 .*one at 51,304,567"):
            check_build(own, "22", sites, **said)
    with pytest.raises(InputError, match="a header of one build, hg19, got contig 22 of 50,818,468 bp"):
        check_build(own, "22", sites[:0], assembly="hg19", contig_length=50_818_468)


@pytest.mark.parametrize("contig", ["7", "16"])
def test_builds_of_nearly_one_length_are_not_told_by_the_end_of_a_map(contig):
    ends = [genetic_map.length_of(contig, build) for build in ("GRCh37", "GRCh38")]
    assert abs(ends[0] - ends[1]) < 300_000
    assert genetic_map.build_of_reach(contig, min(ends) - 40_000, whole_from=60_000) is None
    assert genetic_map.build_of_reach("22", 50_791_377) is None  # a region may end anywhere
    assert genetic_map.build_of_reach("22", 50_791_377, whole_from=40_000_000) is None


@pytest.mark.parametrize(
    ("name", "build"),
    [("b37", "GRCh37"), ("hg19.fa", "GRCh37"), ("file:///x/hs37d5.fa", "GRCh37"), ("chr1.b38.gmap", "GRCh38"),
     ("GRCh38.p14", "GRCh38"), ("hg38_to_hg19", None), ("ab37", None), ("", None), (None, None)],
)  # fmt: skip
def test_build_names(name, build):
    assert genetic_map.build_of_name(name) == build


def test_real_maps(real_data):
    paths = sorted((real_data / "genomics" / "maps").rglob("*.gz"))
    assert len(paths) >= 6
    for path in paths:
        made = read_map(path)
        assert made.contig == Path(path).name.split(".")[0].removeprefix("chr")
        assert 40 < made.position_cm[-1] < 300
