"""Institutions on one machine, from shards by person to a verdict of each: what docs/federated.md measures, on your own data.

    cd examples/federated
    python two_sites.py shard --scans volumes.csv --panel train.bcf --samples samples.tsv --out SITES
    python two_sites.py run SITES --config hippocampus.yaml --out RUN
    python two_sites.py sample RUN/common --public SITES/public.bcf --out MADE
    python two_sites.py audit SITES/north MADE --out AUDIT/north
    python two_sites.py central SITES RUN/common --config hippocampus.yaml --out RUN/central.json

`run` starts a SuperLink and a SuperNode for each folder of SITES as processes on loopback, over TLS (`loopback.py`). Between
institutions each has its own folder already and starts its own SuperNode; `sample` is for whoever averages, `audit` for each
site. `central` needs everybody's data in one place, which a federation does without: it measures what that costs.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from engine.errors import EngineError, GateRefused, UsageError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)
Out = Annotated[Path, typer.Option("--out", help="A new folder or file.")]
Seed = Annotated[int, typer.Option("--seed")]


@app.command()
def shard(
    out: Out,
    scans: Annotated[Path | None, typer.Option(help="Table of scans with a column `subject`.")] = None,
    panel: Annotated[Path | None, typer.Option(help="Phased panel.")] = None,
    samples: Annotated[Path | None, typer.Option(help="TSV: sample, group.")] = None,
    sites: Annotated[str, typer.Option(help="Names, separated by commas.")] = "north,south",
    holdout: Annotated[float, typer.Option(help="Share of each site's people that it keeps out.")] = 0.4,
    public: Annotated[float, typer.Option(help="Share of the panel's people that belong to no site.")] = 0.02,
    seed: Seed = 0,
) -> None:
    """Deal people out to sites of equal size: SITES/NAME/{volumes,train,holdout}.csv, {train,unseen}.bcf, samples.tsv."""
    names = sites.split(",")
    out.mkdir(parents=True)
    for name in names:
        (out / name).mkdir()
    made: dict[str, Any] = {name: {} for name in names}
    if scans is not None:
        _shard_scans(scans, out, names, holdout, seed, made)
    if panel is not None:
        _shard_panel(panel, samples, out, names, holdout, public, seed, made)
    print(json.dumps(made))


def _shard_scans(table: Path, out: Path, names: list[str], holdout: float, seed: int, made: dict[str, Any]) -> None:
    from engine import seeding

    with table.open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))
    people = sorted({row["subject"] for row in rows})
    order = [people[k] for k in seeding.generator(seed, "federated.shards").permutation(len(people))]
    for row in rows:
        for column in ("image", "label"):
            if row.get(column):
                row[column] = str((table.parent / row[column]).resolve())
    for k, name in enumerate(names):
        own = order[k :: len(names)]
        kept_out = set(own[: round(holdout * len(own))])
        mine = [
            {**row, "split": "holdout" if row["subject"] in kept_out else "train"}
            for row in rows
            if row["subject"] in set(own)
        ]
        sides = {side: [row for row in mine if row["split"] == side] for side in ("train", "holdout")}
        for file, chosen in (("volumes", mine), *sides.items()):
            with (out / name / f"{file}.csv").open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(mine[0]))
                writer.writeheader()
                writer.writerows(chosen)
        made[name]["scans"] = {side: len(chosen) for side, chosen in sides.items()}
        made[name]["people with scans"] = {"train": len(own) - len(kept_out), "holdout": len(kept_out)}


def _shard_panel(
    path: Path, samples: Path | None, out: Path, names: list[str], holdout: float, public: float, seed: int,
    made: dict[str, Any],
) -> None:  # fmt: skip
    from engine.genomics.panel import read_panel, write_panel
    from engine.genomics.split import held_out

    left = read_panel(path, samples_tsv=samples)
    groups = ["all"] if left.samples.group is None else sorted(set(left.samples.group.tolist()))
    nobodys = held_out(left, public, seed)
    write_panel(left.select(samples=nobodys), out / "public.bcf")
    (out / "groups.txt").write_text(",".join(groups))
    left = left.select(samples=~nobodys)
    for k, name in enumerate(names):
        chosen = held_out(left, 1 / (len(names) - k), seed + 1 + k)
        own, left = left.select(samples=chosen), left.select(samples=~chosen)
        unseen = held_out(own, holdout, seed)
        write_panel(own.select(samples=~unseen), out / name / "train.bcf")
        write_panel(own.select(samples=unseen), out / name / "unseen.bcf")
        if own.samples.group is not None:
            lines = [f"{who}\t{group}" for who, group in zip(own.samples.ids, own.samples.group)]
            (out / name / "samples.tsv").write_text("\n".join(["sample\tgroup", *lines]) + "\n")
        made[name]["people with genotypes"] = {"train": int((~unseen).sum()), "holdout": int(unseen.sum())}


def _names(sites: Path) -> list[str]:
    found = sorted(path.name for path in sites.iterdir() if path.is_dir())
    if len(found) < 2:
        raise UsageError("a folder of two sites or more", f"{len(found)}", sites, "two_sites.py shard")
    return found


@app.command()
def run(
    sites: Path,
    out: Out,
    config: Annotated[Path | None, typer.Option(help="YAML of a run; no scans without it.")] = None,
    rounds_autoencoder: int = 6,
    rounds_flow: int = 8,
    local_steps: int = 20,
    round_timeout: float = 1800.0,
) -> None:
    """A SuperLink and one SuperNode per folder of SITES; prints what left each site, by stage."""
    from loopback import copy_of_app, federation

    out.mkdir(parents=True)
    out, sites, names = out.resolve(), sites.resolve(), _names(sites)
    settings: dict[str, object] = {"sites": len(names), "least-sites": len(names), "round-timeout": round_timeout}
    if config is not None:
        settings |= {"config": str(config.resolve()), "rounds-autoencoder": rounds_autoencoder, "rounds-flow": rounds_flow,
                     "local-steps": local_steps}  # fmt: skip
    if (sites / "public.bcf").is_file():
        settings |= {"variants": str(sites / "public.bcf"), "groups": (sites / "groups.txt").read_text()}
    files = {"scans": "volumes.csv", "panel": "train.bcf", "unseen": "unseen.bcf", "samples": "samples.tsv"}
    with federation(out / "processes") as running:
        for name in names:
            own = {key: str(sites / name / file) for key, file in files.items() if (sites / name / file).is_file()}
            running.node(name, {**own, "cache": str(sites / name / "fitted"), "sent": str(out / f"sent-{name}.jsonl")})
        limit = round_timeout * (rounds_autoencoder + rounds_flow + 6)
        running.run(copy_of_app(out / "app"), out / "common", settings, limit)
    print(json.dumps({name: left(out / f"sent-{name}.jsonl") for name in names}, indent=2))


def left(sent: Path) -> dict[str, dict[str, int]]:
    """What left a site, from its own list: by stage, replies, arrays in each, their numbers and bytes in all."""
    made: dict[str, dict[str, int]] = defaultdict(lambda: {"replies": 0, "arrays": 0, "bytes": 0, "figures": 0})
    for line in map(json.loads, sent.read_text().splitlines()):
        at = made[line["stage"]]
        at["replies"] += 1
        at["arrays"] = max(at["arrays"], len(line["arrays"]))
        at["bytes"] += sum(array["bytes"] for array in line["arrays"].values())
        at["figures"] += len(line["figures"])
    return dict(made)


@app.command()
def sample(
    common: Path,
    out: Out,
    public: Annotated[Path | None, typer.Option(help="The panel whose variants the federation agreed on.")] = None,
    scans: Annotated[int, typer.Option(help="Volumes to make.")] = 80,
    people: Annotated[int, typer.Option(help="People with genotypes to make.")] = 800,
    seed: Seed = 0,
) -> None:
    """What the common models make: MADE/scans and MADE/haplotypes.bcf, which every site audits."""
    out.mkdir(parents=True)
    if (common / "scans").is_dir():
        from engine.imaging.commands import sample_command

        sample_command(common / "scans", scans, out / "scans", seed=seed)
    if (common / "haplotypes.npz").is_file():
        from engine.genomics.federated import chain_of
        from engine.genomics.panel import read_panel, write_panel

        if public is None:
            raise UsageError("the panel of the agreed variants", "none", "--public")
        with np.load(common / "haplotypes.npz", allow_pickle=False) as held:
            total = {name: held[name] for name in held.files}
        groups = (public.parent / "groups.txt").read_text().split(",")
        write_panel(chain_of(total, read_panel(public), groups).sample(people, seed=seed), out / "haplotypes.bcf")


@app.command()
def audit(
    site: Path,
    made: Path,
    out: Out,
    policy: Annotated[Path | None, typer.Option(help="YAML with thresholds, as `engine audit`.")] = None,
    seed: Seed = 0,
) -> None:
    """`engine audit` of MADE against this site's own people; exits 3 unless every verdict is a pass."""
    from engine.release.audit_run import audit_files

    out.mkdir(parents=True)
    verdicts = {}
    for kind, train, unseen, synthetic in (
        ("scans", "train.csv", "holdout.csv", "scans"),
        ("haplotypes", "train.bcf", "unseen.bcf", "haplotypes.bcf"),
    ):
        if not (made / synthetic).exists() or not (site / train).is_file():
            continue
        result = audit_files(site / train, site / unseen, made / synthetic, out / kind, policy=policy, seed=seed)
        verdicts[kind] = result["verdict"]
        print(json.dumps({"site": site.name, "kind": kind, "verdict": result["verdict"], "reasons": result["reasons"]}))
    if not verdicts:
        raise UsageError("scans or haplotypes at this site and in what was made", "neither", site)
    if wrong := [kind for kind, verdict in verdicts.items() if verdict != "pass"]:
        raise GateRefused("a pass by this site's people", ", ".join(f"{k}: {verdicts[k]}" for k in wrong), site)


