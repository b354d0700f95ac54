"""Exact search of bits against loops over single bits, at awkward sizes, with ties, exclusions and poisoned outputs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import Unsupported, UsageError
from engine.kernels import bits, nearest
from engine.kernels.bits import lookups, tile_lookups

sys.path.insert(0, str(Path(__file__).parent))
from child_python import run_python
from nearest_cases import (
    EXCLUSIONS,
    brute_range,
    brute_run,
    brute_topk,
    draw,
    exclusions,
    features,
    genotype_planes,
    hamming_by_hand,
    ibs_by_hand,
    pack,
    people,
    same,
)

BITS = ((0, 5, 9), (5, 0, 9), (1, 1, 0), (1, 131, 65), (33, 64, 63), (70, 31, 130), (65, 101, 64))
PEOPLE = ((0, 5, 9), (5, 0, 9), (2, 3, 0), (1, 40, 65), (33, 7, 63), (7, 33, 64), (5, 9, 130))


@pytest.fixture(scope="module")
def compiled():
    """Everything is compiled before np.empty is replaced, which Numba would not recognise."""
    rows = pack(draw(3, 5))
    nearest.hamming_cross(rows, rows)
    nearest.hamming_topk(rows, rows, 1)
    nearest.hamming_range(rows, rows, 1)
    nearest.longest_run(rows, rows, 5, np.arange(5))
    nearest.ibs_topk((rows, rows, rows), (rows, rows, rows), 5, 1)
    with pytest.MonkeyPatch.context() as patch:  # columns of a wider matrix
        rows_and_tiles(patch)
        rows = pack(draw(65, 5))
        nearest.hamming_cross(rows, rows)
        nearest.ibs_cross((rows, rows, rows), (rows, rows, rows), 5)


@pytest.fixture
def poisoned(compiled, monkeypatch):
    """Memory from np.empty is full of ones, so that a cell that is never written is seen."""
    true_empty = np.empty

    def poisoned_empty(*args, **kwargs):
        array = true_empty(*args, **kwargs)
        array.view(np.uint8).reshape(-1)[:] = 0xA5
        return array

    monkeypatch.setattr(np, "empty", poisoned_empty)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("sites", [0, 1, 63, 64, 65, 131])
@pytest.mark.parametrize("rows", [(0, 5), (5, 0), (1, 1), (33, 31), (32, 64), (7, 101)])
def test_hamming_cross(rows, sites):
    query, database = draw(rows[0], sites, 1), draw(rows[1], sites, 2)
    wanted = hamming_by_hand(query, database)
    for implementation in ("reference", "numba"):
        same(nearest.hamming_cross(pack(query), pack(database), implementation=implementation), wanted)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", EXCLUSIONS)
def test_hamming_topk_and_range(kind):
    for n, m, sites in BITS:
        query, database = draw(n, sites, 1), draw(m, sites, 2)
        excluded = exclusions(kind, n, m)
        distance = hamming_by_hand(query, database)
        for implementation in ("reference", "numba"):
            chosen = excluded | {"implementation": implementation}
            for k in (1, 3, 200):
                wanted = brute_topk(distance, k, **excluded)
                same(nearest.hamming_topk(pack(query), pack(database), k, **chosen), wanted)
            for radius in (0, sites // 3, 10**12):
                wanted = brute_range(distance, radius, distance, **excluded)
                same(nearest.hamming_range(pack(query), pack(database), radius, **chosen), wanted)


@pytest.mark.skipif(not lookups.AVAILABLE, reason="no AVX2")
@pytest.mark.parametrize("rows", [1, 40, 300, 700])
def test_lookups_and_counts_give_the_same(rows, monkeypatch):
    """Strips of 256 queries and 512 rows at a time, more words than are looked up at once, rare, even and common bits."""
    rng = np.random.default_rng(rows)
    query, database = (
        pack((rng.random((n, 6_300)) < rng.choice([0.02, 0.5, 0.97], (n, 1))).astype(np.uint8)) for n in (rows, 1_000)
    )
    query[rows // 2] = database[3]
    database[[70, 600, 900]] = database[3]
    mine, theirs = ((bits_nw, bits_nw & np.roll(bits_nw, 1, axis=1), None) for bits_nw in (query, database))
    groups, few = (rng.integers(0, 9, rows), rng.integers(0, 9, 1_000)), database[:150]

    def everything():
        return [
            nearest.hamming_cross(query, database),
            nearest.hamming_cross(database, database),
            *nearest.hamming_topk(query, database, 12, exclude=groups),
            *nearest.hamming_topk(database, database, 3, exclude_self=True),
            *nearest.hamming_range(query, database, 3_100),
            *nearest.hamming_range(few, few, 0, exclude_self=True),
            *nearest.ibs_cross(mine, theirs, 6_290),
            *nearest.ibs_topk(mine, theirs, 6_290, 5),
        ]

    monkeypatch.setattr(tile_lookups, "WIDE", False)
    assert tile_lookups.preferred(query.shape[1])
    looked_up = everything()
    monkeypatch.setattr(lookups, "AVAILABLE", False)
    assert not tile_lookups.preferred(query.shape[1])
    for made, counted in zip(looked_up, everything(), strict=True):
        same(made, counted)
    few_alleles = bits.unpack(few, 6_300)
    same(looked_up[1][:150, :150], hamming_by_hand(few_alleles, few_alleles))


def test_hamming_counts_more_words_than_are_counted_at_once():
    rng = np.random.default_rng(5)
    query, database = (rng.integers(0, 2**64, (rows, 2050), dtype=np.uint64) for rows in (3, 35))
    same(nearest.hamming_cross(query, database), nearest.hamming_cross(query, database, implementation="reference"))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("small_tiles", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 65, 101, 161])
def test_a_set_against_itself(rows, small_tiles, monkeypatch):
    """Half of the pairs are counted; the other half, and tiles below the diagonal, are their mirror."""
    if small_tiles:
        rows_and_tiles(monkeypatch)
    haplotypes, (dosages, seen) = draw(rows, 131, 1), people(rows, 131, 2)
    packed, distance, shared = pack(haplotypes), *ibs_by_hand(dosages, seen, dosages, seen)
    same(nearest.hamming_cross(packed, packed), hamming_by_hand(haplotypes, haplotypes))
    same(nearest.hamming_cross(packed, packed[:]), hamming_by_hand(haplotypes, haplotypes))
    planes = genotype_planes(dosages, seen)
    same(nearest.ibs_cross(planes, planes, 131), (distance, shared))
    whole = genotype_planes(dosages)
    same(nearest.ibs_cross(planes, whole, 131), ibs_by_hand(dosages, seen, dosages, seen | True))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("missing", ["both", "query", "nobody"])
@pytest.mark.parametrize("kind", EXCLUSIONS)
def test_ibs(kind, missing):
    for n, m, sites in PEOPLE:
        (x, x_seen), (y, y_seen) = people(n, sites, 1), people(m, sites, 2)
        x_seen, y_seen = (
            seen | (missing not in who) for seen, who in ((x_seen, ("both", "query")), (y_seen, ("both",)))
        )
        distance, shared = ibs_by_hand(x, x_seen, y, y_seen)
        rank = (distance / (2.0 * np.maximum(shared, 1))).astype(np.float32)
        excluded = exclusions(kind, n, m)
        query = genotype_planes(x, None if missing == "nobody" else x_seen)
        database = genotype_planes(y, y_seen if missing == "both" else None)
        order = distance if missing == "nobody" else np.where(shared > 0, rank, np.inf)
        _, index = brute_topk(order, 5, **excluded)
        if missing != "nobody":
            index[np.isin(index, -1) | (order[np.arange(n)[:, None], index] == np.inf if m else True)] = -1
        at = np.arange(n)[:, None], np.maximum(index, 0)
        wanted = (
            *((np.where(index < 0, np.int32(-1), x[at] if m else -1).astype(np.int32)) for x in (distance, shared)),
            index,
        )
        for implementation in ("reference", "numba"):
            chosen = {"implementation": implementation}
            same(nearest.ibs_cross(query, database, sites, **chosen), (distance, shared))
            same(nearest.ibs_topk(query, database, sites, 5, **excluded, **chosen), wanted)
            for radius in (0, 0.15, 0.3, np.inf):
                inside = brute_range(
                    np.where(shared > 0, rank, np.nan), np.float32(radius), distance, shared, **excluded
                )
                same(nearest.ibs_range(query, database, sites, radius, **excluded, **chosen), inside)


def test_ibs_planes_come_from_dosage_planes():
    haplotypes = draw(14, 70, 3, noise=0.3)
    missing = np.random.default_rng(1).random(haplotypes.shape) < 0.1
    turned = [bits.transpose(bits.pack(x.T.astype(np.uint8)), 14) for x in (haplotypes, missing)]
    site_major = [bits.transpose(x, 70) for x in turned]
    planes = bits.dosage_planes(site_major[0], 14, site_major[1])
    people_major = nearest.ibs_planes(*(bits.transpose(plane, 7) for plane in planes))
    dosages, seen = haplotypes[::2] + haplotypes[1::2], ~(missing[::2] | missing[1::2])
    same(nearest.ibs_cross(people_major, people_major, 70), ibs_by_hand(dosages, seen, dosages, seen))


@pytest.mark.parametrize("missing", [0.0, 0.15])
def test_ibs_is_that_of_plink(tmp_path, missing):
    plink = shutil.which("plink1.9")
    if plink is None:
        pytest.skip("plink1.9 is not installed")
    dosages, _ = people(23, 301, 4)
    seen = np.random.default_rng(2).random(dosages.shape) >= missing
    calls = np.where(seen, dosages, 3)
    with (tmp_path / "a.ped").open("w") as ped:
        for person, row in enumerate(calls.tolist()):
            ped.write(f"f{person} i{person} 0 0 1 -9 {' '.join(('A A', 'A G', 'G G', '0 0')[x] for x in row)}\n")
    (tmp_path / "a.map").write_text("".join(f"1 s{site} 0 {site + 1}\n" for site in range(301)))
    command = [
        plink,
        "--file",
        "a",
        "--distance",
        "square",
        "ibs",
        "1-ibs",
        "flat-missing",
        "--out",
        "a",
        "--threads",
        "1",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    planes = genotype_planes(dosages, seen)
    distance, sites = nearest.ibs_cross(planes, planes, 301)
    share = distance / (2 * sites)
    np.testing.assert_allclose(np.loadtxt(tmp_path / "a.mdist"), share, atol=1e-5)  # six digits are printed
    np.testing.assert_allclose(np.loadtxt(tmp_path / "a.mibs"), 1 - share, atol=1e-5)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", EXCLUSIONS)
@pytest.mark.parametrize("span", [1, 40, 10**6])
def test_longest_run(kind, span):
    for n, m, sites in ((0, 5, 9), (5, 0, 9), (2, 3, 0), (3, 4, 1), (6, 9, 63), (6, 9, 64), (9, 6, 65), (7, 11, 331)):
        query, database = draw(n, sites, 1, noise=0.1), draw(m, sites, 2, noise=0.1)
        position_bp = np.sort(np.random.default_rng(sites).integers(0, span, sites))
        excluded = exclusions(kind, n, m)
        wanted = brute_run(query, database, position_bp, **excluded)
        for implementation in ("reference", "numba"):
            same(
                nearest.longest_run(
                    pack(query), pack(database), sites, position_bp, **excluded, implementation=implementation
                ),
                wanted,
            )


@settings(max_examples=80, deadline=None)
@given(sites=st.integers(1, 400), noise=st.sampled_from([0.01, 0.05, 0.3, 1.0]), seed=st.integers(0, 10**6))
def test_longest_run_with_uneven_positions(sites, noise, seed):
    """Positions in clumps, so that windows of every width are used."""
    rng = np.random.default_rng(seed)
    position_bp = np.cumsum(rng.choice([0, 1, 5, 1000], sites, p=[0.3, 0.3, 0.3, 0.1]))
    query, database = draw(2, sites, seed, noise), draw(6, sites, seed + 1, noise)
    same(nearest.longest_run(pack(query), pack(database), sites, position_bp), brute_run(query, database, position_bp))


def test_longest_run_ignores_bits_beyond_the_length_and_single_sites_count():
    query, database = pack(np.array([[1] * 10])), pack(np.array([[0] * 10, [0] * 9 + [1]]))
    got = nearest.longest_run(query | np.uint64(1 << 20), database, 10, np.arange(10) * 7)
    assert [int(x[0]) for x in got] == [0, 1, 1]
    nothing = nearest.longest_run(query, database[:1], 10, np.arange(10))
    assert [int(x[0]) for x in nothing] == [-1, 0, -1]


@settings(max_examples=60, deadline=None)
@given(
    sites=st.integers(1, 300),
    rows=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    number=st.integers(0, 30),
    k=st.sampled_from([1, 2, 50]),
    kind=st.sampled_from(EXCLUSIONS),
    seed=st.integers(0, 10**6),
)
def test_windows_are_searches_of_their_sites(sites, rows, number, k, kind, seed):
    rng = np.random.default_rng(seed)
    query, database = draw(rows[0], sites, seed), draw(rows[1], sites, seed + 1)
    start = rng.integers(0, sites, number)
    windows = np.stack([start, start + 1 + rng.integers(0, sites - start)], axis=1)
    excluded = exclusions(kind, *rows, seed)
    wanted = [np.empty((rows[0], number, k), dtype=kind) for kind in (np.int32, np.int64)]
    for v, (first, stop) in enumerate(windows):
        distance = hamming_by_hand(query[:, first:stop], database[:, first:stop])
        wanted[0][:, v], wanted[1][:, v] = brute_topk(distance, k, **excluded)
    for implementation in ("reference", "numba"):
        got = nearest.hamming_windows_topk(
            pack(query), pack(database), windows, k, **excluded, implementation=implementation
        )
        same(got, tuple(wanted))


def test_windows_hold_few_slots_and_count_each_segment_once():
    from engine.kernels.nearest.numba_windows import plan

    sliding = plan(np.array([(start, start + 400) for start in range(0, 100_000, 100)]))
    assert sliding.slots == 4
    assert sliding.word_e[-1] == 2 * 1003, "100,300 sites in segments of 100, two words each"
    gap = plan(np.array([(0, 64), (6400, 6464)]))
    assert gap.word_e[-1] == 2, "sites in no window have no words"


def rows_and_tiles(monkeypatch):
    """All searches with tiles of 32 rows on both sides."""
    from engine.kernels.nearest import numba_features, numba_hamming, numba_runs, numba_windows

    for module in (numba_features, numba_hamming, numba_runs, numba_windows):
        monkeypatch.setattr(module, "_QUERY_BYTES", 1)
        monkeypatch.setattr(module, "_DATABASE_BYTES", 1)


class Rows:
    """The least that a set must offer; counts what is read at a time."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.most = array, array.shape, array.dtype, 0

    def __getitem__(self, part):
        assert isinstance(part, slice)
        taken = self.array[part]
        self.most = max(self.most, len(taken))
        return taken


