"""The Flower example as it is shipped: a SuperLink and SuperNodes as processes on loopback, over TLS, each with its own people.

Flower has an environment of its own (`scripts/federated_env.sh`); without it these tests are skipped.
"""

from __future__ import annotations

import json
import socket
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "federated"))

from loopback import BIN, Federation, copy_of_app, federation

from engine.genomics.baselines import fit_markov
from engine.genomics.federated import LEAST_COUNT, PanelSite
from engine.genomics.panel import HaplotypePanel, panel_from_alleles, read_panel, write_panel
from engine.imaging.config import dump_config, parse_config
from engine.imaging.federated import Local, ScanSite, covariates_of, first_state, latent_statistics_of
from engine.training import checkpoint
from engine.training.federated import outgoing, total, weighted_mean

pytestmark = pytest.mark.skipif(
    not (BIN / "flower-superlink").is_file(), reason="no Flower: run scripts/federated_env.sh"
)

SITES = 150
LIMIT = (
    3600.0  # seconds; only so that a run that hangs ends: some minutes are enough, more for a site that is waited for
)
FAULTS = """

# --- only in this copy, made by a test -------------------------------------------------------------------------------
import os

import numpy as np

_honest = answer


def answer(message, context, tensors, figures=None):
    what, asked = os.environ.get("FAULT", ""), message.content.config_records["asked"]
    if not what or tensors is None or asked["stage"] in ("data", "latents"):
        return _honest(message, context, tensors, figures)
    if what == "killed":
        os._exit(9)
    name = next(name for name, array in tensors.items() if array.ndim > 1)
    if what == "nan":
        tensors = {**tensors, name: np.full_like(tensors[name], np.nan)}
    elif what == "shape":
        tensors = {**tensors, name: tensors[name][..., :1].copy()}
    return _honest(message, context, tensors, figures)
"""


