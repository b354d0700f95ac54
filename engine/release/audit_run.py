"""From files to a verdict: `engine audit` and `engine nearest`, for panels and for scans alike.

Here the two modalities meet the modality-blind audit: a panel is haplotypes as bits, a folder of scans is features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine import provenance
from engine.atomic import atomic_folder, atomic_path
from engine.audit import AuditPolicy, AuditResult, Finding, Judge, Pool, audit, hash_files, write_audit
from engine.audit.controls import Planted, expected_verdict
from engine.audit.copies import Scores
from engine.audit.gates import LightJudge
from engine.audit.pools import check_alike
from engine.audit.protocol import STAGES
from engine.audit.store import check_sides, is_store, kind_in_words, read_people, read_store, with_people
from engine.errors import EngineError, InputError, UsageError
from engine.release.evaluation import genotype_section
from engine.release.images import internal_sections
from engine.release.report import Section, audit_sections, summary_of, write_report

Progress = Callable[[str, int, int], None]
PANEL_SUFFIXES = (".vcf", ".vcf.gz", ".bcf", ".pgen")


def modality(path: Path) -> str:
    """ "genotypes", "scans" or "store" (embeddings or bits), by what the path is called and holds.

    Raises:
        InputError: none of them.
    """
    if not path.exists():
        raise InputError("a panel, a table or folder of scans, or an embedding store", "nothing there", path)
    if is_store(path):
        return "store"
    if path.name.lower().endswith(PANEL_SUFFIXES):
        return "genotypes"
    if path.is_dir() or path.suffix.lower() == ".csv":
        return "scans"
    raise InputError(
        "a panel (.vcf.gz, .bcf, .pgen), a CSV or folder of scans, or a store (.safetensors)",
        f"'{path.name}'",
        path,
        "engine files check",
    )


def load_policy(path: Path | None) -> AuditPolicy:
    """Policy from YAML, or the documented default.

    Raises:
        UsageError: not a YAML mapping, an unknown key, or a value out of range.
    """
    from pydantic import ValidationError

    if path is None:
        return AuditPolicy()
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        return AuditPolicy.model_validate(values)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError("a YAML file", " ".join(str(error).split())[:160], path) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{'.'.join(map(str, first['loc'])) or 'policy'}: {first['msg']}", where=path) from None


def load_pools(
    train: Path,
    holdout: Path,
    synthetic: Path,
    *,
    policy: AuditPolicy | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[str, dict[str, Pool], Mapping[str, Pool | Planted], list[Judge]]:
    """(modality, pools by side, controls and judges that need the modality) of three inputs of one kind.

    Raises:
        InputError: the inputs are of different kinds or cannot be read.
    """
    paths = {"train": train, "holdout": holdout, "synthetic": synthetic}
    kinds = {name: modality(path) for name, path in paths.items()}
    if len(set(kinds.values()) - {"store"}) > 1:
        raise InputError("three inputs of one kind", ", ".join(f"{k}: {v}" for k, v in kinds.items()), "audit")
    if "store" in kinds.values():
        pools = _one_by_one(paths, kinds)
        return kind_in_words(pools["train"]), pools, {}, []
    if kinds["train"] == "genotypes":
        from engine.genomics.pools import audit_pools as panels

        pools, controls, judges = panels(train, holdout, synthetic, policy=policy, seed=seed)
        return "genotypes", pools, controls, judges
    from engine.imaging.pools import audit_pools as scans

    read: Any = scans(train, holdout, synthetic, seed=seed, progress=progress)
    return "scans", read[0], read[1], list(read[2]) if len(read) > 2 else []


def _one_by_one(paths: dict[str, Path], kinds: dict[str, str]) -> dict[str, Pool]:
    """Pools of sides that are stores, or stores beside panels or scans, each read as it stands.

    Mirrored views are dropped unless holdout and synthetic both have them, positions unless all sides do.
    """
    pools = {}
    for side, path in paths.items():
        if kinds[side] == "store":
            pools[side] = read_store(path, side)
        elif kinds[side] == "genotypes":
            from engine.genomics.panel import read_panel
            from engine.genomics.pools import haplotype_pool

            pools[side] = haplotype_pool(read_panel(path), str(path))
        else:
            from engine.imaging.commands import read_folder
            from engine.imaging.dataset import common_grid, fit_volume
            from engine.imaging.pools import scan_pool

            volumes, persons = read_folder(path)
            grid = common_grid(volumes, str(path))
            pools[side] = scan_pool([fit_volume(volume, grid) for volume in volumes], persons)
    check_alike(*pools.values())
    sites = [pool.position_bp for pool in pools.values()]
    if len({pool.length for pool in pools.values()}) > 1 or any(
        x is not None and y is not None and not np.array_equal(x, y) for x, y in pairwise(sites)
    ):
        raise InputError("the same sites on every side", "different ones", "audit")
    if any(position is None for position in sites):
        pools = {side: replace(pool, position_bp=None) for side, pool in pools.items()}
    views = [pool.views for side, pool in pools.items() if side != "train"]
    if any(view is None for view in views):
        pools = {side: replace(pool, views=None) for side, pool in pools.items()}
    return pools


def _named(pools: dict[str, Pool], judges: Sequence[Judge], table: Path) -> tuple[dict[str, Pool], list[Judge]]:
    """Pools with the persons and groups of a person table, and judges that still see the ids they were made with.

    Raises:
        InputError: a person on both sides, with the pairs of ids.
    """
    people = read_people(table)
    check_sides({side: pools[side].person for side in ("train", "holdout")}, people)
    named = {side: with_people(pool, people, side, required=side != "synthetic") for side, pool in pools.items()}

    def translated(judge: Judge) -> Judge:
        if isinstance(judge, LightJudge):  # made anew it sees the pools as they are named
            return replace(judge, judge=translated(judge.judge))

        def call(name: str, rows: Pool, scores: Scores) -> list[Finding]:
            ids = pools["synthetic"].person if name == "synthetic" else rows.person
            if expected_verdict(name) == "pass":  # a part of the holdout, in its order
                ids = pools["holdout"].person[np.isin(named["holdout"].person, rows.person)]
            return judge(name, replace(rows, person=ids), replace(scores, person_n=ids))

        return call

    return named, [translated(judge) for judge in judges]


def _model_scores(
    kind: str, model: Path, train: Path, holdout: Path, rules: AuditPolicy, seed: int, progress: Progress | None
) -> dict[str, tuple[Any, Any]]:
    """Scores of training people and of unseen people by the attacks that have the model, for `audit`.

    Raises:
        UsageError: the sides are stores, for which there is no such attack.
    """
    if kind == "genotypes":
        from engine.genomics.membership import member_scores as likelihood_ratio
        from engine.genomics.panel import read_panel

        found = likelihood_ratio(
            model, read_panel(train), read_panel(holdout), people=rules.membership_people, seed=seed
        )
        return {"model_likelihood": (found.member_s, found.nonmember_s)}
    if kind == "scans":
        from engine.imaging.membership import member_scores as losses

        return losses(model, train, holdout, seed=seed, progress=progress)
    raise UsageError("panels or tables of scans beside --model", kind, "--model", "leave --model out")


def audit_files(
    train: str | Path,
    holdout: str | Path,
    synthetic: str | Path,
    out: str | Path,
    *,
    policy: str | Path | None = None,
    people: str | Path | None = None,
    model: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Audit files and write `audit.json`, `report.html` and `provenance.json` into the new folder `out`.

    Args:
        train, holdout, synthetic: panels, tables or folders of scans, or embedding stores (`engine.audit.store`).
        policy: YAML with thresholds; configs/audit/default.yaml holds the defaults.
        people: person table that maps sample ids or subjects to people and groups, and may name the side of each.
        model: run folder of the generator: adds the membership attack that has the model. For models that leave the
            building with the data.

    Returns:
        {"modality", "verdict", "reasons", "findings", "controls", "out", "report"}, JSON-ready.

    Raises:
        InputError: an input cannot be used, or people are on both sides. UsageError: `out` exists, or a bad policy.
    """
    result, kind = run_audit(
        Path(train),
        Path(holdout),
        Path(synthetic),
        Path(out),
        policy=policy,
        people=people,
        model=model,
        seed=seed,
        progress=progress,
    )
    made = result.to_json()
    return {
        "modality": kind,
        "verdict": made["verdict"],
        "reasons": made["reasons"],
        "findings": made["findings"],
        "controls": made["controls"],
        "out": str(out),
        "report": str(Path(out) / "report.html"),
    }