def test_no_set_need_fit_in_memory_and_tiles_change_nothing(tmp_path, monkeypatch):
    query, database = pack(draw(70, 131, 1)), pack(draw(150, 131, 2))
    windows, position_bp = np.array([(3, 70), (0, 131), (60, 64)]), np.arange(131) // 2
    dosages = [people(rows, 131, rows) for rows in (70, 150)]
    planes, whole = [genotype_planes(*x) for x in dosages], [genotype_planes(x) for x, _ in dosages]
    excluded = exclusions("both", 70, 150)

    def answers(q, d, p):
        yield nearest.hamming_topk(q, d, 7, **excluded)
        yield nearest.hamming_range(q, d, 20, **excluded)
        yield (nearest.hamming_cross(q, d),)
        yield nearest.longest_run(q, d, 131, position_bp, **excluded)
        yield nearest.hamming_windows_topk(q, d, windows, 3, **excluded)
        for side in p:
            yield nearest.ibs_topk(*side, 131, 7, **excluded)
            yield nearest.ibs_range(*side, 131, 0.2, **excluded)
            yield nearest.ibs_cross(*side, 131)

    wanted = list(answers(query, database, (planes, whole)))
    rows_and_tiles(monkeypatch)
    for got, want in zip(answers(query, database, (planes, whole)), wanted, strict=True):
        same(got, want)
    duck = [Rows(x) for x in (query, database)]
    ducks = [[tuple(x if x is None else Rows(x) for x in side) for side in pair] for pair in (planes, whole)]
    for got, want in zip(answers(*duck, ducks), wanted, strict=True):
        same(got, want)
    assert max(x.most for x in (*duck, *ducks[0][0], *ducks[1][1][:2])) == 32
    mapped = []
    for name, array in (("q", query), ("d", database)):
        array.tofile(tmp_path / name)
        mapped.append(np.memmap(tmp_path / name, dtype=np.uint64, mode="r", shape=array.shape))
    same(nearest.hamming_topk(*mapped, 7, **excluded), wanted[0])
    same(nearest.hamming_topk(query, mapped[1], 7, **excluded), wanted[0])
    zarr = pytest.importorskip("zarr")
    stored = zarr.create_array(str(tmp_path / "z"), shape=database.shape, dtype=database.dtype, chunks=(40, 2))
    stored[:] = database
    same(nearest.hamming_topk(query, stored, 7, **excluded), wanted[0])


