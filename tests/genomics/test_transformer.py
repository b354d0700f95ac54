"""The haplotype transformer: a proper likelihood from what the chains know, samples in step with it, training that resumes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.errors import Unsupported, UsageError
from engine.genomics import chains, li_stephens
from engine.genomics.commands import finish_command, fit_command, sample_command, score_command
from engine.genomics.matching import of_person
from engine.genomics.panel import HaplotypePanel, panel_from_alleles, read_panel, write_panel
from engine.genomics.transformer import features, train
from engine.genomics.transformer.batches import batch, log_likelihood, new_network
from engine.genomics.transformer.config import TransformerConfig, dump_config, load_config, parse_config
from engine.genomics.transformer.run import Transformer, load
from engine.training import checkpoint
from engine.training.log import Log
from engine.training.preemption import Preempted

SHIPPED = Path(__file__).parents[2] / "configs" / "genomics" / "transformer.yaml"


def mosaics(people: int, sites: int, seed: int = 2) -> HaplotypePanel:
    """Mosaics of eight donors with breaks every ten sites, in two groups."""
    rng, at = np.random.default_rng(seed), np.arange(sites)
    donor_nl = (rng.random((8, sites)) < 0.4).astype(np.uint8)
    piece = rng.integers(0, 8, (2 * people, -(-sites // 10)))
    alleles_nl = donor_nl[np.repeat(piece, 10, axis=1)[:, :sites], at]
    return panel_from_alleles(
        alleles_nl.T, 1_000 + 3_000 * at, "21", [f"p{i}" for i in range(people)],
        group=["A"] * (people // 2) + ["B"] * (people - people // 2), contig_length={"21": 48_129_895}, assembly="GRCh37",
    )  # fmt: skip


def settings(**changes: object) -> TransformerConfig:
    """A small run; `changes` by section, e.g. fit={"steps": 3}."""
    values: dict[str, object] = {
        "model": "transformer",
        "copying": {"ne": 20_000, "mismatch": 0.01, "min_carriers": 1},
        "bank": [{"redrawn": 0.01, "mismatch": 0.45}, {"ne": 20_000, "parent": 0, "floor": 0.1}, {"ne": 80_000}],
        "start": [0.0, 0.5, 0.5],
        "network": {
            "patch": 4, "width": 8, "depth": 2, "heads": 2, "attention": 3, "hidden": 8, "site_width": 2,
            "dropout": 0.0, "site_dropout": 0.0,
        },
        "fit": {"steps": 12, "batch_size": 6, "warmup_steps": 2, "judge_every_steps": 4, "window": 4, "held_out": 0.2},
        "training": {"precision": "fp32", "log_every_steps": 1, "checkpoint_every_minutes": None},
    }  # fmt: skip
    for section, values_of in changes.items():
        before = values.get(section)
        values[section] = {**before, **values_of} if isinstance(before, dict) else values_of  # type: ignore[dict-item]
    return parse_config(values)


def shaken(
    config: TransformerConfig, panel: HaplotypePanel, strength: float = 0.5, names: tuple[str, ...] = ()
) -> Transformer:
    """A model over `panel` with random weights everywhere: what holds for it holds for every trained one."""
    reference = li_stephens.fit(panel, config.copying)
    torch.manual_seed(7)
    network = new_network(
        config.network, sites=panel.n_sites, chains=len(config.bank), groups=len(reference.group_names),
        covariates=len(names), weight_c=config.weights,
    )  # fmt: skip
    for parameter in network.parameters():
        parameter.data += strength * torch.randn(parameter.shape)
    return Transformer(config, reference, network.eval(), list(names))


@pytest.fixture(scope="module")
def panel() -> HaplotypePanel:
    return mosaics(20, 50)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, panel: HaplotypePanel) -> Path:
    out = tmp_path_factory.mktemp("transformer") / "run"
    config = settings()
    train.train(config, lambda: li_stephens.fit(panel, config.copying), out)
    return out


# --- the likelihood ---------------------------------------------------------------------------------------------------


def test_an_untrained_network_is_the_mixture_of_the_chains(panel):
    model = shaken(settings(), panel, strength=0.0)
    target_nl = panel.alleles_nl()
    bank = features.bank_of(model.reference, model.config.bank)
    own = of_person(model.reference.samples.first_haplotype)
    logits = chains.predict(bank, panel.bits_lw, 40, target_nl, leave_out=own).logit_nlc[..., 1:].mean(axis=-1)
    wanted = chains.nats(np.clip(logits, -features.LARGEST, features.LARGEST), target_nl).sum(axis=1)
    got = model.log_likelihood(panel, leave_one_out=True)
    np.testing.assert_allclose(got, wanted, rtol=2e-3)  # predictions are kept in float16
    assert got.std() > 1


@pytest.mark.parametrize(("sites", "patch", "window"), [(7, 2, 1), (8, 4, 3), (6, 1, 4), (5, 8, 1)])
def test_probabilities_of_all_sequences_sum_to_one(sites, patch, window):
    """Whatever the weights: nothing the network sees at a site knows the allele that is there, or one after it."""
    known = mosaics(6, sites)
    model = shaken(settings(network={"patch": patch}, fit={"window": window}), known)
    everything = np.array(list(itertools.product((0, 1), repeat=sites)), dtype=np.uint8)
    people = [f"s{i}" for i in range(len(everything))]
    scored = panel_from_alleles(everything.T, known.sites.position_bp, "21", people)
    nats = model.log_likelihood(scored)
    assert np.exp(nats).sum() == pytest.approx(1, abs=1e-5)
    assert nats.std() > 1


def test_windows_change_nothing(panel):
    one = shaken(settings(fit={"window": 1}), panel).log_likelihood(panel)
    many = shaken(settings(fit={"window": 500}), panel).log_likelihood(panel)
    np.testing.assert_allclose(one, many, atol=1e-3)
    moved = shaken(settings(network={"attention": 1}, fit={"window": 500}), panel)
    assert np.abs(moved.log_likelihood(panel) - many).max() > 0.01  # attention does look back


def test_a_missing_allele_at_the_end_is_summed_over(panel):
    model = shaken(settings(), panel)
    alleles_nl = panel.alleles_nl()[:4].copy()
    nats = []
    for last in (0, 1, 255):
        alleles_nl[:, -1] = last
        nats.append(model.log_likelihood(panel_from_alleles(alleles_nl.T, panel.sites.position_bp, "21", ["a", "b"])))
    np.testing.assert_allclose(np.logaddexp(nats[0], nats[1]), nats[2], atol=1e-4)


def test_leave_one_out_knows_nothing_of_the_person(panel):
    """Changing both haplotypes of a person in the panel changes nothing of what is foretold of them, and does without it."""
    alleles_nl = panel.alleles_nl()
    changed_nl = alleles_nl.copy()
    changed_nl[6:8] ^= 1
    other = panel_from_alleles(
        changed_nl.T, panel.sites.position_bp, "21", list(panel.samples.ids), group=panel.samples.group
    )
    config = settings()
    first, second = (li_stephens.fit(p, config.copying) for p in (panel, other))
    own = of_person(first.samples.first_haplotype)
    assert own[6].tolist() == [6, 7]
    said = [
        features.foretold(features.bank_of(m, config.bank), config.bank, m, alleles_nl[6:8], out)[0]
        for m, out in ((first, own[6:8]), (second, own[6:8]), (second, None))
    ]
    np.testing.assert_array_equal(said[0], said[1])
    assert np.abs(said[1].astype(float) - said[2]).max() > 0.1


# --- samples ----------------------------------------------------------------------------------------------------------


def test_samples_are_drawn_from_what_score_gives(panel, monkeypatch):
    """The logits by which alleles were drawn, site by site, are those of the window at once, groups and phenotypes known."""
    monkeypatch.setattr("engine.genomics.transformer.run.BLOCK", 3)
    model = shaken(settings(fit={"window": 3}), panel, names=("height",))
    group_b, given_v = np.array([0, 1, 1]), np.array([0.7, 1.0], np.float32)
    made_nl, nats_n = model._block(np.arange(3), group_b, given_v, seed=5)
    bank = features.bank_of(model.reference, model.config.bank)
    foretold = features.foretold(bank, model.config.bank, model.reference, made_nl)
    whole = batch(model.facts, *foretold, made_nl, np.repeat(group_b, 2), np.tile(given_v, (6, 1)))
    np.testing.assert_allclose(nats_n, log_likelihood(model.network, whole, 3), atol=2e-3)
    other = batch(model.facts, *foretold, made_nl, 1 - np.repeat(group_b, 2), np.tile(given_v, (6, 1)))
    assert np.abs(nats_n - log_likelihood(model.network, other, 3)).max() > 0.01


def test_frequencies_of_samples_are_those_of_the_likelihood():
    """Three sites, 3,000 haplotypes: each of the eight sequences as often as its probability says."""
    known = mosaics(6, 3)
    model = shaken(settings(), known, strength=0.3)
    everything = np.array(list(itertools.product((0, 1), repeat=3)), dtype=np.uint8)
    of_each = []
    for group in range(2):
        bank = features.bank_of(model.reference, model.config.bank)
        foretold = features.foretold(bank, model.config.bank, model.reference, everything)
        whole = batch(model.facts, *foretold, everything, np.full(8, group), np.zeros((8, 0), np.float32))
        of_each.append(np.exp(log_likelihood(model.network, whole, 4)))
    drawn_nl = model.sample(1500, groups="B", seed=1).alleles_nl()
    share = np.bincount(drawn_nl @ [4, 2, 1], minlength=8) / 3000
    deviation = np.sqrt(of_each[1] / 3000)
    assert (np.abs(share - of_each[1]) < 4.5 * deviation + 1e-3).all()
    assert np.abs(of_each[0] - of_each[1]).max() > 0.05


def test_a_person_depends_on_seed_and_number_alone(panel, monkeypatch):
    monkeypatch.setattr("engine.genomics.transformer.run.BLOCK", 4)
    model = shaken(settings(copying={"min_carriers": 2}), panel)
    ten = model.sample(10, seed=3)
    for first, count in ((0, 1), (3, 5), (9, 1)):
        part = model.sample(count, seed=3, start=first)
        np.testing.assert_array_equal(part.alleles_nl(), ten.alleles_nl()[2 * first : 2 * (first + count)])
        assert part.samples.ids == ten.samples.ids[first : first + count]
        assert part.samples.group.tolist() == ten.samples.group[first : first + count].tolist()
    assert (model.sample(10, seed=4).alleles_nl() != ten.alleles_nl()).any()
    with pytest.raises(UsageError, match="'C'"):
        model.sample(1, groups="C")
    with pytest.raises(UsageError, match="'weight'"):
        model.sample(1, phenotypes={"weight": 1.0})


def test_alleles_of_one_person_are_not_copied():
    """Private alleles are drawn anew, as often as in the panel, at sites of their kind, and tell the chains nothing."""
    alleles_nl = mosaics(20, 60).alleles_nl()
    alleles_nl[:, 40:] = 0
    alleles_nl[3, 40], alleles_nl[11, 47] = 1, 1
    known = panel_from_alleles(alleles_nl.T, 1_000 + 3_000 * np.arange(60), "21", [f"p{i}" for i in range(20)])
    model = shaken(settings(copying={"min_carriers": 2}), known, strength=0.1)
    drawn_nl = model.sample(128, seed=1).alleles_nl()[:, 40:]
    assert drawn_nl.mean() == pytest.approx(2 / 40 / 20, rel=0.8)
    assert len(np.flatnonzero(drawn_nl.any(axis=0))) > 4  # not only where somebody has one


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_begins_at_the_chains_and_gets_better(whole_run, panel):
    events = [json.loads(line) for line in (whole_run / "log.jsonl").read_text().splitlines()]
    losses = [e["loss"] * 50 for e in events if e["event"] == "transformer"]
    start = shaken(settings(), panel, strength=0.0).log_likelihood(panel, leave_one_out=True)
    assert losses[0] == pytest.approx(-start.mean(), rel=0.25)
    judged = [e["held_out_nats"] for e in events if e["event"] == "judged"]
    assert len(judged) == 3
    assert judged[-1] > judged[0]
    assert load(whole_run).log_likelihood(panel, leave_one_out=True).mean() > start.mean() + 0.1


def test_a_stopped_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, whole_run, panel, monkeypatch):
    """SIGUSR1 while predictions are made, and again between two steps, one of them a judgement."""
    config, out = settings(training={"checkpoint_every_steps": 3}), tmp_path / "run"
    begin = lambda resume: train.train(config, lambda: li_stephens.fit(panel, config.copying), out, resume=resume)  # noqa: E731
    monkeypatch.setattr(features, "PART", 16)
    foretold, calls = features.foretold, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return foretold(*arguments)

    monkeypatch.setattr(features, "foretold", interrupted)
    with pytest.raises(Preempted):
        begin(False)
    assert len(list((out / "cache").iterdir())) == 2
    event = Log.event

    def watched(self, name, **fields):
        if name == "transformer" and fields["step"] in (4, 9) and fields["step"] not in calls:
            calls.append(fields["step"])
            os.kill(os.getpid(), signal.SIGUSR1)
        return event(self, name, **fields)

    monkeypatch.setattr(Log, "event", watched)
    for _ in range(2):
        with pytest.raises(Preempted) as stopped:
            begin(True)
        assert stopped.value.exit_code == 85
    summary = begin(True)
    assert summary["steps"] == 12
    (parts, state), (wanted, whole) = checkpoint.load(out), checkpoint.load(whole_run)
    assert set(parts) == {"network", "ema", "best", "optimizer"}
    for part, tensors in wanted.items():
        for name, tensor in tensors.items():
            assert torch.equal(parts[part][name], tensor), (part, name)
    assert state["judge"] == whole["judge"]
    with pytest.raises(UsageError, match="differs in fit"):
        train.train(settings(fit={"steps": 99}), lambda: li_stephens.fit(panel, config.copying), out, resume=True)


def test_two_processes_train_as_one(tmp_path, whole_run, panel):
    """accelerate launch, batches of 6 over 2 processes in 2 parts each: the losses of one process."""
    write_panel(panel, tmp_path / "panel.bcf")
    rows = [f"{name}\t{group}" for name, group in zip(panel.samples.ids, panel.samples.group)]
    (tmp_path / "samples.tsv").write_text("\n".join(["sample\tgroup", *rows]) + "\n")
    (tmp_path / "config.yaml").write_text(dump_config(settings(training={"accumulate": 2})))
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "engine", "genomics", "fit",
            "panel.bcf", "--samples", "samples.tsv", "--config", "config.yaml", "--out", "run", "--json",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert any('"processes": 2' in line for line in done.stdout.splitlines()), done.stdout

    def losses(run: Path) -> np.ndarray:
        events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return np.array([e["loss"] for e in events if e["event"] == "transformer"])

    one, two = losses(whole_run), losses(tmp_path / "run")
    assert len(one) == 12
    np.testing.assert_allclose(two, one, rtol=5e-4)


def test_phenotypes_are_learned_where_they_matter(tmp_path):
    """An allele that follows a phenotype is drawn by it; people whose phenotype is not given are taken as they come."""
    rng = np.random.default_rng(1)
    value_s = rng.standard_normal(60)
    alleles_nl = (rng.random((120, 12)) < 0.5).astype(np.uint8)
    alleles_nl[:, 5] = np.repeat(value_s > 0, 2)
    known = panel_from_alleles(alleles_nl.T, 1_000 + 3_000 * np.arange(12), "21", [f"p{i}" for i in range(60)])
    table = tmp_path / "phenotypes.tsv"
    rows = [f"p{i}\t{'' if i == 7 else value}" for i, value in enumerate(value_s)]
    table.write_text("\n".join(["sample\theight", *rows]) + "\n")
    write_panel(known, tmp_path / "panel.bcf")
    config = settings(
        phenotypes=str(table),
        fit={"steps": 120, "batch_size": 16, "learning_rate": 0.02, "condition_drop": 0.1, "patience": 30},
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    fit_command(tmp_path / "panel.bcf", out=tmp_path / "run", config=tmp_path / "config.yaml")
    model = load(tmp_path / "run")
    tall, short = (model.sample(40, phenotypes={"height": v}, seed=1).alleles_nl()[:, 5].mean() for v in (1.5, -1.5))
    assert tall > 0.8
    assert short < 0.2


# --- commands and settings --------------------------------------------------------------------------------------------


def test_fit_score_and_sample_from_files(tmp_path, panel):
    write_panel(panel, tmp_path / "panel.bcf")
    (tmp_path / "config.yaml").write_text(dump_config(settings(fit={"steps": 2})))
    made = fit_command(tmp_path / "panel.bcf", out=tmp_path / "run", config=tmp_path / "config.yaml")
    assert (made["model"], made["haplotypes"], made["steps"]) == ("transformer", 40, 2)
    scored = score_command(tmp_path / "run", tmp_path / "panel.bcf", leave_one_out=True)
    own = load(tmp_path / "run").log_likelihood(panel, leave_one_out=True)
    assert scored["mean_nats"] == pytest.approx(own.mean())
    drawn = sample_command(tmp_path / "run", 5, out=tmp_path / "made.bcf", seed=1)
    assert (drawn["people"], drawn["sites"]) == (5, 50)
    again = load(tmp_path / "run").sample(5, seed=1)
    np.testing.assert_array_equal(read_panel(tmp_path / "made.bcf").alleles_nl(), again.alleles_nl())
    for index in range(2):
        sample_command(tmp_path / "run", 5, out=tmp_path / "shared.bcf", seed=1, shard=(index, 2))
    shards = [read_panel(tmp_path / f"shared.shard-000{i}-of-0002.bcf").alleles_nl() for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(shards), again.alleles_nl())
    assert sample_command(tmp_path / "run", 5, out=tmp_path / "shared.bcf", seed=1, shard=(1, 2))["skipped"]
    finish_command(tmp_path / "shared.bcf", 2)
    assert (tmp_path / "shared.bcf").read_bytes() == (tmp_path / "made.bcf").read_bytes()
    with pytest.raises(Unsupported, match="--sex"):
        sample_command(tmp_path / "run", 5, out=tmp_path / "more.bcf", sex="male")


def test_the_shipped_config_is_whole_and_unknown_keys_are_named(tmp_path):
    config = load_config(SHIPPED, ["network.width=16", "fit.steps=7"])
    assert (config.network.width, config.fit.steps, len(config.weights)) == (16, 7, len(config.bank))
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config
    with pytest.raises(UsageError, match=r"network.widht.*width"):
        load_config(SHIPPED, ["network.widht=16"])
    with pytest.raises(UsageError, match="multiple of heads"):
        load_config(SHIPPED, ["network.width=18"])
    with pytest.raises(UsageError, match="start must have"):
        load_config(SHIPPED, ["start=[1.0]"])
