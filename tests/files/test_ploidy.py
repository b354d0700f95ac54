"""Ploidy on X: every spelling of a man's call, the two builds' bounds, and what does not fit together."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest

from engine.errors import InputError
from engine.files import ploidy
from engine.files.vcf import read_vcf
from engine.genomics.panel import read_panel, write_panel

POSITIONS = [1_000_000, 2_699_520, 2_699_521, 50_000_000, 154_931_043, 154_931_044, 155_200_000]
OUTSIDE = [False, False, True, True, True, False, False]  # GRCh37
# two women, then two men: by site
CALLS = [
    ["0|1", "1|0", "0|1", "1|1"],
    ["1|1", "0|0", "1|0", "0|1"],
    ["0|1", "0|0", "1", "0"],
    ["1|1", "0|1", "0", "1"],
    ["0|0", "1|0", "1", "1"],
    ["0|1", "0|1", "1|0", "0|0"],
    ["1|0", "1|1", "0|0", "0|1"],
]


def text(calls=CALLS, positions=POSITIONS, header="##contig=<ID=X,length=155270560>", contig="X") -> str:
    lines = [
        "##fileformat=VCFv4.2",
        *([header] if header else []),
        '##FORMAT=<ID=GT,Number=1,Type=String,Description="g">',
    ]
    lines.append(
        "\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", "w1", "w2", "m1", "m2"])
    )
    for position, row in zip(positions, calls):
        lines.append("\t".join([contig, str(position), ".", "A", "C", ".", ".", ".", "GT", *row]))
    return "\n".join(lines) + "\n"


def spelt(spelling) -> list[list[str]]:
    return [[call if "|" in call else spelling(call) for call in row] for row in CALLS]


@pytest.mark.parametrize("spelling", [lambda a: a, lambda a: f"{a}/.", lambda a: f"{a}|."], ids=["0", "0/.", "0|."])
def test_every_spelling_of_one_allele_is_one_panel(tmp_path, spelling):
    (tmp_path / "x.vcf").write_text(text(spelt(spelling)))
    panel = read_panel(tmp_path / "x.vcf")
    assert panel.hemizygous[0].tolist() == OUTSIDE
    assert panel.hemizygous[1].tolist() == [False, False, True, True]
    assert panel.samples.sex.tolist() == ["female", "female", "male", "male"]
    expected = [[[*cell.split("|"), "255"][:2] for cell in row] for row in CALLS]
    np.testing.assert_array_equal(panel.alleles_nl(), np.array(expected, dtype=np.uint8).reshape(7, 8).T)
    assert panel.notes == ("2 men have one allele at 3 sites of X outside PAR (GRCh37)",)


def test_a_man_written_as_homozygote_is_known_by_his_sex(tmp_path):
    (tmp_path / "x.vcf").write_text(text(spelt(lambda a: f"{a}|{a}")))
    (tmp_path / "s.tsv").write_text("sample\tpop\tgender\nw1\tA\tfemale\nw2\tA\tF\nm1\tA\t1\nm2\tA\tmale\n")
    told = read_panel(tmp_path / "x.vcf", samples_tsv=tmp_path / "s.tsv")
    (tmp_path / "y.vcf").write_text(text())
    np.testing.assert_array_equal(told.alleles_nl(), read_panel(tmp_path / "y.vcf").alleles_nl())
    assert read_panel(tmp_path / "x.vcf").hemizygous is None  # three sites say nothing of a person of unknown sex


def test_without_any_site_inside_par_a_man_owns_one_haplotype(tmp_path):
    (tmp_path / "x.vcf").write_text(text(CALLS[2:5], POSITIONS[2:5]))
    panel = read_panel(tmp_path / "x.vcf")
    assert panel.samples.first_haplotype.tolist() == [0, 2, 4, 5, 6]
    assert panel.hemizygous is None
    assert panel.missing_lw is None
    (tmp_path / "d.vcf").write_text(
        text([[a if "|" in a else f"{a}|{a}" for a in row] for row in CALLS[2:5]], POSITIONS[2:5])
    )
    (tmp_path / "s.tsv").write_text("sample\tgroup\tsex\nw1\tA\tF\nw2\tA\tF\nm1\tA\tM\nm2\tA\tM\n")
    same = read_panel(tmp_path / "d.vcf", samples_tsv=tmp_path / "s.tsv")
    np.testing.assert_array_equal(same.alleles_nl(), panel.alleles_nl())


@pytest.mark.parametrize("suffix", [".vcf.gz", ".bcf", ".pgen"])
def test_what_is_written_is_read_again_and_taken_by_the_tools(tmp_path, suffix):
    (tmp_path / "x.vcf").write_text(text())
    panel = read_panel(tmp_path / "x.vcf")
    path = tmp_path / f"made{suffix}"
    write_panel(panel, path)
    again = read_panel(path)
    np.testing.assert_array_equal(again.alleles_nl(), panel.alleles_nl())
    assert again.hemizygous[0].tolist() == OUTSIDE
    assert set(again.sites.contig) == {"X"}
    if suffix != ".pgen":
        told = subprocess.run(
            ["bcftools", "query", "-f", "[%GT ]%INFO/AN\n", path], capture_output=True, text=True, check=True
        )
        rows = [line.rsplit(" ", 1) for line in told.stdout.splitlines()]
        assert [row[0].split() for row in rows] == CALLS
        assert [int(row[1]) for row in rows] == [6 if outside else 8 for outside in OUTSIDE]
    else:
        assert [line.split()[0] for line in (tmp_path / "made.pvar").read_text().splitlines() if line[0] != "#"] == [
            "PAR1", "PAR1", "X", "X", "X", "PAR2", "PAR2"
        ]  # fmt: skip
        plink = ["plink2", "--pfile", tmp_path / "made", "--freq", "counts", "--out", tmp_path / "f"]
        told = subprocess.run(plink, capture_output=True, text=True, check=True)
        assert "Warning" not in told.stdout + told.stderr
        counts = [line.split()[-2:] for line in (tmp_path / "f.acount").read_text().splitlines()[1:]]
        assert [int(n) for _, n in counts] == [6 if outside else 8 for outside in OUTSIDE]
        alleles = panel.alleles_nl()
        assert [int(c) for c, _ in counts] == [int((alleles[:, site] == 1).sum()) for site in range(7)]


def test_filesets_of_plink_with_men_on_one_contig(tmp_path):
    """As `plink2 --vcf` makes them without --split-par: contig X throughout, men told by the .psam."""
    (tmp_path / "x.vcf").write_text(text())
    panel = read_panel(tmp_path / "x.vcf")
    write_panel(panel, tmp_path / "made.pgen")
    pvar = tmp_path / "made.pvar"
    pvar.write_text(pvar.read_text().replace("PAR1\t", "X\t").replace("PAR2\t", "X\t"))
    np.testing.assert_array_equal(read_panel(tmp_path / "made.pgen").alleles_nl(), panel.alleles_nl())


def test_the_bounds_of_the_two_builds():
    position = np.array(
        [2_699_520, 2_699_521, 2_781_479, 2_781_480, 154_931_043, 154_931_044, 155_701_382, 155_701_383]
    )
    contig = np.full(8, "chrX")
    assert ploidy.outside_par(contig, position, "GRCh37").tolist() == [
        False,
        True,
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert ploidy.outside_par(contig, position, "GRCh38").tolist() == [
        False,
        False,
        False,
        True,
        True,
        True,
        True,
        False,
    ]
    assert not ploidy.outside_par(np.full(8, "PAR1"), position, "GRCh37").any()


def test_a_build_that_is_not_stated_is_told_by_the_men(tmp_path):
    (tmp_path / "x.vcf").write_text(text(header=None))
    panel = read_panel(tmp_path / "x.vcf")  # one allele at 2,699,521: GRCh37
    assert panel.hemizygous[0].tolist() == OUTSIDE
    assert panel.assembly == "GRCh37"
    (tmp_path / "y.vcf").write_text(text([CALLS[0], CALLS[3]], [1_000_000, 50_000_000], header=None))
    assert read_panel(tmp_path / "y.vcf").assembly is None
    assert read_panel(tmp_path / "y.vcf").hemizygous[0].tolist() == [False, True]
    women = [[row[0], row[1], row[0], row[1]] for row in CALLS]
    (tmp_path / "z.vcf").write_text(text(women, header=None))
    with pytest.raises(InputError, match=r"both of GRCh37 and GRCh38 fits.*reheader"):
        read_panel(tmp_path / "z.vcf")


@pytest.mark.parametrize(
    ("calls", "header", "why"),
    [
        (CALLS, "##contig=<ID=X,length=156040895>", r"outside PAR \(GRCh38\), got heterozygotes of 'm1' \(2 people"),
        (
            [["0|1", "0|1", "1", "0|1"], *CALLS[1:]],
            "##contig=<ID=X,length=155270560>",
            r"two alleles inside PAR \(GRCh37\), got one, of 'm1'",
        ),
        ([["0|1", "0|1", "1", "0|1"], *CALLS[1:]], None, "neither of GRCh37 and GRCh38"),
        (
            [*CALLS[:3], ["1|1", "0|1", "0|1", "1"], *CALLS[4:]],
            "##contig=<ID=X,length=155270560>",
            "heterozygotes of 'm1'",
        ),
    ],
)
def test_calls_that_do_not_fit_the_build_are_refused(tmp_path, calls, header, why):
    (tmp_path / "x.vcf").write_text(text(calls, header=header))
    with pytest.raises(InputError, match=why):
        read_panel(tmp_path / "x.vcf")


def test_calls_that_do_not_fit_the_sex_are_refused(tmp_path):
    (tmp_path / "x.vcf").write_text(text())
    table = "sample\tgroup\tsex\nw1\tA\t{}\nw2\tA\tF\nm1\tA\t{}\nm2\tA\tM\n"
    (tmp_path / "s.tsv").write_text(table.format("F", "F"))
    with pytest.raises(InputError, match=r"two alleles of women on X outside PAR \(GRCh37\).*'m1' \(1 people\)"):
        read_panel(tmp_path / "x.vcf", samples_tsv=tmp_path / "s.tsv")
    (tmp_path / "s.tsv").write_text(table.format("M", "M"))
    with pytest.raises(InputError, match=r"one allele of men.*heterozygotes of 'w1'.*fixploidy"):
        read_panel(tmp_path / "x.vcf", samples_tsv=tmp_path / "s.tsv")


def test_real_x(real_data):
    """1000 Genomes phase 3: men are written `0/.` outside PAR; the panel's own table says who they are."""
    path = real_data / "genomics/genomewide_1126/1KG_phase3_subset_chrX.vcf.gz"
    table = real_data / "genomics/panel/integrated_call_samples_v3.20130502.ALL.panel"
    panel = read_panel(path, samples_tsv=table)
    np.testing.assert_array_equal(panel.hemizygous[1], panel.samples.sex == "male")
    assert 500 < panel.hemizygous[1].sum() < 600
    raw = read_vcf(path)
    assert (raw.bits_lw == panel.bits_lw).all()
    assert (panel.sites.alt_index > 0).sum() > 30  # split multiallelics and indels come along
    assert sum(len(ref) > 1 for ref in panel.sites.ref) > 30
