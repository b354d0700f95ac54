"""A site: answers what the server asks with sums and weights, checked against what was declared before they leave.

Flower starts a process for each message, so a site is set up anew each time from its own files and what the message brings. Its
files are named when its SuperNode is started and never leave:

    flower-supernode ... --node-config 'name="north" scans="volumes.csv" cache="fitted" panel="train.bcf" unseen="holdout.bcf"'

`samples` names groups of people, `config` a config that the server's must equal, and `sent` a file that gets one line for each
reply: the names, shapes and bytes of the arrays and the figures that left.
"""

from __future__ import annotations

import json
from pathlib import Path

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from engine.errors import InputError
from engine.training.federated import Site, Tensors, outgoing
from engine_flower.records import arrays, tensors_in

app = ClientApp()


def site_of(message: Message, context: Context) -> Site:
    """The adapter of this site at the stage that is asked for, with what the message brings set."""
    asked, here = message.content.config_records["asked"], context.node_config
    if asked["task"] == "haplotypes":
        from engine.genomics.federated import PanelSite
        from engine.genomics.panel import read_panel

        samples = str(here["samples"]) if here.get("samples") else None
        train, unseen = (
            read_panel(str(here[name]), samples_tsv=samples) if here.get(name) else None for name in ("panel", "unseen")
        )
        if train is None:
            raise InputError("a panel at this site", "none", "node-config panel")
        panel_site = PanelSite(train, unseen, str(asked["groups"]).split(","))
        if total := tensors_in(message.content, "haplotypes"):
            panel_site.set_stats(total)
        return panel_site
    import yaml

    from engine.imaging.config import load_config, parse_config
    from engine.imaging.federated import Local, ScanSite

    config = parse_config(yaml.safe_load(str(asked["config"])), "the server's config")
    if here.get("config") and load_config(str(here["config"])) != config:
        raise InputError("the config that this site agreed to", "another", "from the server")
    local = Local(int(asked["local_steps"]), str(asked["optimizer"]))
    cache = Path(str(here["cache"])) if here.get("cache") else None
    site = ScanSite(config, str(here["scans"]), str(here["name"]), local, cache=cache)
    for stage in ("data", "autoencoder", "latents", "flow"):
        site.stage = stage
        if not (held := tensors_in(message.content, stage)):
            continue
        if stage in ("data", "latents"):
            site.set_stats(held)
        else:
            site.set_state(held)
    site.stage = str(asked["stage"])
    return site


def answer(
    message: Message, context: Context, tensors: Tensors | None, figures: dict[str, float] | None = None
) -> Message:
    """The reply: nothing but these arrays and figures."""
    if context.node_config.get("sent"):
        asked = message.content.config_records["asked"]
        arrays_sent = {name: {"shape": array.shape, "bytes": array.nbytes} for name, array in (tensors or {}).items()}
        line = {"stage": asked["stage"], "round": asked["round"], "arrays": arrays_sent, "figures": figures or {}}
        with Path(str(context.node_config["sent"])).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
    content = RecordDict({"figures": MetricRecord(figures or {})})
    if tensors is not None:
        content["arrays"] = arrays(tensors)
    return Message(content, reply_to=message)


@app.query()
def statistics(message: Message, context: Context) -> Message:
    """Sums over the training side."""
    site = site_of(message, context)
    return answer(message, context, outgoing(site.local_stats(), site.stats_declared()))


@app.train()
def fit(message: Message, context: Context) -> Message:
    """The state after this round's local steps."""
    site = site_of(message, context)
    state = site.fit(int(message.content.config_records["asked"]["round"]))
    return answer(message, context, outgoing(state, site.state_declared()))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Figures on people the model did not learn from."""
    return answer(message, context, None, site_of(message, context).evaluate())
