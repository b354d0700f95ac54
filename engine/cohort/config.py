"""What the embedded cohort is made of: sizes, and every coefficient of its generating model, with its source.

These numbers *are* the known truth, against which a synthetic cohort is judged (`engine.cohort.truth`); docs/cohort.md
gives the equations. They are of the order reported in the literature but chosen for a small cohort: effects are
somewhat stronger and person-to-person scatter somewhat smaller than in life, so that some 240 people suffice to see
them.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GenotypeConfig(_Strict):
    """The stretch of genome that is simulated; demography of Gutenkunst et al. 2009 (see `genotypes.demography`)."""

    windows: int = Field(default=8, ge=1, description="sequenced stretches of the chromosome, as of a gene panel")
    window_bp: int = Field(default=200_000, ge=50_000, description="length of each")
    gap_bp: int = Field(
        default=5_000_000,
        ge=0,
        description="unsequenced distance between them; near enough unlinked that chance relatives share few of them",
    )
    gap_rate: float = Field(default=1e-8, gt=0, description="recombination per bp per generation in the gaps")
    offset_bp: int = Field(
        default=5_000_000, ge=0, description="position of its first base minus one, on a pseudo-contig"
    )
    contig: str = "sim19"
    contig_length: int = Field(default=60_000_000, description="length of the pseudo-contig; no assembly has this one")
    assembly: str = "simulated"
    mutation_rate: float = Field(
        default=2.35e-8, gt=0, description="per bp per generation; the rate the demography was fitted with"
    )
    recombination_rate: float = Field(default=0.3e-8, gt=0, description="per bp per generation outside hotspots")
    hotspot_every_bp: int = Field(
        default=55_000, gt=0, description="mean distance between hotspots (McVean et al. 2004)"
    )
    hotspot_width_bp: int = Field(default=2_000, gt=0)
    hotspot_fold: float = Field(default=80.0, ge=1, description="mean intensity of a hotspot over the background")
    min_maf: float = Field(
        default=0.01, ge=0, lt=0.5, description="sites under this minor allele frequency over all people go"
    )
    groups: tuple[str, ...] = ("AFR", "EUR", "EAS")
    shares: tuple[float, ...] = (0.3, 0.4, 0.3)

    @property
    def length_bp(self) -> int:
        """Length of the simulated chromosome, windows and gaps."""
        return self.windows * self.window_bp + (self.windows - 1) * self.gap_bp

    @property
    def window_starts(self) -> list[int]:
        """First position of each window, from 0."""
        return [i * (self.window_bp + self.gap_bp) for i in range(self.windows)]

    @model_validator(mode="after")
    def _check(self) -> GenotypeConfig:
        if set(self.groups) - {"AFR", "EUR", "EAS"} or len(set(self.groups)) != len(self.groups):
            raise ValueError("groups must be among AFR, EUR, EAS, each once")
        if len(self.shares) != len(self.groups) or abs(sum(self.shares) - 1) > 1e-9:
            raise ValueError("one share per group is needed and they must sum to 1")
        if self.offset_bp + self.length_bp > self.contig_length:
            raise ValueError("the region must lie inside the pseudo-contig")
        return self


class DiseaseConfig(_Strict):
    """Logistic model of the diagnosis AD (against CN), and the loci that move it."""

    log_odds_at_70: float = Field(
        default=-1.3,
        description="AD against CN at 70, woman, no ALT allele at any locus: a memory clinic's, not a population's",
    )
    log_odds_per_decade: float = Field(
        default=0.7, description="incidence doubles about every 5 to 6 years; shallower among attenders"
    )
    log_odds_male: float = -0.2
    locus_log_odds: tuple[float, ...] = Field(
        default=(1.2, 0.35, -0.35),
        description="per ALT allele; the first is of the size of APOE e4 (odds ratio about 3.3 per copy)",
    )
    locus_names: tuple[str, ...] = ("LARGE1", "SMALL1", "SMALL2")
    locus_frequency: tuple[float, ...] = Field(
        default=(0.3, 0.35, 0.4),
        description="target ALT frequency; the nearest common variant in its third of the region is taken",
    )

    @model_validator(mode="after")
    def _check(self) -> DiseaseConfig:
        if not len(self.locus_log_odds) == len(self.locus_names) == len(self.locus_frequency) >= 1:
            raise ValueError(
                "locus_log_odds, locus_names and locus_frequency need one entry per locus, and one locus at least"
            )
        return self


class PeopleConfig(_Strict):
    """Recruitment and visits. Age is recruited from a truncated normal, independently of everything else."""

    age_mean: float = 70.0
    age_sd: float = Field(default=9.0, gt=0)
    age_low: float = 50.0
    age_high: float = 90.0
    male: float = Field(default=0.5, gt=0, lt=1)
    second_visit: float = Field(default=0.4, ge=0, le=1, description="probability for CN")
    second_visit_ad: float = Field(default=0.25, ge=0, le=1, description="probability for AD: fewer come back")
    interval_low_years: float = Field(default=1.0, gt=0)
    interval_high_years: float = Field(default=4.0, gt=0)
    holdout: float = Field(default=0.3, ge=0, lt=1, description="share of people set aside, balanced over groups")


class AnatomyConfig(_Strict):
    """Lateral ventricles (log-linear), head size, cortex. Volumes in mm3, ages in years, logs natural."""

    ventricle_mm3: float = Field(default=26_000.0, gt=0, description="CN woman of 70 with the average head")
    ventricle_log_per_year: float = Field(
        default=0.025, description="cross-sectional; and the mean own rate of CN between visits"
    )
    ventricle_log_ad: float = Field(
        default=0.35, description="AD against CN of the same age (Nestor et al. 2008: about 1.3 to 1.5 fold)"
    )
    ventricle_log_male: float = Field(default=0.15, description="men against women, whatever the head size")
    ventricle_log_sd: float = Field(
        default=0.20, ge=0, description="person to person; two to three times as large in life"
    )
    rate_log_ad: float = Field(
        default=0.035, description="added own rate per year with AD (Nestor et al. 2008: AD grows 2 to 3 times as fast)"
    )
    rate_log_sd: float = Field(default=0.008, ge=0)
    head_mm3: float = Field(default=1_450_000.0, gt=0, description="brain mask of a woman, mm3")
    head_log_male: float = Field(default=0.12, description="men have about 12 % larger heads")
    head_log_sd: float = Field(default=0.06, ge=0)
    sulci_log_per_decade: float = Field(
        default=0.10, description="widening of the sulci (log of their CSF volume) per decade after 50"
    )
    sulci_log_ad: float = 0.20
    shape_mm: float = Field(
        default=2.5, ge=0, description="root mean square displacement of the person's own deformation"
    )


class ScannerConfig(_Strict):
    """Grid and image quality; each visit is scanned anew."""

    shape: tuple[int, int, int] = (32, 40, 32)
    spacing_mm: float = Field(default=5.0, gt=0)
    noise: float = Field(default=0.02, ge=0, description="Rician sigma as a share of white matter")
    contrast_sd: float = Field(default=0.06, ge=0, description="sd of the log exponent of the intensity curve")
    bias_sd: float = Field(default=0.04, ge=0, description="sd of the log of the smooth bias field")
    gain: float = Field(default=1000.0, gt=0, description="white matter intensity, arbitrary units")
    gain_sd: float = Field(default=0.05, ge=0, description="sd of its log between scans")


class EmbeddedConfig(_Strict):
    """The whole embedded cohort; deterministic in `seed`.

    Scans and covariates of person k depend on (config, seed, k) and on the person's own genotypes; the genotypes of all
    people share one genealogy and therefore depend on `people` as well.
    """

    people: int = Field(default=240, ge=6)
    seed: int = 0
    genotypes: GenotypeConfig = GenotypeConfig()
    disease: DiseaseConfig = DiseaseConfig()
    recruitment: PeopleConfig = PeopleConfig()
    anatomy: AnatomyConfig = AnatomyConfig()
    scanner: ScannerConfig = ScannerConfig()
