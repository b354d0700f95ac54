"""The copying model's Triton kernels: in the interpreter against the reference, and compiled for GPUs that are not here."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from engine.kernels import haplotype_hmm

sys.path.insert(0, str(Path(__file__).parent))
from child_python import run_python
from triton_aot import compile_jobs, typed

IN_THE_INTERPRETER = (
    f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import triton_interpreter
"""
    + """
import numpy as np, torch
from engine.kernels import haplotype_hmm as hmm
from engine.kernels.haplotype_hmm import triton_gpu
for launch in triton_gpu.LAUNCH.values():
    if "tile" in launch:
        launch["tile"] = 32
triton_gpu.BUDGET = 4096  # batches of a target or two


def close(found, exact, dtype, name):
    if exact is None:
        assert found is None, name
        return
    assert found.dtype == getattr(torch, str(exact.dtype if exact.dtype == np.int32 else "float64" if "log" in name else dtype))
    loose = (2e-5, 1e-4) if dtype == "float32" else (1e-10, 1e-9)
    np.testing.assert_allclose(found.numpy(), exact, atol=loose[0], rtol=loose[1], err_msg=name)


for k, sites, n, groups, dtype in [(1, 3, 1, 0, "float32"), (65, 9, 3, 0, "float64"), (33, 7, 2, 3, "float32")]:
    rng = np.random.default_rng(k)
    words = rng.integers(0, 2**63, (sites, (k + 63) // 64), dtype=np.uint64)
    words[:, -1] &= np.uint64(2 ** (k % 64 or 64) - 1)
    target = rng.choice(np.array([0, 1, 255], np.uint8), (n, sites))
    switch, mismatch = rng.random(sites) * 0.3, rng.random(sites) * 0.1
    given = {"dtype": dtype}
    if groups:
        given["ancestry"] = hmm.Ancestry(rng.random(groups) + 0.1, rng.random((groups, k)) + 0.01, rng.random(sites) * 0.2)
    elif k > 1:
        given["exclude_ne"] = np.stack([np.full(n, -1), rng.integers(0, k, n)], axis=1)
    here = words, k, target, switch, mismatch
    there = torch.from_numpy(words.view(np.int64)), k, torch.from_numpy(target), switch, mismatch
    exact, tri = {"implementation": "reference", **given}, {"implementation": "triton", **given}
    close(hmm.log_likelihood(*there, **tri), hmm.log_likelihood(*here, **exact), dtype, "log")
    if not groups:
        plain = {"implementation": "triton", "dtype": dtype}
        found = hmm.log_likelihood(*there, **plain)
        close(found, hmm.log_likelihood(*here, implementation="reference"), dtype, "log of the uniform prior")
    labels, top = rng.integers(0, 3, k), min(2, k)
    found = hmm.posterior_sums(*there, label_k=labels, top=top, **tri)._asdict()
    for name, values in hmm.posterior_sums(*here, label_k=labels, top=top, **exact)._asdict().items():
        close(found[name], None if values is None else values, dtype, name)
    close(hmm.posterior(*there, **tri), hmm.posterior(*here, **exact), dtype, "posterior")
    for states in (hmm.forward_states, hmm.backward_states):
        found, wanted = states(*there, [2, 0], **tri), states(*here, [2, 0], **exact)
        close(found[0], wanted[0], dtype, states.__name__)
        close(found[1], wanted[1], dtype, "log")
    uniforms = rng.random((n, sites))
    found = hmm.posterior_paths(*there, uniforms, **tri)
    assert (found.numpy() == hmm.posterior_paths(*here, uniforms, **exact)).all()
# an impossible target beside a possible one
bits, target = torch.tensor([[2], [2]]), torch.tensor([[0, 0], [0, 1]], dtype=torch.uint8)
never = np.zeros(2)
for given in ({}, {"ancestry": hmm.Ancestry(np.ones(1), np.ones((1, 2)), never)}):
    found = hmm.posterior_sums(bits, 2, target, never, never, implementation="triton", **given)
    assert found.log_likelihood_n.tolist() == [np.log(0.5), -np.inf]
    assert hmm.log_likelihood(bits, 2, target, never, never, implementation="triton", **given)[1] == -np.inf
    assert torch.isnan(found.dosage_nl[1]).all() and not torch.isnan(found.dosage_nl[0]).any()
    paths = hmm.posterior_paths(bits, 2, target, never, never, np.full((2, 2), 0.7), implementation="triton", **given)
    assert paths.tolist() == [[0, 0], [-1, -1]]
# mosaics
triton_gpu.LAUNCH["materialise"]["sites"] = 8
for k, sites, n in [(3, 20, 33), (65, 17, 66), (5, 3, 0)]:
    rng = np.random.default_rng(n)
    words = rng.integers(0, 2**63, (sites, (k + 63) // 64), dtype=np.uint64)
    starts = [np.unique(np.append(rng.integers(0, 2 * sites, 5), 0)) for _ in range(n)]
    flips = [np.unique(rng.integers(0, 2 * sites, 3)) for _ in range(n)]
    offsets = [np.concatenate([[0], np.cumsum([len(x) for x in part])]).astype(np.int64) for part in (starts, flips)]
    join = lambda parts: np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64)
    runs = offsets[0], join(starts), rng.integers(0, k, offsets[0][-1]), offsets[1], join(flips)
    for first in (0, 5):
        exact = hmm.materialise(words, k, *runs, first_site=first, implementation="reference")
        found = hmm.materialise(torch.from_numpy(words.view(np.int64)), k, *runs, first_site=first, implementation="triton")
        assert (found.numpy().view(np.uint64) == exact).all(), (k, sites, n)
assert triton_gpu._register_words(5008) == (128, 32) and triton_gpu._register_words(64) == (2, 0)
assert triton_gpu._register_words(7 * 32) == (8, 0)
print("the same")
"""
)


