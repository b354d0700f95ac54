"""What an entry's samples are worth: fidelity against people nobody trained on, and the audit against the training side.

Both modalities give the same shape: a list of findings, the audit's verdict with its findings and controls, n, and the
content hash of the samples. Evaluation and audit themselves are the engine's ordinary ones. Samples that cannot be used
raise InputError; that this becomes a row of the table is left to `run`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from engine.audit import AuditPolicy, AuditResult, Finding, audit
from engine.audit.protocol import audit_prepared, prepare
from engine.benchmark.sides import Sides, grid_of, panel_sha256, volumes_sha256
from engine.benchmark.tracks import Track
from engine.errors import EngineError, InputError

# The draws by which an audit measures itself, its power and its rate of convicting honest sets, take most of its time and say
# nothing of an entrant: they are left out of scores. Every gate and control is the default one.
POLICY = AuditPolicy(honest_repeats=0, contamination_repeats=1)
LEFT_OUT = ("power_at_contamination", "audit_false_positive_rate")
EXTRACTORS = "shape components and intensity quantiles of engine.imaging.evaluate, fitted on the training side"


@dataclass(frozen=True)
class Score:
    """Findings of one entry.

    Attributes:
        content_sha256: of alleles or voxels.
        n: units on every side that were compared.
        extractor: name and weight hash of what made features of scans; None for genotypes.
        audit: {"verdict", "findings", "controls"}.
    """

    content_sha256: str
    n: dict[str, int]
    findings: list[dict[str, Any]]
    audit: dict[str, Any]
    extractor: dict[str, str] | None


def score(track: Track, sides: Sides, samples: Path) -> Score:
    """Score the samples at `samples`.

    Raises:
        InputError: they cannot be read, are of other sites or another grid, or are not as many as the track asks for.
    """
    return _score_panel(track, sides, samples) if track.modality == "genotypes" else _score_scans(track, sides, samples)


def content_sha256(track: Track, samples: Path) -> str:
    """Content hash of samples, as `score` reports it."""
    if track.modality == "genotypes":
        from engine.genomics.panel import read_panel

        return panel_sha256(read_panel(samples))
    from engine.imaging.commands import read_folder

    assert track.scans is not None
    return volumes_sha256(read_folder(samples, track.scans.modality)[0])


def _score_panel(track: Track, sides: Sides, samples: Path) -> Score:
    from engine.genomics.evaluate import evaluate
    from engine.genomics.panel import read_panel
    from engine.genomics.pools import audit_pools

    panel = read_panel(samples)
    if panel.n_samples != track.samples:
        raise InputError(f"{track.samples} people", str(panel.n_samples), "samples")
    train, test = (read_panel(sides.side(side)) for side in ("train", "test"))
    made = evaluate(test, panel, train=train, seed=track.evaluation_seed)

    def judge() -> AuditResult:
        pools, controls, judges = audit_pools(sides.side("train"), sides.side("test"), samples)
        return audit(
            pools["train"], pools["holdout"], pools["synthetic"], controls=controls, policy=POLICY,
            seed=track.evaluation_seed, judges=judges,
        )  # fmt: skip

    judged = _audit(judge)
    n = {"train": train.n_haplotypes, "test": test.n_haplotypes, "samples": panel.n_haplotypes, "sites": panel.n_sites}
    return Score(panel_sha256(panel), n, _plain(made.findings), _audited(judged), None)


def _score_scans(track: Track, sides: Sides, samples: Path) -> Score:
    from engine.imaging.commands import read_folder
    from engine.imaging.dataset import common_grid
    from engine.imaging.evaluate import evaluate
    from engine.imaging.pools import synthetic_pool

    assert track.scans is not None
    modality = track.scans.modality
    made, people = read_folder(samples, modality)
    if len(made) != track.samples:
        raise InputError(f"{track.samples} scans", str(len(made)), "samples")
    grid = grid_of(track)
    for volume in made:
        if volume.shape_dhw != grid.size or not np.allclose(volume.spacing_mm, track.scans.spacing_mm, rtol=0.01):
            wanted = f"scans of {grid.size} voxels of {grid.spacing_mm} mm"
            raise InputError(wanted, f"{volume.shape_dhw} of {volume.spacing_mm}", "samples")
        if not np.isfinite(volume.array_cdhw).all():
            raise InputError("finite intensities", "NaN or infinity", "samples")
    (test, test_people), (fresh, _), (train, train_people) = (
        read_folder(sides.side(side), modality) for side in ("test", "fresh", "train")
    )
    evaluated = evaluate(
        test, made, reference=fresh, train=train, real_persons=test_people, train_persons=train_people,
        seed=track.evaluation_seed,
    )  # fmt: skip
    seed = track.evaluation_seed

    def judge() -> AuditResult:
        # as the audit reads them: a grid without the track's word on the modality
        volumes, _ = read_folder(samples)
        real, prepared = _real_scans(sides.folder, common_grid(volumes, "audit").model_dump_json(), seed)
        pool, knowing = synthetic_pool(real, volumes, people, seed=seed)
        return audit_prepared(prepared, pool, judges=[knowing])

    judged = _audit(judge)
    n = {"train": len(train), "test": len(test), "fresh": len(fresh), "samples": len(made)}
    extractor = {"name": EXTRACTORS, "sha256": extractor_sha256(track, train)}
    return Score(volumes_sha256(made), n, _plain(evaluated.findings), _audited(judged), extractor)


@lru_cache(maxsize=1)
def _real_scans(folder: Path, grid: str, seed: int) -> tuple[Any, Any]:
    """Both real sides of a split on a grid, searched, with their controls judged: the same for every entry of a track."""
    from engine.imaging.config import DataConfig
    from engine.imaging.pools import real_sides, synthetic_pool

    real = real_sides(folder / "train", folder / "test", DataConfig.model_validate_json(grid), seed=seed)
    _, judge = synthetic_pool(real, [], [], seed=seed)
    prepared = prepare(
        real.pools["train"], real.pools["holdout"], controls=real.controls, policy=POLICY, seed=seed, judges=[judge]
    )
    return real, prepared


def _audit(judge: Callable[[], AuditResult]) -> AuditResult:
    """The audit's result; what it refuses is said without who it found, which goes into records."""
    try:
        return judge()
    except EngineError as error:
        raise InputError(f"an audit that can be made: {error.expected}") from None


def extractor_sha256(track: Track, train: list[Any]) -> str:
    """Hash of the shape extractor's weights, read off from what it makes of the unit vectors."""
    from engine.imaging.evaluate import _shape_extractor, profile

    coarse_nv = profile(train, grid_of(track)).coarse_nv
    shape_of, _, _ = _shape_extractor(coarse_nv)
    unit_vv = np.vstack([np.zeros(coarse_nv.shape[1]), np.eye(coarse_nv.shape[1])])
    return hashlib.sha256(np.ascontiguousarray(shape_of(unit_vv), dtype="<f4").tobytes()).hexdigest()


def _plain(findings: list[Finding]) -> list[dict[str, Any]]:
    """Findings as JSON without the curves they were drawn from."""
    return [{key: value for key, value in finding.to_json().items() if key != "detail"} for finding in findings]


def _audited(result: AuditResult) -> dict[str, Any]:
    controls = [{"name": c.name, "expected": c.expected, "verdict": c.verdict} for c in result.controls]
    findings = [finding for finding in result.findings if finding.name not in LEFT_OUT]
    return {"verdict": result.verdict, "findings": _plain(findings), "controls": controls}