def test_thread_count_changes_nothing():
    rows, table = pack(draw(150, 131)), features(150, 9, "ties", 1)
    planes, windows = genotype_planes(*people(150, 131)), np.array([(0, 60), (30, 131)])
    threads = numba.get_num_threads()
    results = []
    try:
        for count in sorted({1, threads}):
            numba.set_num_threads(count)
            results.append(
                nearest.hamming_topk(rows, rows, 5, exclude_self=True)
                + nearest.hamming_range(rows, rows, 30, exclude_self=True)
                + nearest.hamming_windows_topk(rows, rows, windows, 3, exclude_self=True)
                + nearest.ibs_topk(planes, planes, 131, 5, exclude_self=True)
                + nearest.ibs_range(planes, planes, 131, 0.2, exclude_self=True)
                + nearest.longest_run(rows, rows, 131, np.arange(131), exclude_self=True)
                + nearest.l2_topk(table, table, 5, exclude_self=True)
                + nearest.features_range(table, table, 5.0, metric="correlation", exclude_self=True)
            )
    finally:
        numba.set_num_threads(threads)
    same(results[-1], results[0])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda b: nearest.hamming_cross(b, b[0]), "two axes"),
        (lambda b: nearest.hamming_cross(b.astype(np.int64), b), "uint64"),
        (lambda b: nearest.hamming_cross(b, b[:, :1]), "equal width"),
        (lambda b: nearest.hamming_cross(b, b.tolist()), "one kind"),
        (lambda b: nearest.hamming_cross(b.tolist(), b), "an array or a torch tensor"),
        (lambda b: nearest.hamming_topk(b, b, 0), "k >= 1"),
        (lambda b: nearest.hamming_range(b, b, -1), "radius >= 0"),
        (lambda b: nearest.hamming_range(b, b, float("nan")), "radius >= 0"),
        (lambda b: nearest.hamming_topk(b, b, 1, exclude=(np.arange(5), np.arange(4))), "groups of 5"),
        (lambda b: nearest.hamming_topk(b, b, 1, exclude=(np.arange(5.0), np.arange(5))), "integers"),
        (lambda b: nearest.hamming_topk(b, b, 1, exclude=(np.arange(5),)), "query_group, database_group"),
        (lambda b: nearest.hamming_topk(b, b, 1, implementation="faiss"), "reference, numba or triton"),
        (lambda b: nearest.hamming_windows_topk(b, b, [(0, 129)], 1), "0 <= start < stop <= 128"),
        (lambda b: nearest.hamming_windows_topk(b, b, [(0, 9), (5, 5)], 1), "window 1"),
        (lambda b: nearest.hamming_windows_topk(b, b, [0, 5], 1), r"\(V, 2\)"),
        (lambda b: nearest.hamming_windows_topk(b, b, [(0.0, 5.0)], 1), "integers"),
        (lambda b: nearest.longest_run(b, b, 64, np.arange(64)), "1 words"),
        (lambda b: nearest.longest_run(b, b, 70, np.arange(69)), "70 positions"),
        (lambda b: nearest.longest_run(b, b, 70, np.arange(70)[::-1]), "never falls"),
        (lambda b: nearest.ibs_topk((b, b), (b, b, None), 70, 1), "planes"),
        (lambda b: nearest.ibs_topk((b, None, b), (b, b, None), 70, 1), "planes"),
        (lambda b: nearest.ibs_cross((b, b[:4], None), (b, b, None), 70), "one shape"),
        (lambda b: nearest.ibs_cross((b, b, None), (b, b, None), 64), "1 words"),
        (lambda b: nearest.ibs_range((b, b, None), (b, b, None), 70, -0.1), "radius >= 0"),
    ],
)
def test_bad_input_is_one_line(call, says):
    with pytest.raises(UsageError, match=says) as caught:
        call(pack(draw(5, 70)))
    assert "\n" not in str(caught.value)