def test_triton_equals_reference_in_the_interpreter():
    assert run_python(IN_THE_INTERPRETER, 900, TRITON_INTERPRET="1").endswith("the same")


def jobs(arch) -> list[dict]:
    made = []
    for state in ("*fp32", "*fp64"):
        common = (
            typed("*i32", "bits")
            | typed("*u8", "target")
            | typed("*fp64", "switch", "mismatch")
            | typed(state, "prior")
        )
        counts = typed("i32", "sites", "half_words", "prior_stride", "padded")
        strides = typed("i64", "state_stride", "row_stride")
        walk = (
            common
            | counts
            | strides
            | typed("*fp64", "redraw", "prior_a", "of_group", "mantissa")
            | typed("*i64", "exponent")
        )
        walk |= typed("i32", "first_site", "stop_site", "groups") | typed(state, "state")
        for uniform in (True, False):
            made.append({
                "kernel": "forward_kernel", "num_warps": 8,
                "signature": common | counts | typed("*fp64", "result") | typed("i32", "n_targets", "k"),
                "constexprs": {"TARGETS": 2, "WORDS": 128, "MORE_WORDS": 32, "UNIFORM": uniform, "FULL": True},
            })  # fmt: skip
        made.append({"kernel": "walk_kernel", "signature": walk, "constexprs": {"GROUPS": 4, "TILE": 1024}})
        outputs = ("dosage", "differs", "switched", "redrawn", "of_group_out", "of_label", "top_weight", "carry")
        smooth = walk | typed("*fp64", *outputs) | typed("*i32", "top_state", "label") | typed(state, "h", "gamma")
        smooth |= typed("i32", "k", "labels", "top") | typed("i64", "gamma_stride", "gamma_site_stride")
        for posterior in (True, False):
            made.append({
                "kernel": "smooth_kernel", "signature": smooth,
                "constexprs": {"GROUPS": 4, "TILE": 1024, "POSTERIOR": posterior},
            })  # fmt: skip
        draw = {name: walk[name] for name in walk if name.split("_ptr")[0] not in
                ("bits", "target", "mismatch", "mantissa", "exponent", "half_words")}  # fmt: skip
        draw |= typed("*fp64", "uniform") | typed("*i32", "path") | typed("i32", "k")
        made.append({"kernel": "draw_kernel", "signature": draw, "constexprs": {"GROUPS": 4, "TILE": 1024}})
    counts = typed("i32", "n_haplotypes", "sites", "half_words", "made_half_words", "first_site", "search_steps")
    mosaic = typed("*i32", "bits", "donor", "made") | typed("*i64", "offset", "start", "flip_offset", "flip") | counts
    made.append({"kernel": "materialise_kernel", "num_warps": 1, "signature": mosaic, "constexprs": {"SITES": 64}})
    return [job | {"module": "engine.kernels.haplotype_hmm.triton_kernels", "arch": arch} for job in made]