@app.command()
def central(
    sites: Path,
    common: Path,
    out: Out,
    config: Annotated[Path, typer.Option(help="YAML of the run.")],
    rounds_autoencoder: int = 6,
    rounds_flow: int = 8,
    local_steps: int = 20,
    draws: Annotated[int, typer.Option(help="Of noise and time for each unseen scan.")] = 8,
) -> None:
    """As many steps on all people in one place, on batches as large as all sites' together, and at the first site alone.

    Losses are of the same unseen scans of all sites, with the same draws; the flow's on the common autoencoder's latents, so
    that they are losses of one thing. Intervals: 1.96 standard errors over people.
    """
    from engine.imaging.config import load_config, parse_config
    from engine.imaging.dataset import read_table
    from engine.imaging.federated import Local, ScanSite
    from engine.training import checkpoint

    names, agreed = _names(sites), load_config(str(config))
    tables = [read_table(sites / name / "volumes.csv", agreed.data) for name in names]
    unseen = [row for table in tables for row in table if not row.train]
    values = agreed.model_dump(mode="json")
    for stage in ("autoencoder", "flow"):
        values[stage]["batch_size"] *= len(names)
    larger = parse_config(values)
    local = Local(steps=local_steps)
    everybody = ScanSite(larger, "", "all", local, rows=[row for table in tables for row in table])
    alone = ScanSite(agreed, "", names[0], local, rows=[*(row for row in tables[0] if row.train), *unseen])
    parts, _ = checkpoint.load(common / "scans")
    federated = {
        stage: {name: tensor.numpy() for name, tensor in parts[part].items()}
        for stage, part in (("autoencoder", "autoencoder"), ("flow", "denoiser"))
    }
    everybody.stage = alone.stage = "data"
    sums = everybody.local_stats()
    everybody.set_stats(sums)
    alone.set_stats(sums)
    subject = np.array([row.subject for row in everybody.holdout])
    result: dict[str, Any] = {"unseen": {"scans": len(subject), "people": len(set(subject.tolist()))}}
    for stage, rounds in (("autoencoder", rounds_autoencoder), ("flow", rounds_flow)):
        if stage == "flow":  # on the latents that the federation had
            for site in (everybody, alone):
                site.stage = "autoencoder"
                site.set_state(federated["autoencoder"])
            everybody.stage = alone.stage = "latents"
            sums = everybody.local_stats()
            everybody.set_stats(sums)
            alone.set_stats(sums)
        losses = {}
        everybody.stage = alone.stage = stage
        losses["before"] = everybody.losses(draws)
        for name, site in (("central", everybody), (f"{names[0]} alone", alone)):
            for number in range(rounds):
                site.set_state(site.fit(number))
            losses[name] = site.losses(draws)
        everybody.set_state(federated[stage])
        losses["federated"] = everybody.losses(draws)
        result[stage] = {name: mean_of(loss_b, subject) for name, loss_b in losses.items()}
        for name in ("central", f"{names[0]} alone"):
            result[stage][f"federated - {name}"] = mean_of(losses["federated"] - losses[name], subject)
    out.write_text(json.dumps(result, indent=2))
    print(json.dumps(result, indent=2))


def mean_of(loss_b: np.ndarray, subject_b: np.ndarray) -> dict[str, float]:
    """Mean over people of each person's mean, and 1.96 standard errors."""
    each = np.array([loss_b[subject_b == who].mean() for who in sorted(set(subject_b.tolist()))])
    return {"mean": float(each.mean()), "interval": float(1.96 * each.std(ddof=1) / len(each) ** 0.5)}


if __name__ == "__main__":
    try:
        app(standalone_mode=True)
    except EngineError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