def test_a_named_implementation_is_never_replaced():
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    rows = pack(draw(5, 70))
    tensor = torch.from_numpy(rows.view(np.int64))
    with pytest.raises(Unsupported, match="triton"):
        nearest.hamming_cross(rows, rows, implementation="triton")
    with pytest.raises(Unsupported, match="CUDA"):
        nearest.hamming_topk(tensor, tensor, 1)
    with pytest.raises(Unsupported, match="numba"):
        nearest.hamming_cross(tensor, tensor, implementation="numba")
    with pytest.raises(Unsupported, match="devices"):
        nearest.hamming_topk(rows, rows, 1, devices=["cuda:0"], implementation="numba")


def test_avx2_path(tmp_path):
    if "+avx2" not in numba.core.codegen.get_host_cpu_features():
        pytest.skip("no AVX2 here")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from nearest_cases import features, genotype_planes, pack, people, draw, same
from engine.kernels import nearest
from engine.kernels.bits import tiles
from engine.kernels.nearest import products
rng = np.random.default_rng(0)
query, database = (rng.integers(0, 2**64, (rows, 3), dtype=np.uint64) for rows in (37, 70))
wanted = nearest.hamming_cross(query, database, implementation="reference")
assert np.array_equal(nearest.hamming_cross(query, database), wanted)
assert not tiles.WIDE
code = "".join(tiles.xor_tile.inspect_asm().values())
assert "ymm" in code and "zmm" not in code and "vpopcnt" not in code
x, y = genotype_planes(*people(37, 131, 1)), genotype_planes(*people(70, 131, 2))
same(nearest.ibs_topk(x, y, 131, 5), nearest.ibs_topk(x, y, 131, 5, implementation="reference"))
assert products.FASTER == ("float32",) and products.COLUMNS == 16
table, more = features(20, 33, "normal", 1), features(131, 33, "normal", 2)
for product in (None, "int8", "bfloat16", "float32"):
    got = nearest.features_topk(table, more, 5, product=product)
    same(got, nearest.features_topk(table, more, 5, implementation="reference"))
print("done")
"""
    variables = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    assert run_python(code, **variables) == "done"