@pytest.mark.parametrize("arch", [80, 90, "gfx942"])
def test_triton_compiles_ahead_of_time(arch):
    for result in compile_jobs(jobs(arch)):
        assert "error" not in result, (result["kernel"], result["error"])
        assert len(result["assembly"]) > 1000
        if arch == 90:
            assert "st.local" not in result["assembly"], f"{result['kernel']} spills"


def test_triton_equals_reference_on_a_gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    rng = np.random.default_rng(4)
    for k, groups in ((5008, 0), (1500, 3)):
        sites, n = 400, 9
        words = rng.integers(0, 2**63, (sites, (k + 63) // 64), dtype=np.uint64)
        words[:, -1] &= np.uint64(2 ** (k % 64 or 64) - 1)
        target_nl = rng.choice(np.array([0, 1, 255], np.uint8), (n, sites))
        switch_l, mismatch_l = rng.random(sites) * 0.1, rng.random(sites) * 0.1
        given = {}
        if groups:
            given["ancestry"] = haplotype_hmm.Ancestry(
                np.ones(groups), rng.random((groups, k)), rng.random(sites) * 0.1
            )
        here = words, k, target_nl, switch_l, mismatch_l
        bits, targets = torch.from_numpy(words.view(np.int64)).cuda(), torch.from_numpy(target_nl).cuda()
        there = bits, k, targets, switch_l, mismatch_l
        exact = haplotype_hmm.posterior_sums(*here, label_k=np.arange(k) % 4, top=3, **given)
        found = haplotype_hmm.posterior_sums(*there, label_k=np.arange(k) % 4, top=3, **given)
        for name, values in exact._asdict().items():
            if values is not None and name != "top_state_nlm":
                np.testing.assert_allclose(getattr(found, name).cpu().numpy(), values, atol=1e-4, err_msg=name)
        log_n = haplotype_hmm.log_likelihood(*there, **given).cpu().numpy()
        np.testing.assert_allclose(log_n, exact.log_likelihood_n, atol=1e-4)
        uniforms = rng.random((n, sites))
        paths = haplotype_hmm.posterior_paths(*there, uniforms, **given).cpu().numpy()
        assert (paths == haplotype_hmm.posterior_paths(*here, uniforms, **given)).mean() > 0.999
    bank = haplotype_hmm.Bank(
        rng.random((4, sites)) * 0.1, rng.random((4, sites)) * 0.1 + 0.01, [-1, -1, 0, 2], [0, 0, 0.1, 0]
    )
    for given in ({}, {"exclude_ne": rng.integers(0, k, (n, 2))}):
        for exact, found in (
            (
                haplotype_hmm.bank_predict(*here[:3], bank, **given),
                haplotype_hmm.bank_predict(*there[:3], bank, **given),
            ),
            (haplotype_hmm.bank_counts(*here[:3], bank, **given), haplotype_hmm.bank_counts(*there[:3], bank, **given)),
        ):
            for values, same in zip(exact, found, strict=True):
                np.testing.assert_allclose(same.cpu().numpy(), values, rtol=1e-3, atol=1e-4)