def panel(people: int, seed: int) -> HaplotypePanel:
    rng = np.random.default_rng(seed)
    donors = (np.random.default_rng(99).random((12, SITES)) < 0.35).astype(np.uint8)
    alleles = donors[np.repeat(rng.integers(0, 12, (2 * people, SITES // 10)), 10, axis=1), np.arange(SITES)]
    position = np.arange(SITES) * 1000 + 500
    ids = [f"CANARY{seed}-{k}" for k in range(people)]
    return panel_from_alleles(alleles.T, position, "21", ids, contig_length={"21": 48_129_895}, assembly="GRCh37")


CONFIG = parse_config({
    "data": {"size": [16, 16, 16], "spacing_mm": [2, 2, 2], "holdout_share": 0.3,
             "covariates": {"age": {"kind": "continuous"}}},
    "autoencoder": {"steps": 1, "batch_size": 4, "widths": [8, 16], "latent_channels": 2, "shift_voxels": 1,
                    "learning_rate": 0.01},
    "flow": {"steps": 1, "batch_size": 4, "widths": [8, 16], "attention_levels": [1], "embedding_width": 16, "views": 1,
             "learning_rate": 0.01},
    "sampling": {"steps": 2},
    "training": {"precision": "fp32"},
})  # fmt: skip


def scans(folder: Path, first: int, people: int, write_noise: Callable[..., Path]) -> Path:
    """Scans of noise of persons `first` and on; ids and names of files are canaries."""
    folder.mkdir()
    table = write_noise(folder, first + people, side=16)
    for path in folder.glob("*.nii.gz"):
        path.rename(folder / f"CANARY{path.name}")
    lines = table.read_text().splitlines()
    table.write_text(
        "\n".join([lines[0], *("CANARY" + line.replace(",P", ",CANARY-P") for line in lines[1 + first :])]) + "\n"
    )
    return table


@pytest.fixture
def running(tmp_path: Path):
    with federation(tmp_path / "run") as made:
        yield made


def test_counts_of_two_institutions_over_tls(tmp_path: Path, running: Federation) -> None:
    """The common chain is that of counts summed by hand; each site audits it against its own people; ids stay."""
    files = {}
    for seed, name in enumerate(("north", "south", "public"), start=1):
        for part, people, more in (("panel", 80 if name == "north" else 60, 0), ("unseen", 60, 10)):
            files[name, part] = tmp_path / f"{name}-{part}.bcf"
            write_panel(panel(people, seed + more), files[name, part])
    for name in ("north", "south"):
        own = {part: str(files[name, part]) for part in ("panel", "unseen")}
        running.node(name, {**own, "sent": str(tmp_path / f"sent-{name}.jsonl")})
    lines = running.run(
        copy_of_app(tmp_path / "app"), tmp_path / "out", {"variants": str(files["public", "panel"])}, LIMIT
    )
    assert [len(line["used"]) for line in lines if "used" in line] == [2]
    assert all(line["refused"] == {} for line in lines if "used" in line)

    sites = [
        PanelSite(read_panel(files[name, "panel"]), read_panel(files[name, "unseen"])) for name in ("north", "south")
    ]
    by_hand = total({str(k): site.local_stats() for k, site in enumerate(sites)}, sites[0].stats_declared()).tensors
    with np.load(tmp_path / "out" / "haplotypes.npz", allow_pickle=False) as held:
        summed = {name: held[name] for name in held.files}
    assert summed.keys() == by_hand.keys()
    assert all(np.array_equal(summed[name], by_hand[name]) for name in by_hand)
    (figures,) = (line["evaluated"] for line in lines if "evaluated" in line)
    for site in sites:
        site.set_stats(by_hand)
    assert sorted(f["mean_nats"] for f in figures.values()) == pytest.approx(
        sorted(s.evaluate()["mean_nats"] for s in sites)
    )
    exact = fit_markov(sites[0].train, per_group=False)
    assert LEAST_COUNT > 1
    assert not np.allclose(sites[0].chain().p_glv, exact.p_glv), "the common model is not one site's own"

    # each site's own list of what left: the declared sums and two figures
    declared = {name: list(shape) for name, shape in sites[0].stats_declared().items()}
    for name in ("north", "south"):
        first, second = [json.loads(line) for line in (tmp_path / f"sent-{name}.jsonl").read_text().splitlines()]
        assert {key: array["shape"] for key, array in first["arrays"].items()} == declared
        assert sum(array["bytes"] for array in first["arrays"].values()) == sum(a.nbytes for a in by_hand.values())
        assert (second["arrays"], second["figures"].keys()) == ({}, {"n", "mean_nats"})
        assert first["figures"] == {}

    # nothing but numbers came to the server, and what passed through in the open is TLS
    for path in [*(tmp_path / "out").rglob("*"), tmp_path / "run" / "superlink.log"]:
        assert path.is_dir() or b"CANARY" not in path.read_bytes(), path.name
    trusting = ssl.create_default_context(cafile=str(tmp_path / "run" / "tls" / "ca.pem"))
    with pytest.raises(OSError, match="certificate"):
        urlopen(f"https://127.0.0.1:{running.port}/", timeout=20)
    with pytest.raises(OSError):
        urlopen(f"http://127.0.0.1:{running.port}/", timeout=20)
    with (
        socket.create_connection(("127.0.0.1", running.port), 20) as plain,
        trusting.wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        assert secured.version() in ("TLSv1.2", "TLSv1.3")


def by_hand(sites: dict[str, ScanSite], rounds: int, broken: dict[str, str] | None = None):
    """The same federation in this process: sums and states of every stage."""
    broken, made = broken or {}, {}
    weights = {name: float(site.local_stats()["scans"][0]) for name, site in sites.items()}
    for stage in ("data", "autoencoder", "latents", "flow"):
        for site in sites.values():
            site.stage = stage
        declared = None
        if stage in ("data", "latents"):
            declared = next(iter(sites.values())).stats_declared()
            made[stage] = total({n: outgoing(s.local_stats(), declared) for n, s in sites.items()}, declared).tensors
            for site in sites.values():
                site.set_stats(made[stage])
            continue
        made[stage] = first_state(CONFIG, stage, covariates_of(CONFIG, made["data"]))
        for number in range(rounds):
            replies = {}
            for name, site in sites.items():
                site.set_state(made[stage])
                replies[name] = None if name in broken else site.fit(number)
            # by hand, in float64: the weighted mean of those that are not broken
            good = {name: reply for name, reply in replies.items() if reply is not None}
            whole = sum(weights[name] for name in good)
            share = {name: weights[name] / whole for name in good}
            mean = {key: sum(share[name] * good[name][key].astype(np.float64) for name in good) for key in made[stage]}
            made[stage] = {key: np.asarray(value).astype(np.float32) for key, value in mean.items()}
            checked = weighted_mean(replies, weights, {k: v.shape for k, v in made[stage].items()}).tensors
            assert all(np.allclose(checked[key], made[stage][key], rtol=1e-6, atol=1e-8) for key in checked)
        for site in sites.values():
            site.set_state(made[stage])
    return made


@pytest.mark.slow  # some thirty processes that import PyTorch, one after another: minutes
@pytest.mark.parametrize("fault", ["", "nan", "shape", "killed"])
def test_scans_of_two_institutions_and_a_third_that_is_broken(
    tmp_path: Path, running: Federation, write_noise: Callable[..., Path], fault: str
) -> None:
    """The run folder at the server is the hand-computed federation of the sound sites, whatever the third sends."""
    (tmp_path / "config.yaml").write_text(dump_config(CONFIG))
    tables = {
        "north": scans(tmp_path / "north", 0, 14, write_noise),
        "south": scans(tmp_path / "south", 14, 10, write_noise),
    }
    names = list(tables)
    if fault:
        tables["third"] = scans(tmp_path / "third", 24, 9, write_noise)
        names.append("third")
    app = copy_of_app(tmp_path / "app")
    client = app / "engine_flower" / "client_app.py"
    if fault:  # the copy's last definition of `answer` counts
        client.write_text(client.read_text() + FAULTS)
    for name in names:
        running.node(name, {"scans": str(tables[name]), "cache": str(tmp_path / f"cache-{name}")},
                     FAULT=fault if name == "third" else "")  # fmt: skip
    settings = {
        "config": str(tmp_path / "config.yaml"), "sites": len(names), "rounds-autoencoder": 1, "rounds-flow": 1,
        "local-steps": 2, "round-timeout": 300.0,
    }  # fmt: skip
    began = time.monotonic()
    lines = running.run(app, tmp_path / "out", settings, LIMIT)
    rounds = [line for line in lines if line.get("stage") in ("autoencoder", "flow") and "used" in line]
    assert [len(line["used"]) for line in rounds] == [2, 2], (time.monotonic() - began, running.logs())
    reasons = [reason for line in rounds for reason in line["refused"].values()]
    words = {"": "", "nan": "is not finite", "shape": "in place of", "killed": "no reply"}[fault]
    assert len(reasons) == (2 if fault else 0)
    assert all(words in reason for reason in reasons)

    local = Local(2, "adamw")
    sites = {name: ScanSite(CONFIG, table, name, local) for name, table in tables.items()}
    made = by_hand(sites, 1, {"third": fault} if fault else {})
    parts, state = checkpoint.load(tmp_path / "out" / "scans")
    for part, stage in (("autoencoder", "autoencoder"), ("denoiser", "flow")):
        start = first_state(CONFIG, stage, covariates_of(CONFIG, made["data"]))
        for key, tensor in parts[part].items():
            moved = np.abs(made[stage][key] - start[key]).max()
            assert np.abs(tensor.numpy() - made[stage][key]).max() <= 1e-3 * moved + 1e-6, (part, key)
    mean_c, _ = latent_statistics_of(made["latents"])
    np.testing.assert_allclose(state["model"]["latent_mean_c"], mean_c, rtol=1e-3, atol=1e-5)
    for path in [*(tmp_path / "out").rglob("*"), tmp_path / "run" / "superlink.log"]:
        assert path.is_dir() or b"CANARY" not in path.read_bytes(), path.name
    figures = [line["evaluated"] for line in lines if "evaluated" in line]
    assert all(np.isfinite(value) for each in figures for one in each.values() for value in one.values())
