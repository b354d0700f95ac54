"""Banks of chains on the GPU: in Triton's interpreter against the reference, and compiled for GPUs that are not here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parent))
from child_python import run_python
from triton_aot import compile_jobs, typed

IN_THE_INTERPRETER = (
    f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import triton_interpreter
import numpy as np, torch
from engine.errors import UsageError
from engine.kernels import haplotype_hmm as hmm
from engine.kernels.haplotype_hmm import triton_gpu
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True  # poisons torch.empty
triton_gpu.BUDGET = 1  # batches of one target
"""
    + """
def close(found, exact, dtype, name):
    for got, wanted in zip(found, exact, strict=True):
        assert str(got.dtype)[6:] == str(wanted.dtype), name
        loose = (2e-5, 1e-4) if dtype == "float32" else (1e-9, 2e-7)  # results are float32
        np.testing.assert_allclose(got.numpy(), wanted, atol=loose[0], rtol=loose[1], err_msg=name)


# haplotypes, their tile, sites, targets, parents: alone; a tile half full after a full one, two families that take turns,
# grandparents; three words in one tile of four, families of one and of two
for k, tile, sites, n, parent_c, dtype in [
    (1, 64, 3, 1, [-1], "float32"),
    (161, 128, 5, 2, [-1, -1, 0, 1, 2], "float32"),
    (67, 128, 4, 2, [-1, 0, -1], "float64"),
]:
    triton_gpu.LAUNCH["bank"]["tile"] = tile
    rng = np.random.default_rng(k)
    chains = len(parent_c)
    words = rng.integers(0, 2**63, (sites, (k + 63) // 64), dtype=np.uint64)
    words[:, -1] &= np.uint64(2 ** (k % 64) - 1)
    target = rng.choice(np.array([0, 1, 255], np.uint8), (n, sites), p=[0.4, 0.4, 0.2])
    target[0, :3] = 1, 255, 0
    bank = hmm.Bank(rng.uniform(0, 0.5, (chains, sites)), rng.uniform(0.01, 0.4, (chains, sites)), parent_c, rng.random(chains))
    bank.floor_c[-1] = 0
    bank.switch_cl[:, 2], bank.switch_cl[-1, 1] = 1, 0
    given = {"dtype": dtype}
    if k == 161:
        given["exclude_ne"] = np.array([[7, 160], [40, -1]])
    here = words, k, target, bank
    there = torch.from_numpy(words.view(np.int64)), k, torch.from_numpy(target), bank
    exact, tri = {"implementation": "reference", **given}, {"implementation": "triton", **given}
    wanted = hmm.bank_predict(*here, **exact)
    found = hmm.bank_predict(*there, **tri)
    close(found, wanted, dtype, "predictions")
    some = {"wanted_c": np.arange(chains) != 1}
    close(hmm.bank_counts(*there, **some, **tri), hmm.bank_counts(*here, **some, **exact), dtype, "counts")
    # in two goes, the alleles of the second not there yet
    drawn, state = torch.full((n, sites), 255, dtype=torch.uint8), hmm.bank_start(n, chains, k, dtype=dtype, device="cpu")
    for first, stop in ((0, 2), (2, sites)):
        drawn[:, first : stop - 1] = there[2][:, first : stop - 1]
        drawn[:, :first] = there[2][:, : first]
        given_state = {"state": state, "first_site": first, "stop_site": stop}
        for got, whole in zip(hmm.bank_predict(there[0], k, drawn, bank, **given_state, **tri), found):
            assert torch.equal(got, whole[:, first:stop]), "by stretches"
exact_state = hmm.bank_start(n, chains, k, dtype=dtype)
hmm.bank_predict(*here, state=exact_state, **exact)
np.testing.assert_allclose(state.state_nck.numpy(), exact_state.state_nck, atol=1e-12)
np.testing.assert_allclose(state.sums_nct.numpy(), exact_state.sums_nct, atol=1e-12)
for bad in (exact_state, state._replace(sums_nct=state.sums_nct.transpose(0, 1)), hmm.bank_start(n, chains, k, device="cpu")):
    try:
        hmm.bank_predict(*there, state=bad, **tri)
    except UsageError:
        continue
    raise AssertionError("a state that does not fit was taken")

# the one haplotype that agrees with the target is excluded: it has no part in the sums, however well it would do
words, target = np.full((12, 1), 4, np.uint64), np.ones((1, 12), np.uint8)
bank = hmm.Bank(np.full((1, 12), 1e-3), np.full((1, 12), 1e-4), [-1], [0])
here = words, 5, target, bank
there = torch.from_numpy(words.view(np.int64)), 5, torch.from_numpy(target), bank
given = {"exclude_ne": [[2]]}
close(hmm.bank_counts(*there, **given), hmm.bank_counts(*here, implementation="reference", **given), "float32", "alone")
none = hmm.bank_predict(there[0], 5, there[2][:0], bank)
assert none[0].shape == (0, 12, 1)
print("the same")
"""
)


def test_in_the_interpreter():
    assert run_python(IN_THE_INTERPRETER, 900, TRITON_INTERPRET="1").endswith("the same")


def jobs(arch) -> list[dict]:
    made = []
    strides = ("base_stride", "state_stride", "row_stride")
    for state in ("*fp32", "*fp64"):
        common = (
            typed("*i32", "bits", "parent")
            | typed("*u8", "target")
            | typed("*fp64", "switch", "mismatch", "floor", "sums")
        )
        common |= typed(state, "base", "state") | typed("i64", "state_stride", "row_stride")
        common |= typed(
            "i32", "first_site", "stop_site", "sites", "half_words", "k", "chains", "base_stride", "sums_stride"
        )
        walk = (
            common
            | typed("*i32", "member", "begin")
            | typed("*fp32", "logit", "donors")
            | typed("i32", "sums_row_stride")
        )
        retreat = (
            common | typed("*i32", "wanted") | typed(state, "back") | typed("*fp64", "carry") | typed("i32", "wanted")
        )
        retreat |= typed("*fp32", "switched", "differs")
        for uniform in (True, False):
            made.append({
                "kernel": "bank_walk_kernel", "signature": walk,
                "constexprs": {"MEMBERS": 8, "WORDS": 32, "UNIFORM": uniform, "PREDICT": uniform},
            })  # fmt: skip
        made.append({
            "kernel": "bank_retreat_kernel", "signature": retreat, "constexprs": {"WORDS": 32, "UNIFORM": False},
        })  # fmt: skip
    common = {"module": "engine.kernels.haplotype_hmm.triton_bank", "num_warps": 8, "divisible": strides}
    return [job | common | {"arch": arch} for job in made]


def test_compiles_ahead_of_time():
    results = compile_jobs([job for arch in (80, 90, "gfx942") for job in jobs(arch)])
    assert len(results) == 18
    for result in results:
        assert "error" not in result, (result["kernel"], result["arch"], result["error"])
        assert "atom." not in result["assembly"]
        if result["arch"] == 90:
            assert "st.local" not in result["assembly"], f"{result['kernel']} spills"
            vector = ("v4.b32", "v2.b64")  # states are read and written 16 bytes at a time
            assert any(f"ld.global.{one}" in result["assembly"] for one in vector), result["kernel"]
            assert any(f"st.global.{one}" in result["assembly"] for one in vector), result["kernel"]
