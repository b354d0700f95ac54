"""From a panel as it was read to one that a model may copy from: phased, complete, of chromosomes that recombine.

Unphased genotypes are refused with the command that phases them. A man's second haplotype on X, which is there inside
PAR only, is left out (`sex_chromosomes`). Single missing alleles are filled by the copying model itself: the target's
alleles around the gap say whom it resembles, and those say what is missing. Panels with large gaps are refused with the
command that imputes them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.errors import InputError
from engine.genomics import li_stephens, sex_chromosomes
from engine.genomics.li_stephens import LiStephensConfig
from engine.genomics.matching import common_sites, of_person
from engine.genomics.panel import HaplotypePanel
from engine.kernels import bits, haplotype_hmm

MOST_MISSING, MOST_MISSING_AT_A_SITE = 0.1, 0.5
_CELLS = 1 << 24  # expected alleles held at one time
_PASSES = 2  # the second copies from donors whose own gaps the first has filled


def as_reference(
    panel: HaplotypePanel, config: LiStephensConfig | None = None, *, where: object = ""
) -> HaplotypePanel:
    """A phased and complete panel of whole haplotypes; what was left out or filled is in its `notes`.

    Args:
        config: settings of the copying model that fills gaps. where: the file, for messages and their commands.

    Raises:
        InputError: unphased heterozygotes, sites of Y or mitochondria, a site twice, more than a tenth of all alleles
            missing, or half of those of one site.
    """
    sex_chromosomes.refuse_uncopied(panel, where)
    if not panel.phased:
        raise _unphased(panel, where)
    common_sites({str(where) or "panel": panel.sites})  # a site listed twice would be found in scoring only
    whole = sex_chromosomes.complete(panel)
    if whole.missing_lw is None or not whole.missing_lw.any():
        return replace(whole, missing_lw=None)
    return filled(whole, config, where=where)


def filled(panel: HaplotypePanel, config: LiStephensConfig | None = None, *, where: object = "") -> HaplotypePanel:
    """`panel` with its missing alleles replaced by their likeliest value under the Li-Stephens model of the other
    people.

    Each haplotype with gaps is a mosaic of all haplotypes but those of its own person; a missing allele becomes ALT
    where the posterior of copying one is above one half. Where a donor has a gap itself, the commoner allele of its
    group stands in.

    Raises:
        InputError: as `as_reference`.
    """
    assert panel.missing_lw is not None
    n = panel.n_haplotypes
    missing_l = bits.popcount_rows(panel.missing_lw)
    total, share = int(missing_l.sum()), float(missing_l.sum() / max(1, n * panel.n_sites))
    worst = int(np.argmax(missing_l))
    if missing_l[worst] > MOST_MISSING_AT_A_SITE * n:
        sites = int((missing_l > MOST_MISSING_AT_A_SITE * n).sum())
        at = f"{panel.sites.contig[worst]}:{panel.sites.position_bp[worst]}"
        raise InputError(
            "sites called in at least half of the haplotypes",
            f"{missing_l[worst]} of {n} missing at {at} ({sites} such sites)", where,
            f"bcftools view -i 'F_MISSING<={MOST_MISSING_AT_A_SITE}' -Ob -o kept.bcf {where}".strip(),
        )  # fmt: skip
    if share > MOST_MISSING:
        raise InputError(
            f"at most {MOST_MISSING:.0%} of alleles missing", f"{share:.1%} ({total})", where,
            f"imputing it: java -jar beagle.jar gt={where or 'PANEL'} out=imputed",
        )  # fmt: skip
    made = replace(panel, bits_lw=_with_common_alleles(panel), missing_lw=None)
    missing_nw = bits.transpose(panel.missing_lw, n)
    gaps = np.flatnonzero(missing_nw.any(axis=1))
    own_ne = of_person(panel.samples.first_haplotype)[gaps]
    size = max(1, min(128, _CELLS // panel.n_sites))
    plain = (config or LiStephensConfig()).model_copy(update={"learn_rounds": 0, "mix": None})
    for _ in range(_PASSES):
        model, alleles_nw = li_stephens.fit(made, plain), made.haplotype_major()
        for begin in range(0, len(gaps), size):
            chosen = gaps[begin : begin + size]
            target_nl = bits.unpack(alleles_nw[chosen], panel.n_sites)
            missing_nl = bits.unpack(missing_nw[chosen], panel.n_sites).astype(bool)
            target_nl[missing_nl] = 255
            sums = haplotype_hmm.posterior_sums(
                model.bits_lw, model.k, target_nl, model.switch_l(), model.mismatch_l,
                exclude_ne=own_ne[begin : begin + size],
            )  # fmt: skip
            target_nl[missing_nl] = (sums.dosage_nl > 0.5)[missing_nl]
            alleles_nw[chosen] = bits.pack(target_nl)
        made = replace(made, bits_lw=bits.transpose(alleles_nw, panel.n_sites))
    note = (
        f"{total} missing alleles ({share:.2%}) were filled with the copying model; an imputation tool with a reference panel, "
        "e.g. Beagle, knows more"
    )
    return replace(made, notes=(*panel.notes, note))


def _with_common_alleles(panel: HaplotypePanel) -> np.ndarray:
    """bits_lw with missing alleles replaced by the commoner allele of the haplotype's group at that site."""
    assert panel.missing_lw is not None
    made_lw = panel.bits_lw.copy()
    groups = list(panel.groups().values()) or [np.arange(panel.n_haplotypes)]
    rows = np.flatnonzero(panel.missing_lw.any(axis=1))
    for at in range(0, len(rows), 1024):
        block = rows[at : at + 1024]
        allele_ln = bits.unpack(np.ascontiguousarray(made_lw[block]), panel.n_haplotypes)
        missing_ln = bits.unpack(np.ascontiguousarray(panel.missing_lw[block]), panel.n_haplotypes).astype(bool)
        for members in groups:
            called_l = (~missing_ln[:, members]).sum(axis=1)
            common_l = 2 * (allele_ln[:, members] * ~missing_ln[:, members]).sum(axis=1) > called_l
            allele_ln[:, members] = np.where(missing_ln[:, members], common_l[:, None], allele_ln[:, members])
        made_lw[block] = bits.pack(allele_ln)
    return made_lw


def _unphased(panel: HaplotypePanel, where: object) -> InputError:
    """The refusal, with the people whose calls are unphased where the file still says who they are."""
    contig = str(panel.sites.contig[0])
    phase = (
        f"phase_common --input {where or 'PANEL'} --region {contig} --map MAP --output phased.bcf (SHAPEIT5), or "
        f"java -jar beagle.jar gt={where or 'PANEL'} out=phased"
    )
    who: list[str] = []
    path = Path(str(where))
    if str(where) and path.suffix != ".pgen" and path.is_file():
        from engine.files.vcf_cyvcf2 import unphased_samples

        who = unphased_samples(path)
    if not who:
        return InputError("a phased panel", "unphased heterozygotes", where, phase)
    some = ", ".join(who[:3]) + (", ..." if len(who) > 3 else "")
    got = f"unphased heterozygotes of {len(who)} of {panel.n_samples} people ({some})"
    if len(who) <= max(1, panel.n_samples // 10):
        without = ",".join(who[:10]) + (",..." if len(who) > 10 else "")
        phase = f"bcftools view -s ^{without} -Ob -o phased.bcf {where}, or {phase}"
    return InputError("a phased panel", got, where, phase)
