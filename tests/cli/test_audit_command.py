"""`engine audit` on embedding stores, with a policy and a person table: by the command, and refusals by its function."""

from __future__ import annotations

import json

import numpy as np
import pytest

from engine.audit import Pool
from engine.audit.copies import Scores
from engine.audit.store import write_store
from engine.errors import InputError, UsageError
from engine.genomics import run_folder
from engine.genomics.li_stephens import LiStephensConfig, fit
from engine.genomics.panel import panel_from_alleles, read_panel, write_panel
from engine.genomics.pools import haplotype_pool
from engine.release.audit_run import _named, audit_files, load_pools, nearest_table

POLICY = "control_rows: 40\ncontamination_repeats: 4\nhonest_repeats: 2\nsubsets: 2\n"


def sheet(rng, n):
    directions = np.random.default_rng(9).standard_normal((4, 12))
    return (np.tanh(rng.standard_normal((n, 4)) @ directions) + 0.05 * rng.standard_normal((n, 12))).astype(np.float32)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Folder with the stores train, holdout and synthetic (fresh), a store of copies, and a fast policy."""
    folder, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    rows = {"train": sheet(rng, 160), "holdout": sheet(rng, 120), "synthetic": sheet(rng, 80)}
    for name, data in {**rows, "copies": rows["train"][:80]}.items():
        person = np.array([f"CANARY-{name}-{i // 2}" for i in range(len(data))])
        write_store(Pool("features", data, person), folder / name)
    (folder / "policy.yaml").write_text(POLICY)
    return folder


def files(folder, synthetic="synthetic"):
    return folder / "train", folder / "holdout", folder / synthetic


def test_stores_are_audited_from_the_command_line(stores, good, tmp_path):
    train, holdout, synthetic = files(stores)
    sides = "--train", train, "--holdout", holdout, "--synthetic", synthetic
    said = good("audit", *sides, "--policy", stores / "policy.yaml", "--out", tmp_path / "a")
    assert said["verdict"] == "pass"
    assert said["modality"] == "embeddings"
    names = {finding["name"] for finding in said["findings"]}
    assert {"membership_auc_distance", "authenticity", "coverage", "audit_false_positive_rate"} <= names
    written = (tmp_path / "a" / "audit.json").read_text()
    assert json.loads(written)["policy"]["control_rows"] == 40
    assert "CANARY" not in written + (tmp_path / "a" / "report.html").read_text()
    assert [entry["path"] for entry in json.loads(written)["audited"]] == ["people.tsv", "store.safetensors"]


def test_copies_in_a_store_fail(stores, tmp_path):
    made = audit_files(*files(stores, "copies"), tmp_path / "a", policy=stores / "policy.yaml")
    assert made["verdict"] == "fail"


def test_a_person_table_joins_ids_and_refuses_people_on_both_sides(stores, tmp_path):
    table = tmp_path / "people.tsv"
    ids = [f"CANARY-{side}-{i}" for side, n in (("train", 80), ("holdout", 60)) for i in range(n)]
    lines = [f"{key}\tP{i // 2}\t{'north' if i % 4 < 2 else 'south'}" for i, key in enumerate(ids)]  # two ids a person
    table.write_text("\n".join(["id\tperson\tgroup", *lines]))
    made = audit_files(*files(stores), tmp_path / "a", policy=stores / "policy.yaml", people=table)
    written = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert made["verdict"] == "pass"
    assert written["sizes"]["train"] == {"rows": 160, "people": 40}
    table.write_text("\n".join(["id\tperson\tgroup", *lines]).replace("CANARY-holdout-3\tP41", "CANARY-holdout-3\tP7"))
    with pytest.raises(
        InputError, match=r"1 pairs \(CANARY-train-14 in train and CANARY-holdout-3 in holdout are P7\)"
    ):
        audit_files(*files(stores), tmp_path / "b", policy=stores / "policy.yaml", people=table)
    assert not (tmp_path / "b").exists()


def test_judges_see_the_ids_they_were_made_with(tmp_path):
    """A modality's judge knows samples, not people: fresh people set aside must still be recognised as its own."""
    rows = np.zeros((4, 2), np.float32)
    pools = {side: Pool("features", rows, np.array([f"{side}{i}" for i in range(4)])) for side in ("train", "holdout")}
    pools["synthetic"] = Pool("features", rows, np.array(list("wxyz")))
    ids = [*pools["train"].person, *pools["holdout"].person]
    table = tmp_path / "p.csv"
    table.write_text("\n".join(["id,person", *(f"{key},{key[0]}{int(key[-1]) // 2}" for key in ids)]))
    seen = {}

    def judge(name, pool, scores):
        seen[name] = (pool.person.tolist(), scores.person_n.tolist())
        return []

    named, (translated,) = _named(pools, [judge], table)
    fresh = named["holdout"].select_people(np.array(["h1"]))
    empty = np.zeros(0)
    for name, pool in (("fresh_real", fresh), ("synthetic", named["synthetic"]), ("copycat", pools["synthetic"])):
        translated(name, pool, Scores(empty, empty, empty, empty, pool.person))
    assert seen["fresh_real"] == (["holdout2", "holdout3"],) * 2
    assert seen["synthetic"] == (list("wxyz"),) * 2
    assert seen["copycat"] == (list("wxyz"),) * 2