def run_audit(
    train: Path,
    holdout: Path,
    synthetic: Path,
    out: Path,
    *,
    policy: str | Path | None = None,
    people: str | Path | None = None,
    model: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[AuditResult, str]:
    """As `audit_files`, returning the result itself and the modality, for callers that put it into a larger report."""
    if out.exists():
        raise UsageError("a folder that does not exist yet", "an existing one", out, "another --out, or remove it")
    rules = load_policy(None if policy is None else Path(policy))
    for path in (train, holdout, synthetic):
        modality(path)
    audited = hash_files(synthetic)
    kind, pools, controls, judges = load_pools(train, holdout, synthetic, policy=rules, seed=seed, progress=progress)
    if people is not None:
        pools, judges = _named(pools, judges, Path(people))
    attacks = None if model is None else _model_scores(kind, Path(model), train, holdout, rules, seed, progress)
    said = 0

    def tell(line: str) -> None:
        nonlocal said
        said += 1
        if progress is not None:
            progress(f"audit of {kind}", min(said, STAGES), STAGES)

    result = audit(
        pools["train"],
        pools["holdout"],
        pools["synthetic"],
        controls=controls,
        policy=rules,
        seed=seed,
        progress=tell,
        judges=judges,
        model_scores=attacks,
    )
    if progress is not None:
        progress(f"audit of {kind}", STAGES, STAGES)
    with atomic_folder(out) as folder:
        write_audit(result, folder, audited=audited)
        write_report(
            folder / "report.html",
            title=f"Audit of synthetic {kind}",
            verdict=result.verdict,
            reasons=result.reasons,
            summary=summary_of(result.findings),
            sections=[
                *audit_sections(result),
                *_likeness(kind, holdout, synthetic, seed),
                *internal_sections(kind, result, pools, train, synthetic, seed),
            ],
            facts={"commit": provenance.commit()["commit"], "seed": seed},
        )
        provenance.write(folder, "audit", config=rules.model_dump(mode="json"), inputs=[synthetic], seed=seed)
    return result, kind


def _likeness(kind: str, holdout: Path, synthetic: Path, seed: int) -> list[Section]:
    """Internal: LD decay, principal components and spectrum of a synthetic panel beside unseen people."""
    if kind != "genotypes":
        return []
    from engine.genomics.evaluate import evaluate
    from engine.genomics.panel import read_panel

    try:
        made = evaluate(read_panel(holdout), read_panel(synthetic), seed=seed, intersect=True)
    except EngineError as error:
        return [Section("How near to unseen people", f"Not drawn: {error.expected}.")]
    return [genotype_section(made.findings, made.figures, "How near to unseen people")]


def nearest_table(
    query: str | Path, database: str | Path, out: str | Path, *, k: int = 1, exclude_self: bool = False
) -> dict[str, Any]:
    """Write the k nearest database rows of every query row as TSV: query, rank, neighbour, distance.

    Haplotypes are named SAMPLE_0 and SAMPLE_1 and compared by the number of sites that differ; scans are compared by the
    copy detector's Euclidean distance, 0 to 2. Ties go to the row that comes first.

    Raises:
        InputError: the two are of different kinds, sites or grids. UsageError: `out` exists.
    """
    from engine.audit.pools import topk

    query, database, out = Path(query), Path(database), Path(out)
    if out.exists():
        raise UsageError("a file that does not exist yet", "an existing one", out, "another --out, or remove it first")
    kinds = modality(query), modality(database)
    if kinds[0] != kinds[1]:
        raise InputError("a query and a database of one kind", " and ".join(kinds), "nearest")
    sides: list[Pool]
    if kinds[0] == "store":
        sides = [read_store(query), read_store(database)]
    elif kinds[0] == "genotypes":
        from engine.genomics.matching import common_sites
        from engine.genomics.panel import read_panel
        from engine.genomics.pools import haplotype_pool

        panels = [read_panel(query), read_panel(database)]
        chosen = common_sites({"query": panels[0].sites, "database": panels[1].sites})
        sides = [haplotype_pool(panel.select(sites=site_l)) for panel, site_l in zip(panels, chosen, strict=True)]
    else:
        from engine.imaging.commands import read_folder
        from engine.imaging.dataset import common_grid, fit_volume
        from engine.imaging.embedding import embed

        read = [read_folder(query), read_folder(database)]
        grid = common_grid(read[0][0], "nearest")
        sides = [
            Pool("features", embed([fit_volume(v, grid) for v in volumes]), np.array(persons, dtype=str))
            for volumes, persons in read
        ]
    own = np.arange(len(sides[0]), dtype=np.int64)
    other = np.arange(len(sides[1]), dtype=np.int64)
    distance_nk, index_nk = topk(sides[0], sides[1], k, exclude=(own, other) if exclude_self else None)
    names = [_row_names(side) for side in sides]
    with atomic_path(out) as partial, open(partial, "w", encoding="utf-8") as stream:
        stream.write("query\trank\tneighbour\tdistance\n")
        for row, (distances, indices) in enumerate(zip(distance_nk, index_nk, strict=True)):
            for rank, (distance, index) in enumerate(zip(distances, indices, strict=True), start=1):
                if index >= 0:
                    stream.write(f"{names[0][row]}\t{rank}\t{names[1][index]}\t{distance:.6g}\n")
    return {
        "kind": kinds[0],
        "query_rows": len(sides[0]),
        "database_rows": len(sides[1]),
        "k": k,
        "median_nearest": float(np.median(distance_nk[:, 0])) if len(distance_nk) else None,
        "out": str(out),
    }


def _row_names(pool: Pool) -> list[str]:
    """Person id and, where a person has several rows, the number of the row."""
    seen: dict[str, int] = {}
    names = []
    for person in pool.person.tolist():
        at = seen[person] = seen.get(person, -1) + 1
        names.append(f"{person}_{at}")
    return names
