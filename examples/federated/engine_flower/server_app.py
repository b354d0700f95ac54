"""Whoever averages: asks the sites, leaves out what is broken, and writes the common models. It holds no person's data.

Scans: sums of the data, rounds of the autoencoder, sums of the latents, rounds of the flow; `OUT/scans` is a run folder.
Haplotypes: one round of counts; `OUT/haplotypes.npz` holds their sums. `OUT/rounds.jsonl` says who took part in each round,
who was left out and why.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from engine.errors import EngineError
from engine.training.federated import Combined, Declared, Tensors, total, weighted_mean
from engine_flower.records import content, tensors_in

app = ServerApp()


class Sites:
    """The nodes of this run, asked together; a node that fails or is late has no reply."""

    def __init__(self, grid: Grid, settings: dict) -> None:
        self.grid, self.settings = grid, settings
        self.timeout, self.least = float(settings["round-timeout"]), int(settings["least-sites"])
        waited = time.monotonic()
        while len(nodes := sorted(grid.get_node_ids())) < int(settings["sites"]):
            if time.monotonic() - waited > self.timeout:
                raise EngineError(f"{settings['sites']} sites", str(len(nodes)), "federated", "start their SuperNodes")
            time.sleep(0.5)
        self.nodes = nodes
        self.out = Path(str(settings["out"]))
        self.out.mkdir(parents=True)

    def ask(self, kind: str, asked: dict, **records: Tensors) -> dict[str, Message | None]:
        """Replies by node; None of a node that gave none."""
        messages = [Message(content(asked, **records), node, kind) for node in self.nodes]
        replies: dict[str, Message | None] = {str(node): None for node in self.nodes}
        for reply in self.grid.send_and_receive(messages, timeout=self.timeout):
            if reply.has_content():
                replies[str(reply.metadata.src_node_id)] = reply
        return replies

    def arrays(self, kind: str, asked: dict, **records: Tensors) -> dict[str, Tensors | None]:
        """The arrays of every node's reply."""
        replies = self.ask(kind, asked, **records)
        return {node: None if r is None else tensors_in(r.content, "arrays") for node, r in replies.items()}

    def figures(self, asked: dict, **records: Tensors) -> dict[str, dict[str, float]]:
        """What every node measured on its unseen people."""
        replies = self.ask("evaluate", asked, **records)
        return {node: dict(r.content.metric_records["figures"]) for node, r in replies.items() if r is not None}

    def note(self, **entry: object) -> None:
        """One line of OUT/rounds.jsonl."""
        with (self.out / "rounds.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")

    def tell(self, asked: dict, made: Combined) -> None:
        """Who took part in a round."""
        self.note(stage=asked["stage"], round=asked["round"], used=made.used, refused=made.refused)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run: scans, haplotypes, or both."""
    settings = dict(context.run_config)
    sites = Sites(grid, settings)
    if settings["variants"]:
        haplotypes(sites, settings)
    if settings["config"]:
        scans(sites, settings)
    sites.note(done=True)


def haplotypes(sites: Sites, settings: dict) -> None:
    """Counts of all sites, summed."""
    from engine.genomics.federated import declared
    from engine.genomics.panel import read_panel

    groups = str(settings["groups"]).split(",")
    asked = {"task": "haplotypes", "stage": "haplotypes", "round": 0, "groups": ",".join(groups)}
    wanted = declared(read_panel(str(settings["variants"])).sites, groups)
    made = total(sites.arrays("query", asked), wanted, least_sites=sites.least)
    sites.tell(asked, made)
    np.savez(sites.out / "haplotypes.npz", **made.tensors)
    sites.note(stage="haplotypes", evaluated=sites.figures(asked, haplotypes=made.tensors))


def scans(sites: Sites, settings: dict) -> None:
    """All stages of `engine.imaging.federated`."""
    from engine.imaging.config import dump_config, load_config
    from engine.imaging.federated import check_config, covariates_of, first_state, stats_declared, write_run

    config = load_config(str(settings["config"]))
    check_config(config)
    asked = {
        "task": "scans", "config": dump_config(config), "local_steps": int(settings["local-steps"]),
        "optimizer": str(settings["optimizer"]), "round": 0,
    }  # fmt: skip
    known: dict[str, Tensors] = {}

    def summed(stage: str) -> Combined:
        made = total(
            sites.arrays("query", {**asked, "stage": stage}, **known),
            stats_declared(config, stage),
            least_sites=sites.least,
        )
        sites.tell({**asked, "stage": stage}, made)
        return made

    def averaged(stage: str, rounds: int, weights: dict[str, float]) -> Tensors:
        state = first_state(config, stage, covariates_of(config, known["data"]))
        wanted: Declared = {name: tuple(value.shape) for name, value in state.items()}
        for number in range(rounds):
            now = {**asked, "stage": stage, "round": number}
            replies = sites.arrays("train", now, **known, **{stage: state})
            try:
                made = weighted_mean(replies, weights, wanted, least_sites=sites.least)
            except EngineError as error:  # too few: the state stays, and the next round asks again
                sites.note(stage=stage, round=number, used=[], refused=str(error))
                continue
            sites.tell(now, made)
            state = made.tensors
        sites.note(stage=stage, evaluated=sites.figures({**asked, "stage": stage}, **known, **{stage: state}))
        return state

    replies = sites.arrays("query", {**asked, "stage": "data"})
    made = total(replies, stats_declared(config, "data"), least_sites=sites.least)
    sites.tell({**asked, "stage": "data"}, made)
    weights = {
        node: float(reply["scans"][0]) for node, reply in replies.items() if reply is not None and node in made.used
    }
    known["data"] = made.tensors
    rounds = {stage: int(settings[f"rounds-{stage}"]) for stage in ("autoencoder", "flow")}
    known["autoencoder"] = averaged("autoencoder", rounds["autoencoder"], weights)
    known["latents"] = summed("latents").tensors
    flow = averaged("flow", rounds["flow"], weights)
    write_run(sites.out / "scans", config, known["data"], known["latents"], known["autoencoder"], flow, rounds)
    sites.note(stage="weights", weights=weights)
