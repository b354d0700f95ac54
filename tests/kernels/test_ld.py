"""LD of pairs against brute force; the implementations against one another, bit for bit, at awkward sizes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import Unsupported, UsageError
from engine.kernels import ld

sys.path.insert(0, str(Path(__file__).parent))
from child_python import run_python
from ld_panels import (
    KINDS,
    SITES,
    brute,
    draw,
    linked,
    lost,
    measures,
    of_kind,
    pack,
    poison,
    positions,
    same,
)  # fmt: skip


@pytest.fixture(scope="module")
def compiled():
    """Everything is compiled before np.empty is replaced, which Numba would not recognise."""
    for kind in KINDS:
        bits, options = of_kind(kind, 3, 6)
        for measure in measures(kind):
            ld.matrix(bits, 6, measure=measure, **options)
        ld.matrix(bits, 6, bits, **options)
        ld.pairs(bits, 6, [0], [1], **options)
        ld.band(bits, 6, ld.window(3, sites=1), **options)


@pytest.fixture
def poisoned(compiled, monkeypatch):
    poison(monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_is_the_textbook(kind):
    bits, options = of_kind(kind, 21, 66)
    for measure in measures(kind):
        wanted = brute(bits, 66, measure, **options)
        assert np.isfinite(wanted).any()
        assert np.isnan(wanted).any() == (measure != "d" or KINDS[kind][1])
        got = ld.matrix(bits, 66, measure=measure, implementation="reference", **options)
        np.testing.assert_allclose(got, wanted, rtol=2e-7, atol=1e-8)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 2, 64, 66, 130])
def test_all_pairs_agree_bit_for_bit(kind, n):
    for sites in SITES:
        bits, options = of_kind(kind, sites, n, seed=sites)
        for measure in measures(kind):
            wanted = ld.matrix(bits, n, measure=measure, implementation="reference", **options)
            same(ld.matrix(bits, n, measure=measure, **options), wanted)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("n", [1, 63, 65, 131])
def test_odd_numbers_of_haplotypes(n):
    for sites in SITES:
        _, bits = draw(sites, n, seed=sites)
        same(ld.r2(bits, n), ld.r2(bits, n, implementation="reference"))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("others", [0, 1, 33, 65, 300])
def test_two_sets_agree_bit_for_bit(kind, others):
    bits, options = of_kind(kind, 67, 130)
    other, other_options = of_kind(kind, others, 130, seed=1)
    options["other_missing_mw"] = other_options["missing_lw"]
    for measure in measures(kind):
        wanted = ld.matrix(bits, 130, other, measure=measure, implementation="reference", **options)
        same(ld.matrix(bits, 130, other, measure=measure, **options), wanted)
    options["other_missing_mw"] = options["missing_lw"]
    same(ld.matrix(bits, 130, bits, **options), ld.matrix(bits, 130, **options | {"other_missing_mw": None}))


@pytest.mark.parametrize("unphased", [False, True])
def test_only_one_set_misses_something(unphased):
    bits, other = draw(40, 70)[1], draw(35, 70, seed=1)[1]
    for own, others in ((lost(40, 70), None), (None, lost(35, 70))):
        options = {"missing_lw": own, "other_missing_mw": others, "unphased": unphased}
        same(ld.r2(bits, 70, other, **options), ld.r2(bits, 70, other, **options, implementation="reference"))


@pytest.mark.parametrize("implementation", ["reference", "numba"])
@pytest.mark.parametrize("unphased", [False, True])
def test_a_plane_without_missing_changes_nothing(implementation, unphased):
    _, bits = draw(40, 70)
    whole, one = np.zeros_like(bits), np.zeros_like(bits)
    one[7, 0] = 1
    for measure in ("r2", "r", "d"):
        options = {"measure": measure, "unphased": unphased, "implementation": implementation}
        complete = ld.matrix(bits, 70, **options)
        same(ld.matrix(bits, 70, missing_lw=whole, **options), complete)
        with_one = ld.matrix(bits, 70, missing_lw=one, **options)  # the slow path, for pairs that miss nothing
        keep = np.arange(40) != 7
        same(with_one[np.ix_(keep, keep)], complete[np.ix_(keep, keep)])


def test_a_person_who_misses_one_allele_misses_the_genotype():
    _, bits = draw(20, 70)
    half = lost(20, 70)
    whole = (
        half
        | ((half & np.uint64(0x5555555555555555)) << np.uint64(1))
        | ((half >> np.uint64(1)) & np.uint64(0x5555555555555555))
    )
    same(ld.r2(bits, 70, missing_lw=half, unphased=True), ld.r2(bits, 70, missing_lw=whole, unphased=True))
    same(
        ld.r2(bits | half, 70, missing_lw=half), ld.r2(bits & ~half, 70, missing_lw=half)
    )  # what lies under it is not read


def test_into_a_given_array(tmp_path):
    _, bits = draw(300, 70)
    out = np.memmap(tmp_path / "r2", np.float32, "w+", shape=(300, 300))
    assert ld.matrix(bits, 70, out=out) is out
    same(np.asarray(out), ld.r2(bits, 70))
    views = np.full((302, 301), 7, dtype=np.float32)[1:301]  # rows that start at any place of a cache line
    for columns in (299, 300):
        cut = np.full(300 * columns + 3, 7, dtype=np.float32)
        target = cut[3:].reshape(300, columns)
        ld.matrix(bits, 70, bits[:columns], out=target)
        same(target.copy(), ld.r2(bits, 70, bits[:columns]))
        assert (cut[:3] == 7).all()
    with pytest.raises(UsageError, match="float32"):
        ld.matrix(bits, 70, out=views)


def test_more_words_than_are_counted_at_once():
    rng = np.random.default_rng(3)
    n = 64 * 2050 + 6
    bits = rng.integers(0, 2**64, (7, (n + 63) // 64), dtype=np.uint64)
    bits[:, -1] &= np.uint64(63)
    for unphased in (False, True):
        options = {"unphased": unphased, "missing_lw": bits[::-1] & bits}
        same(ld.r2(bits, n, unphased=unphased), ld.r2(bits, n, unphased=unphased, implementation="reference"))
        same(ld.r2(bits, n, **options), ld.r2(bits, n, **options, implementation="reference"))


@settings(max_examples=30, deadline=None)
@given(
    sites=st.integers(0, 70), people=st.integers(0, 100), seed=st.integers(0, 1000), kind=st.sampled_from(list(KINDS))
)
def test_any_size(sites, people, seed, kind):
    bits, options = of_kind(kind, sites, 2 * people, seed)
    for measure in measures(kind):
        wanted = ld.matrix(bits, 2 * people, measure=measure, implementation="reference", **options)
        same(ld.matrix(bits, 2 * people, measure=measure, **options), wanted)


def test_extremes():
    alleles = np.array([[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0] * 4, [1] * 4], dtype=np.uint8)
    bits = pack(alleles)
    r2 = ld.r2(bits, 4)
    assert r2[:3, :3].tolist() == [[1.0] * 3] * 3  # a perfect pair is exactly 1, whichever allele is named ALT
    assert r2[3, :4].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert np.isnan(r2[4:]).all()
    assert np.isnan(r2[:, 4:]).all()
    for measure in ("r", "d_prime"):
        assert ld.matrix(bits, 4, measure=measure)[0, :4].tolist() == [1.0, -1.0, 1.0, 0.0]
    assert ld.matrix(bits, 4, measure="d")[0].tolist() == [0.25, -0.25, 0.25, 0.0, 0.0, 0.0]


def test_composite_disequilibrium_of_random_pairs_is_near_d():
    """Under random mating half the covariance of dosages is D: 4,000 people from haplotypes paired at random."""
    rng = np.random.default_rng(0)
    first = rng.random(8000) < 0.4
    alleles = np.stack([first, np.where(rng.random(8000) < 0.7, first, rng.random(8000) < 0.3)])
    bits = pack(alleles.astype(np.uint8))
    d = ld.matrix(bits, 8000, measure="d")[0, 1]
    assert d > 0.1
    assert abs(ld.matrix(bits, 8000, measure="d", unphased=True)[0, 1] - d) < 0.01


@pytest.mark.parametrize("implementation", ["reference", "numba"])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_beyond_the_last_haplotype_do_not_count(implementation, kind):
    bits, options = of_kind(kind, 40, 70)
    tail = np.uint64(0xFFFFFFFFFFFFFFC0) * (np.arange(2) == 1).astype(np.uint64)
    dirty = bits | tail
    before = dirty.copy()
    clean_options = dict(options)
    if options["missing_lw"] is not None:
        options["missing_lw"] = options["missing_lw"] | tail
    same(ld.r2(dirty, 70, implementation=implementation, **options), ld.r2(bits, 70, **clean_options))
    got = ld.r2_pairs(dirty, 70, [0, 1], [2, 3], implementation=implementation, **options)
    same(got, ld.r2_pairs(bits, 70, [0, 1], [2, 3], **clean_options))
    same(dirty, before)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", [0, 1, 63, 65, 521])
def test_listed_pairs_are_cells_of_the_matrix(kind, pairs):
    bits, options = of_kind(kind, 45, 130)
    i, j = np.random.default_rng(pairs).integers(0, 45, (2, pairs))
    for measure in measures(kind):
        wanted = ld.matrix(bits, 130, measure=measure, **options)[i, j]
        same(ld.pairs(bits, 130, i, j, measure=measure, **options), wanted)
        same(ld.pairs(bits, 130, i, j, measure=measure, implementation="reference", **options), wanted)


@settings(max_examples=60, deadline=None)
@given(
    sites=st.none() | st.integers(0, 12),
    bp=st.none() | st.integers(0, 60),
    cm=st.none() | st.sampled_from([0.0, 0.1, 0.3, 0.7]),
    length=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_windows_by_brute_force(sites, bp, cm, length, seed):
    position_bp = positions(length, 200, seed)
    position_cm = np.cumsum(np.random.default_rng(seed).integers(0, 4, length) * 0.1)
    end_l = ld.window(length, sites=sites, bp=bp, cm=cm, position_bp=position_bp, position_cm=position_cm)
    for i in range(length):
        for j in range(i + 1, length):
            inside = (sites is None or j - i <= sites) and (bp is None or position_bp[j] - position_bp[i] <= bp)
            inside = inside and (cm is None or position_cm[j] - position_cm[i] <= cm)
            assert inside == (j < end_l[i])
    ld.checks.window_ends(end_l, length)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [0, 1, 5, 40, 1000])
def test_band_is_cut_from_the_matrix(kind, width):
    for sites in SITES:
        bits, options = of_kind(kind, sites, 66, seed=sites)
        end_l = ld.window(sites, sites=width, bp=300, position_bp=positions(sites, 3000))
        for measure in measures(kind):
            got = ld.band(bits, 66, end_l, measure=measure, **options)
            same(got, ld.band(bits, 66, end_l, measure=measure, implementation="reference", **options))
    assert got.shape[1] == int((end_l - np.arange(sites) - 1).max())


def test_thread_count_changes_nothing():
    bits = linked(600, 132)
    threads = numba.get_num_threads()
    results = []
    try:
        for count in sorted({1, threads}):
            numba.set_num_threads(count)
            results.append((ld.r2(bits, 131), ld.band(bits, 131, ld.window(600, sites=70))))
    finally:
        numba.set_num_threads(threads)
    for got, wanted in zip(results[-1], results[0]):
        same(got, wanted)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda b: ld.r2(b[0], 131), "two axes"),
        (lambda b: ld.r2(b.astype(np.int64), 131), "uint64"),
        (lambda b: ld.r2(b, 200), "4 words"),
        (lambda b: ld.r2(b, -1), "haplotypes"),
        (lambda b: ld.r2(b, 2**26 + 1), "haplotypes"),
        (lambda b: ld.r2(b, 131, b[:, :2]), "other_mw"),
        (lambda b: ld.r2(b, 131, other_missing_mw=b), "other_mw"),
        (lambda b: ld.r2(b, 131, missing_lw=b[:3]), "missing_lw"),
        (lambda b: ld.r2(b, 131, b, other_missing_mw=b[:, :2]), "other_missing_mw"),
        (lambda b: ld.r2(b, 131, unphased=True), "two haplotypes per person"),
        (lambda b: ld.r2(b.tolist(), 131), "NumPy"),
        (lambda b: ld.r2(b, 131, implementation="cuda"), "reference, numba or triton"),
        (lambda b: ld.matrix(b, 131, measure="D"), "measure"),
        (lambda b: ld.matrix(b, 131, out=np.zeros((20, 20))), "out as float32"),
        (lambda b: ld.matrix(b, 131, out=np.zeros((20, 40), np.float32)[:, ::2]), "contiguous"),
        (lambda b: ld.r2_pairs(b, 131, [0], [20]), r"\[0, 20\)"),
        (lambda b: ld.r2_pairs(b, 131, [-1], [2]), r"\[0, 20\)"),
        (lambda b: ld.r2_pairs(b, 131, [1, 2], [2]), "one length"),
        (lambda b: ld.r2_pairs(b, 131, [1.5], [2]), "integers"),
        (lambda b: ld.window(20, sites=-1), "0 or more sites"),
        (lambda b: ld.window(20, bp=10), "position_bp"),
        (lambda b: ld.window(20, cm=-1, position_cm=np.arange(20)), "position_cm"),
        (lambda b: ld.window(20, bp=10, position_bp=np.arange(20)[::-1]), "never falls"),
        (lambda b: ld.window(20, cm=1, position_cm=np.full(20, np.nan)), "finite"),
        (lambda b: ld.band(b, 131, np.arange(19)), "20 integers"),
        (lambda b: ld.band(b, 131, np.full(20, 21)), r"\[0, 20\]"),
        (lambda b: ld.band(b, 131, np.arange(20)[::-1]), "never falls"),
    ],
)
def test_bad_input_is_one_line(call, says):
    _, bits = draw(20, 131)
    with pytest.raises(UsageError, match=says) as caught:
        call(bits)
    assert "\n" not in str(caught.value)


def test_what_is_not_defined_is_refused():
    with pytest.raises(Unsupported, match="phased panel for d_prime"):
        ld.matrix(draw(5, 64)[1], 64, measure="d_prime", unphased=True)


def test_a_named_implementation_is_never_replaced():
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    _, bits = draw(5, 65)
    tensor = torch.from_numpy(bits.view(np.int64))
    with pytest.raises(Unsupported, match="triton"):
        ld.r2(bits, 65, implementation="triton")
    with pytest.raises(Unsupported, match="CUDA"):
        ld.r2(tensor, 65)
    with pytest.raises(Unsupported, match="numba"):
        ld.r2(tensor, 65, implementation="numba")


def test_avx2_path_is_right_and_compiled_functions_are_cached(tmp_path):
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from ld_panels import KINDS, of_kind
from engine.kernels import ld
from engine.kernels.bits import tiles
from engine.kernels.ld import numba_matrix
for kind in KINDS:
    bits, options = of_kind(kind, 300, 130)
    got = ld.r2(bits, 130, **options)
    assert np.array_equal(got, ld.r2(bits, 130, implementation="reference", **options), equal_nan=True), kind
assert np.array_equal(ld.prune(bits, 130, 0.2, sites=50), ld.prune(bits, 130, 0.2, sites=50, implementation="reference"))
code = "".join(tiles.and_tile.inspect_asm().values()) if not tiles.and_tile.stats.cache_hits else ""
print(json.dumps([tiles.WIDE, "zmm" in code, "ymm" in code, sum(numba_matrix._triangle_squares.stats.cache_hits.values())]))
"""
    variables = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    if not numba.core.codegen.get_host_cpu_features().count("+avx2"):
        pytest.skip("no AVX2 here")
    assert json.loads(run_python(code, **variables)) == [False, False, True, 0]
    assert json.loads(run_python(code, **variables))[3] == 1


def test_the_matrix_is_written_past_the_caches(tmp_path):
    """Streaming stores, and vectors of float64: what the speed of the matrix rests on."""
    from engine.kernels.bits import tiles

    if not tiles.WIDE:
        pytest.skip("no AVX-512 here")
    code = """
import numpy as np
from engine.kernels.ld import numba_matrix, numba_tiles
square = np.zeros((256, 272), np.float32)
numba_matrix._write(square, np.zeros((5, 5), np.float32), 0, 0)
print("vmovntps" in "".join(numba_matrix._write.inspect_asm().values()))
ones = np.ones(32)
numba_tiles._complete(0, 5.0, 1.0, ones, ones, ones, ones, np.zeros(1024, np.int32), square, 0, 0)
lines = "".join(numba_tiles._complete.inspect_asm().values()).splitlines()
# LLVM takes vectors of 512 bits on AMD and of 256 on Intel
print(any("vdivpd" in line and ("zmm" in line or "ymm" in line) for line in lines))
"""
    assert run_python(code, NUMBA_CACHE_DIR=str(tmp_path)).split() == ["True", "True"]