def test_nearest_takes_stores(stores, tmp_path):
    made = nearest_table(stores / "copies", stores / "train", tmp_path / "near.tsv", k=1)
    lines = [line.split("\t") for line in (tmp_path / "near.tsv").read_text().splitlines()[1:]]
    assert made["query_rows"] == 80
    assert all(query.replace("copies", "train") == found for query, _, found, _ in lines)
    assert all(float(distance) == 0 for *_, distance in lines)


def mosaics(rng, people, sites=400):
    """Alleles (sites, 2 people): mosaics of common founders with a little mutation."""
    founders = (np.random.default_rng(3).random((60, sites)) < 0.3).astype(np.uint8)
    rows = founders[np.repeat(rng.integers(0, 60, (2 * people, sites // 20)), 20, axis=1), np.arange(sites)]
    return (rows ^ (rng.random(rows.shape) < 0.02)).T.astype(np.uint8)


def test_panels_with_groups_and_with_the_model(tmp_path):
    """A person table gives groups; a copying model that leaves the building gives its people away, its samples need not."""
    rng = np.random.default_rng(4)
    for side, n in (("train", 90), ("holdout", 80), ("synthetic", 60)):
        ids = [f"{side[0]}{i}" for i in range(n)]
        panel = panel_from_alleles(mosaics(rng, n), 1_000 + 500 * np.arange(400), "21", ids)
        write_panel(panel, tmp_path / f"{side}.bcf")
    run_folder.save(fit(read_panel(tmp_path / "train.bcf"), LiStephensConfig(ne=20_000)), tmp_path / "run")
    sides = [tmp_path / f"{side}.bcf" for side in ("train", "holdout", "synthetic")]
    every = [f"{side}{i}" for side, n in (("t", 90), ("h", 80), ("s", 60)) for i in range(n)]
    table = tmp_path / "people.csv"
    table.write_text("\n".join(["id,person,group", *(f"{key},{key},{'AB'[int(key[1:]) % 2]}" for key in every)]))
    (tmp_path / "policy.yaml").write_text(POLICY)
    rules = {"policy": tmp_path / "policy.yaml", "people": table}
    made = audit_files(*sides, tmp_path / "a", **rules)
    found = {finding["name"]: finding for finding in made["findings"]}
    assert made["verdict"] == "pass", made["reasons"]
    assert set(found["authenticity"]["detail"]["by_group"]) == {"A", "B"}
    assert set(found["copy_share_at_5_percent"]["detail"]["by_group"]) == {"A", "B"}
    page = (tmp_path / "a" / "report.html").read_text()
    for title in (
        "Membership attacks",
        "Linkage disequilibrium",
        "Principal components",
        "Site-frequency spectrum of rare",
    ):
        assert title in page
    assert "<strong>Internal.</strong>" in page
    rate = found["audit_false_positive_rate"]["detail"]
    assert "membership_auc_frequencies_homer" in rate["gates"]
    assert "window_copy_share_at_5_percent" in rate["gates_left_out"]
    assert not set(rate["gates"]) & set(rate["gates_left_out"])
    made = audit_files(*sides, tmp_path / "b", model=tmp_path / "run", **rules)
    assert made["verdict"] == "fail"
    assert any("membership_auc_model_likelihood" in reason for reason in made["reasons"])

    pool = haplotype_pool(read_panel(sides[0]))
    write_store(pool, tmp_path / "store")
    kind, pools, _, judges = load_pools(tmp_path / "store", *sides[1:])  # a store beside panels
    assert (kind, judges) == ("haplotypes", [])
    assert np.array_equal(pools["train"].data, pool.data)
    assert pools["holdout"].people == 80
    assert pools["synthetic"].position_bp.tolist() == pool.position_bp.tolist()


def test_inputs_that_do_not_fit_are_refused(stores, tmp_path):
    with pytest.raises(UsageError, match="leave --model out"):
        audit_files(*files(stores), tmp_path / "a", model=tmp_path)
    bits = Pool("bits", np.zeros((4, 1), np.uint64), np.array(list("abcd")), length=10)
    write_store(bits, tmp_path / "bits")
    with pytest.raises(InputError, match="one kind and width"):
        load_pools(stores / "train", stores / "holdout", tmp_path / "bits")
    for name, length, positions in (("x", 9, None), ("y", 10, np.arange(10) * 5), ("z", 10, np.arange(10) * 7)):
        write_store(Pool("bits", bits.data, bits.person, length=length, position_bp=positions), tmp_path / name)
    for other in ("x", "z"):
        with pytest.raises(InputError, match="the same sites on every side"):
            load_pools(tmp_path / "y", tmp_path / other, tmp_path / "y")
    pools = load_pools(tmp_path / "y", tmp_path / "bits", tmp_path / "y")[1]
    assert all(pool.position_bp is None for pool in pools.values())  # one side does not know them
    (tmp_path / "p.txt").write_text("")
    with pytest.raises(InputError, match="a store"):
        load_pools(tmp_path / "p.txt", stores / "holdout", stores / "synthetic")
