"""Phenotypes by the additive liability model: causal alleles with effects, a polygenic score, a liability, cases and
controls.

Of person i with x_ij copies of the ALT allele at causal site j, whose frequency in the reference panel is p_j:

    score_i     = sum_j effect_j (x_ij - 2 p_j)            scaled so that its variance in the reference panel is h2
    liability_i = score_i + covariates_i + noise_i         noise normal, with what is left of a variance of 1
    case        where the liability is above the normal quantile of 1 - prevalence

Effects drawn here are normal per standardised genotype: effect_j = b_j (2 p_j (1 - p_j))^(alpha / 2) with alpha = -1
(Yang et al., Nature Genetics 42:565, 2010); alpha = 0 gives effects per allele that do not depend on frequency. LD
between causal sites counts: the score is scaled as a whole. The threshold model is Falconer's (Annals of Human
Genetics 29:51, 1965). X outside PAR carries no causal sites. A `Trait` holds sites, effects and variances, so that
other panels, synthetic ones too, get the same trait.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import ndtri

from engine import atomic, seeding
from engine.errors import InputError, UsageError, closest
from engine.files import delimited, ploidy
from engine.files.genetic_map import plain_contig
from engine.genomics.matching import site_keys
from engine.genomics.panel import HaplotypePanel
from engine.kernels import bits

SCHEMA = "engine.trait/1"


@dataclass(frozen=True)
class Trait:
    """An additive trait.

    Attributes:
        contig, id, ref, alt: lists of C causal sites; position_bp: list of C.
        effect_c: float64 (C,), change of the liability per ALT allele, in its standard deviations.
        frequency_c: float64 (C,), ALT frequency in the panel that it was made on.
        heritability: variance of the score there, of a liability of variance 1.
        prevalence: share of cases, or None for a quantitative trait.
        covariate_effect: change of the liability per standard deviation of each covariate.
    """

    contig: list[str]
    position_bp: list[int]
    id: list[str]
    ref: list[str]
    alt: list[str]
    effect_c: np.ndarray
    frequency_c: np.ndarray
    heritability: float
    prevalence: float | None = None
    covariate_effect: dict[str, float] | None = None

    @property
    def threshold(self) -> float:
        """Liability above which a person is a case; inf without a prevalence."""
        return float("inf") if self.prevalence is None else float(ndtri(1 - self.prevalence))

    @property
    def noise_sd(self) -> float:
        """Standard deviation of what neither score nor covariates explain."""
        explained = self.heritability + sum(effect**2 for effect in (self.covariate_effect or {}).values())
        return float(np.sqrt(max(0.0, 1 - explained)))

    @property
    def sha256(self) -> str:
        """Hash of everything that the trait is."""
        values = {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in asdict(self).items()
        }
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def keys(self) -> list[tuple[str, int, str, str]]:
        """(contig without chr, position, REF, ALT) of each causal site."""
        return [(plain_contig(c), p, r, a) for c, p, r, a in zip(self.contig, self.position_bp, self.ref, self.alt)]

    def rows(self, sites: object, where: object = "") -> np.ndarray:
        """int64 (C,): the causal sites in a table of sites.

        Raises:
            InputError: one of them is not there.
        """
        place = {key: at for at, key in enumerate(site_keys(sites))}  # type: ignore[arg-type]
        absent = [key for key in self.keys() if key not in place]
        if absent:
            raise InputError(
                f"the {len(self.contig)} causal sites of the trait",
                "no {}:{} {}>{}".format(*absent[0]) + f" ({len(absent)} absent)", where,
                "a panel of the same build and region as the trait's",
            )  # fmt: skip
        return np.array([place[key] for key in self.keys()], dtype=np.int64)

    def score(self, dosage_sc: np.ndarray) -> np.ndarray:
        """float64 (S,): polygenic scores of people with these ALT dosages (S, C); NaN counts as the frequency."""
        # row by row: a matrix product may round a person's score by who else is in the matrix
        above_sc = np.nan_to_num(np.ascontiguousarray(dosage_sc) - 2 * self.frequency_c, nan=0.0)
        return np.add.reduce(above_sc * self.effect_c, axis=1)

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        atomic.write_json(path, {"schema": SCHEMA, **asdict(self)})


@dataclass(frozen=True)
class Phenotypes:
    """Of S people: ids; score_s, liability_s float64 (S,); case_s bool (S,), None for a quantitative trait; covariates
    by name."""

    ids: list[str]
    score_s: np.ndarray
    liability_s: np.ndarray
    case_s: np.ndarray | None
    covariates: dict[str, np.ndarray]

    def take(self, index: np.ndarray) -> Phenotypes:
        """The people `index`, int64, in this order."""
        return Phenotypes(
            [self.ids[k] for k in index],
            self.score_s[index],
            self.liability_s[index],
            None if self.case_s is None else self.case_s[index],
            {name: values[index] for name, values in self.covariates.items()},
        )


def load_trait(path: str | Path) -> Trait:
    """Read what `Trait.save` wrote.

    Raises:
        InputError: another file.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        values["effect_c"] = np.array(values["effect_c"], dtype=np.float64)
        values["frequency_c"] = np.array(values["frequency_c"], dtype=np.float64)
        return Trait(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as fault:
        got = "no such file" if isinstance(fault, FileNotFoundError) else "another file"
        raise InputError("a trait that `engine genomics phenotype` wrote", got, path) from None


def draw_trait(
    panel: HaplotypePanel,
    *,
    causal: int = 100,
    heritability: float = 0.5,
    prevalence: float | None = None,
    covariate_effect: dict[str, float] | None = None,
    min_maf: float = 0.01,
    alpha: float = -1.0,
    seed: int = 0,
) -> Trait:
    """A trait with `causal` sites drawn among those of `panel` whose rarer allele has at least the frequency `min_maf`.

    Raises:
        UsageError: variances that do not fit into 1, a prevalence outside (0, 1), or more causal sites than there are.
    """
    frequency_l, usable_l = _frequencies(panel)
    rarer_l = np.minimum(frequency_l, 1 - frequency_l)
    eligible = np.flatnonzero(usable_l & (rarer_l >= max(min_maf, 1e-12)))
    if not 1 <= causal <= len(eligible):
        raise UsageError(f"1 to {len(eligible)} causal sites (of frequency >= {min_maf:g})", str(causal), "--causal")
    rng = seeding.generator(seed, "genomics.phenotype.effects")
    site_c = np.sort(rng.choice(eligible, causal, replace=False))
    p_c = frequency_l[site_c]
    effect_c = rng.standard_normal(causal) * (2 * p_c * (1 - p_c)) ** (alpha / 2)
    return _scaled(panel, site_c, effect_c, p_c, heritability, prevalence, covariate_effect)


def trait_from_effects(
    panel: HaplotypePanel,
    path: str | Path,
    *,
    heritability: float | None = None,
    prevalence: float | None = None,
    covariate_effect: dict[str, float] | None = None,
) -> Trait:
    """A trait with the sites and effects of a table: `id`, or contig, position (and ref, alt); `beta`; optionally `a1`,
    the allele.

    Effects are per copy of `a1` (ALT where it is not given), in standard deviations of the liability. With
    `heritability` they are scaled to it; without, their score's variance in the panel is the heritability.

    Raises:
        InputError: a table without these columns, a site that the panel lacks or has twice, an allele of neither kind.
    """
    site_c, effect_c = _read_effects(panel, path)
    p_c = _frequencies(panel)[0][site_c]
    return _scaled(panel, site_c, effect_c, p_c, heritability, prevalence, covariate_effect)


def dosage_sc(panel: HaplotypePanel, site_c: np.ndarray) -> np.ndarray:
    """float64 (S, C): ALT alleles of each person at sites `site_c`; NaN where one of them is missing; twice a haploid's
    one."""
    first = panel.samples.first_haplotype[:-1]
    allele_cn = bits.unpack(np.ascontiguousarray(panel.bits_lw[site_c]), panel.n_haplotypes).astype(np.float64)
    if panel.missing_lw is not None:
        missing_cn = bits.unpack(np.ascontiguousarray(panel.missing_lw[site_c]), panel.n_haplotypes).astype(bool)
        allele_cn[missing_cn] = np.nan
    made_cs = np.add.reduceat(allele_cn, first, axis=1) if len(site_c) else np.zeros((0, len(first)))
    return (made_cs * (2 / np.diff(panel.samples.first_haplotype))).T


def simulate(
    panel: HaplotypePanel,
    trait: Trait,
    *,
    covariates: dict[str, np.ndarray] | None = None,
    seed: int = 0,
) -> Phenotypes:
    """Phenotypes of all people of `panel`; the noise of the k-th person depends on the seed and k.

    Args:
        covariates: values float64 (S,) by name, of all that the trait has effects of; they are standardised within the
        panel.

    Raises:
        InputError: a causal site that the panel lacks. UsageError: a covariate of the trait that is not given.
    """
    score_s = trait.score(dosage_sc(panel, trait.rows(panel.sites)))
    shift_s = np.zeros(panel.n_samples)
    for name, effect in (trait.covariate_effect or {}).items():
        if covariates is None or name not in covariates:
            raise UsageError(f"values of the covariate '{name}'", "none", "--covariates")
        value_s = covariates[name]
        spread = float(value_s.std())
        shift_s += effect * (value_s - value_s.mean()) / (spread if spread > 0 else 1.0)
    return phenotypes(
        trait, panel.samples.ids, score_s, noise(trait, range(panel.n_samples), seed) + shift_s, covariates
    )


def noise(trait: Trait, people: Sequence[int], seed: int, *, with_covariates: bool = False) -> np.ndarray:
    """float64 (n,): the liability of people with these numbers beside their score; covariates are drawn with it where
    asked."""
    drawn = [seeding.generator(seed, "genomics.phenotype.noise", k).standard_normal() for k in people]
    sd = float(np.sqrt(1 - trait.heritability)) if with_covariates else trait.noise_sd
    return sd * np.array(drawn)


def phenotypes(
    trait: Trait,
    ids: Sequence[str],
    score_s: np.ndarray,
    beside_s: np.ndarray,
    covariates: dict[str, np.ndarray] | None = None,
) -> Phenotypes:
    """Phenotypes of people with these scores and what else is in their liability."""
    liability_s = score_s + beside_s
    case_s = None if trait.prevalence is None else liability_s > trait.threshold
    return Phenotypes(list(ids), score_s, liability_s, case_s, dict(covariates or {}))


def ascertained(made: Phenotypes, case_fraction: float, *, people: int | None = None, seed: int = 0) -> np.ndarray:
    """int64, rising: the largest choice of people (or `people` of them) with this fraction of cases; who is left is
    drawn.

    Raises:
        UsageError: a quantitative trait, a fraction outside [0, 1], or too few cases or controls for what is asked.
    """
    if made.case_s is None or not 0 <= case_fraction <= 1:
        raise UsageError(
            "a case fraction of 0 to 1 for a trait with --prevalence", str(case_fraction), "--case-fraction"
        )
    cases, controls = np.flatnonzero(made.case_s), np.flatnonzero(~made.case_s)
    most = int(
        min(
            len(cases) / case_fraction if case_fraction else np.inf,
            len(controls) / (1 - case_fraction) if case_fraction < 1 else np.inf,
        )
    )
    wanted = most if people is None else people
    n_cases = round(wanted * case_fraction)
    if wanted < 1 or n_cases > len(cases) or wanted - n_cases > len(controls):
        raise UsageError(
            f"{n_cases} cases and {wanted - n_cases} controls", f"{len(cases)} and {len(controls)} in the panel",
            "--case-fraction",
            f"--people {most}" if most else "a larger panel, or synthetic people (engine genomics sample --phenotype)",
        )  # fmt: skip
    rng = seeding.generator(seed, "genomics.phenotype.ascertainment")
    chosen = [rng.permutation(cases)[:n_cases], rng.permutation(controls)[: wanted - n_cases]]
    return np.sort(np.concatenate(chosen))


def write_phenotypes(made: Phenotypes, path: str | Path) -> None:
    """Write a table that plink2 reads: #IID, PHENO (2 case, 1 control, or the liability), LIABILITY, PRS,
    covariates."""
    names = list(made.covariates)
    lines = ["\t".join(["#IID", "PHENO", "LIABILITY", "PRS", *names])]
    for s, name in enumerate(made.ids):
        pheno = f"{made.liability_s[s]:.8g}" if made.case_s is None else "2" if made.case_s[s] else "1"
        more = [f"{made.covariates[each][s]:.8g}" for each in names]
        lines.append("\t".join([name, pheno, f"{made.liability_s[s]:.8g}", f"{made.score_s[s]:.8g}", *more]))
    atomic.write_text(path, "\n".join(lines) + "\n")


def join_phenotypes(paths: Sequence[Path], out: str | Path) -> None:
    """Write the people of several tables of equal columns, in order, into one."""
    lines: list[str] = []
    for path in paths:
        header, *rows = path.read_text(encoding="utf-8").splitlines()
        lines = lines if lines else [header]
        if header != lines[0]:
            raise InputError(f"columns {lines[0]}", header, path)
        lines += rows
    atomic.write_text(out, "\n".join(lines) + "\n")


def write_effects(trait: Trait, path: str | Path) -> None:
    """Write the causal sites for reading and for `plink2 --score FILE 5 7 9 header`: CHROM, POS, REF, ALT, ID, FREQ,
    A1, ..., BETA."""
    lines = ["#CHROM\tPOS\tREF\tALT\tID\tFREQ\tA1\tBETA_SD\tBETA"]
    for c in range(len(trait.contig)):
        p, effect = float(trait.frequency_c[c]), float(trait.effect_c[c])
        cells = [
            trait.contig[c], str(trait.position_bp[c]), trait.ref[c], trait.alt[c], trait.id[c], f"{p:.6g}", trait.alt[c],
            f"{effect * np.sqrt(2 * p * (1 - p)):.8g}", f"{effect:.8g}",
        ]  # fmt: skip
        lines.append("\t".join(cells))
    atomic.write_text(path, "\n".join(lines) + "\n")


def read_covariates(path: str | Path, wanted: Sequence[str], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns `names` of a table (first column the sample) for the `wanted` people, float64 (S,) each.

    Raises:
        InputError: an absent column or person, or a value that is no number.
    """
    header, lines = delimited.read(path)
    rows = {row[0]: row for row in lines if row}
    made: dict[str, np.ndarray] = {}
    for name in names:
        if name not in header[1:]:
            raise InputError(f"a column '{name}'", ", ".join(header[1:]), path, closest(name, header[1:] or ["none"]))
        at = header.index(name)
        values = np.empty(len(wanted))
        for s, person in enumerate(wanted):
            try:
                values[s] = float(rows[person][at])
            except (KeyError, IndexError, ValueError):
                raise InputError(f"a number in '{name}' for every person", f"none for '{person}'", path) from None
            if not np.isfinite(values[s]):
                raise InputError(f"a finite '{name}'", str(values[s]), f"{path}, {person}")
        made[name] = values
    return made


def _frequencies(panel: HaplotypePanel) -> tuple[np.ndarray, np.ndarray]:
    """ALT frequency among called alleles, float64 (L,), and where it may be causal, bool (L,): not on X outside PAR."""
    called_l = np.full(panel.n_sites, panel.n_haplotypes)
    if panel.missing_lw is not None:
        called_l = called_l - bits.popcount_rows(panel.missing_lw)
    usable_l = called_l > 0
    x_l = ploidy.is_x(panel.sites.contig)
    usable_l &= ~x_l if panel.hemizygous is None else ~panel.hemizygous[0]
    return bits.popcount_rows(panel.bits_lw) / np.maximum(called_l, 1), usable_l


def _scaled(
    panel: HaplotypePanel,
    site_c: np.ndarray,
    effect_c: np.ndarray,
    p_c: np.ndarray,
    heritability: float | None,
    prevalence: float | None,
    covariate_effect: dict[str, float] | None,
) -> Trait:
    s = panel.sites
    trait = Trait(
        [str(each) for each in s.contig[site_c]], [int(each) for each in s.position_bp[site_c]],
        [str(each) for each in s.id[site_c]], [str(each) for each in s.ref[site_c]], [str(each) for each in s.alt[site_c]],
        effect_c, p_c, 0.0, prevalence, dict(covariate_effect or {}) or None,
    )  # fmt: skip
    variance = float(trait.score(dosage_sc(panel, site_c)).var())
    if not variance > 0:
        raise InputError("causal sites at which the panel varies", "none", "phenotype")
    h2 = variance if heritability is None else heritability
    of_covariates = sum(effect**2 for effect in (covariate_effect or {}).values())
    if not 0 <= h2 <= 1 or h2 + of_covariates > 1:
        got = f"heritability {h2:.3g} and covariates {of_covariates:.3g}"
        raise UsageError(
            "variances of at most 1 together", got, "phenotype", "--heritability, which scales the effects"
        )
    if prevalence is not None and not 0 < prevalence < 1:
        raise UsageError("a prevalence between 0 and 1", str(prevalence), "--prevalence")
    return replace(trait, effect_c=effect_c * np.sqrt(h2 / variance), heritability=float(h2))


def _read_effects(panel: HaplotypePanel, path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the panel and effects per ALT allele, in the order of sites."""
    names, cells = delimited.read(path)
    header = [name.lower() for name in names]
    column = lambda *names: next((header.index(name) for name in names if name in header), None)  # noqa: E731
    id_at, beta_at, allele_at = column("id", "snp"), column("beta", "effect"), column("a1", "allele", "effect_allele")
    contig_at, position_at = column("contig", "chrom", "chr"), column("position", "pos", "bp")
    ref_at, alt_at = column("ref"), column("alt")
    if beta_at is None or (id_at is None and (contig_at is None or position_at is None)):
        raise InputError("columns id (or contig and position) and beta", ", ".join(header), path)
    by_place = contig_at is not None and position_at is not None
    place: dict[object, list[int]] = {}
    for at, key in enumerate(site_keys(panel.sites)):
        place.setdefault(key[:2] if by_place else str(panel.sites.id[at]), []).append(at)
    usable_l = _frequencies(panel)[1]
    found: dict[int, float] = {}
    for number, row in enumerate(cells, start=2):
        if not row:
            continue
        where = f"{path}, line {number}"
        try:
            wanted: object = row[id_at] if id_at is not None else None
            if contig_at is not None and position_at is not None:
                wanted = (plain_contig(row[contig_at]), int(row[position_at]))
            beta = float(row[beta_at])
            allele = row[allele_at] if allele_at is not None else None
            named = [row[at] for at in (ref_at, alt_at) if at is not None]
        except (ValueError, IndexError):
            raise InputError("a site and an effect", "\t".join(row)[:60], where) from None
        rows = place.get(wanted, [])
        if len(named) == 2:
            rows = [at for at in rows if [panel.sites.ref[at], panel.sites.alt[at]] == named]
        elif allele is not None and len(rows) > 1:
            rows = [at for at in rows if panel.sites.alt[at] == allele]
        if len(rows) != 1 or rows[0] in found or not np.isfinite(beta):
            got = "none" if not rows else "several" if len(rows) > 1 else "one twice, or no finite effect"
            raise InputError(
                "one site of the panel", f"{got} for '{wanted}'", where, "columns ref and alt" if len(rows) > 1 else ""
            )
        at = rows[0]
        if not usable_l[at]:
            raise InputError("causal sites on autosomes and inside PAR, called in somebody", f"'{wanted}'", where)
        if allele not in (None, panel.sites.alt[at], panel.sites.ref[at]):
            raise InputError(f"allele {panel.sites.ref[at]} or {panel.sites.alt[at]}", f"'{allele}'", where)
        found[at] = -beta if allele == panel.sites.ref[at] else beta
    if not found:
        raise InputError("at least one causal site", "none", path)
    site_c = np.array(sorted(found), dtype=np.int64)
    return site_c, np.array([found[at] for at in site_c.tolist()])
