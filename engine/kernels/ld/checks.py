"""What the door takes in, checked: sites as one value, integers, positions, windows, and which implementation runs.

Every error is one line. What is computed is left to the implementations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from engine.errors import Unsupported, UsageError

if TYPE_CHECKING:
    from types import ModuleType

Implementation = Literal["reference", "numba", "triton"]
Measure = Literal["r2", "r", "d", "d_prime"]
Rule = Literal["plink1", "plink2"]
MEASURES = ("r2", "r", "d", "d_prime")
WHERE = "engine.kernels.ld"
MOST_HAPLOTYPES = 2**26  # products of n with counts must stay below 2**53 to be exact in float64
EPSILON = 2.0**-44  # what PLINK allows a frequency or a bound to be off by rounding


class Sites(NamedTuple):
    """Genotypes of L sites, as the implementations get them.

    bits_lw: (L, ceil(n / 64)) uint64, or torch int64 of the same bits; bits beyond haplotype n may be set.
    n: haplotypes. missing_lw: None, or the same shape, 1 = not called. unphased: count dosages of people 2 s, 2 s + 1.
    """

    bits_lw: Any
    n: int
    missing_lw: Any = None
    unphased: bool = False


class PruneRules(NamedTuple):
    """most: the bound on r2. order: "forward" or "backward". starts, ends: int64 (K,), windows [start, end) over the sites.
    loaded_l: bool (L,), sites that are ever compared; the others stay, even where they do not vary.
    """

    most: float
    order: str
    starts: np.ndarray
    ends: np.ndarray
    loaded_l: np.ndarray


class ClumpRules(NamedTuple):
    """candidates: int64, sites that may be an index, by rising p, then by place. joins_l: bool (L,), may join a clump. start_l,
    end_l: int64 (L,), window of each site as an index. least: r2 above it joins. likelihood: r2 of the most likely haplotype
    frequencies of unphased genotypes in place of r2 of dosages.
    """

    candidates: np.ndarray
    joins_l: np.ndarray
    start_l: np.ndarray
    end_l: np.ndarray
    least: float
    likelihood: bool


class BlockRules(NamedTuple):
    """position_bp: int64 (L,). min_maf: rarer sites are passed over. share: of the strong and recombining pairs of a block
    more are strong. max_bp, max_bp_of_two, max_bp_of_three: longest blocks of any number, of two, of three sites.
    """

    position_bp: np.ndarray
    min_maf: float
    share: float
    max_bp: int
    max_bp_of_two: int
    max_bp_of_three: int


def choose(array: Any, implementation: Implementation | None) -> ModuleType:
    """The module that runs: the named one, or the default for where `array` lies. A named one is never replaced."""
    is_numpy = isinstance(array, np.ndarray)
    if not is_numpy and not type(array).__module__.startswith("torch"):
        raise UsageError("a NumPy array or a torch tensor", type(array).__name__, WHERE)
    name = implementation or ("numba" if is_numpy else "triton")
    if name == "triton":
        if is_numpy:
            raise Unsupported("a torch tensor for triton", "a NumPy array", WHERE, "torch.from_numpy")
        from engine.kernels.ld import triton_gpu

        if array.device.type != "cuda" and not triton_gpu.INTERPRETED:
            raise Unsupported("a CUDA tensor for triton", f"a {array.device} tensor", WHERE, ".numpy() for the CPU")
        return triton_gpu
    if not is_numpy:
        raise Unsupported(f"a NumPy array for {name}", "a torch tensor", WHERE, ".cpu().numpy()")
    if name == "numba":
        from engine.kernels.ld import numba_cpu

        return numba_cpu
    if name == "reference":
        from engine.kernels.ld import reference

        return reference
    raise UsageError("implementation reference, numba or triton", repr(name), WHERE)


def sites(bits_lw: Any, n: int, missing_lw: Any, unphased: bool, name: str = "") -> Sites:
    """`Sites` of contiguous planes; `name` is "" or "other_" and stands in the errors."""
    last = "mw" if name else "lw"
    if not 0 <= n <= MOST_HAPLOTYPES:
        raise UsageError(f"0 to {MOST_HAPLOTYPES} haplotypes", str(n), WHERE)
    if unphased and n % 2:
        raise UsageError("two haplotypes per person for unphased genotypes", f"{n} haplotypes", WHERE)
    bits_lw = _plane(bits_lw, n, f"{name}{last}" if name else "bits_lw")
    if missing_lw is not None:
        label = f"{name}missing_{last}"
        if type(missing_lw) is not type(bits_lw) or missing_lw.shape != bits_lw.shape:
            got = f"{type(missing_lw).__name__} of shape {tuple(getattr(missing_lw, 'shape', ()))}"
            raise UsageError(f"{label} like the bits, {tuple(bits_lw.shape)}", got, WHERE)
        missing_lw = _plane(missing_lw, n, label)
    return Sites(bits_lw, int(n), missing_lw, bool(unphased))


def pair_of_sets(
    bits_lw: Any, n: int, other_mw: Any, missing_lw: Any, other_missing_mw: Any, unphased: bool
) -> tuple[Sites, Sites | None]:
    """The sites, and the second set or None."""
    first = sites(bits_lw, n, missing_lw, unphased)
    if other_mw is None:
        if other_missing_mw is not None:
            raise UsageError("other_mw beside other_missing_mw", "None", WHERE)
        return first, None
    if type(other_mw) is not type(bits_lw):
        raise UsageError(f"other_mw as {type(bits_lw).__name__}", type(other_mw).__name__, WHERE)
    return first, sites(other_mw, n, other_missing_mw, unphased, "other_")


def measure_name(measure: str, unphased: bool) -> Measure:
    """`measure`, where it is one and is defined for these genotypes."""
    if measure not in MEASURES:
        raise UsageError("measure " + ", ".join(MEASURES), repr(measure), WHERE)
    if measure == "d_prime" and unphased:
        raise Unsupported(
            "a phased panel for d_prime", "unphased", WHERE, "its bounds are those of haplotype frequencies; r, r2 or d"
        )
    return measure  # type: ignore[return-value]


def output(out: Any, shape: tuple[int, int], like: Any) -> None:
    """Whether `out` can be written into: float32 of this shape, rows one after the other, where the input lies."""
    kind = str(getattr(out, "dtype", type(out).__name__)).removeprefix("torch.")
    if kind != "float32" or tuple(out.shape) != shape:
        raise UsageError(f"out as float32 {shape}", f"{kind} {tuple(getattr(out, 'shape', ()))}", WHERE)
    is_numpy = isinstance(like, np.ndarray)
    if isinstance(out, np.ndarray) != is_numpy or not (out.flags.c_contiguous if is_numpy else out.is_contiguous()):
        raise UsageError("out contiguous and where the input lies", type(out).__name__, WHERE)


def integers(values: Any, like: Any, name: str) -> Any:
    """`values` as int64 (P,) where `like` lies."""
    if isinstance(like, np.ndarray):
        array = np.asarray(values)
        if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
            raise UsageError(f"{name} as one axis of integers", f"{array.dtype} {array.shape}", WHERE)
        return np.ascontiguousarray(array, dtype=np.int64)
    import torch

    tensor = torch.as_tensor(values)
    if tensor.ndim != 1 or (tensor.is_floating_point() and len(tensor)):
        raise UsageError(f"{name} as one axis of integers", f"{tensor.dtype} {tuple(tensor.shape)}", WHERE)
    return tensor.to(like.device, torch.int64).contiguous()


def numbers(values: Any, length: int | None, name: str, *, rising: bool = False) -> np.ndarray:
    """`values` as one axis of int64 or float64 in host memory, finite, of `length`; `rising`: it may never fall."""
    array = np.asarray(values.cpu() if hasattr(values, "cpu") else values)
    if array.ndim != 1 or (array.dtype.kind not in "iuf" and array.size):
        raise UsageError(f"{name} as one axis of numbers", f"{array.dtype} {array.shape}", WHERE)
    if length is not None and len(array) != length:
        raise UsageError(f"{length} values of {name}", str(len(array)), WHERE)
    array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
    if not np.isfinite(array).all():
        raise UsageError(f"finite {name}", "nan or infinity", WHERE)
    if rising and (array[1:] < array[:-1]).any():
        raise UsageError(f"{name} that never falls", "a falling one", WHERE, "one contig at a time, sorted")
    return array


def window_ends(end_l: Any, length: int) -> np.ndarray:
    """int64 (L,) in host memory: site i is compared with the sites in (i, end_l[i]); the ends never fall."""
    array = np.asarray(end_l.cpu() if hasattr(end_l, "cpu") else end_l)
    if array.shape != (length,) or (array.dtype.kind not in "iu" and array.size):
        raise UsageError(f"end_l as {length} integers", f"{array.dtype} {array.shape}", WHERE, "ld.window")
    array = np.ascontiguousarray(array, dtype=np.int64)
    if length and (array.min() < 0 or array.max() > length or (array[1:] < array[:-1]).any()):
        raise UsageError(f"end_l that never falls, in [0, {length}]", str(array[:4].tolist()), WHERE, "ld.window")
    return array


def prune_rules(
    length: int, most: float, sites: int | None, step: int, bp: int | None, position_bp: Any, rule: str
) -> PruneRules:
    """Windows as PLINK lays them: of sites, every `step`; of bp, each one that holds a site that none before it held."""
    if rule not in ("plink1", "plink2"):
        raise UsageError("rule plink1 or plink2", repr(rule), WHERE)
    if not 0 <= most < 1:
        raise UsageError("a bound on r2 in [0, 1)", str(most), WHERE)
    if (sites is None) == (bp is None):
        raise UsageError("a window in sites or in bp", "both" if bp is not None else "none", WHERE)
    order = "forward" if rule == "plink1" else "backward"
    if sites is not None:
        if not sites >= 2 or not 1 <= step <= sites:
            raise UsageError("a window of 2 or more sites, a step of 1 to the window", f"{sites}, {step}", WHERE)
        starts = (
            np.arange(0, max(length - sites, 0) + step, step, dtype=np.int64) if length > 1 else np.empty(0, np.int64)
        )
        ends = np.minimum(starts + sites, length)
        return PruneRules(most, order, starts, ends, np.full(length, length > 1))
    if step != 1:
        raise UsageError("a step of 1 for windows in bp", str(step), WHERE)
    if position_bp is None or bp is None or bp < 0:
        raise UsageError("position_bp beside bp, 0 or more", str(bp), WHERE)
    position_l = numbers(position_bp, length, "position_bp", rising=True)
    from_l = np.searchsorted(
        position_l, position_l - bp, side="left"
    ).tolist()  # first site within bp before, last after
    to_l = np.searchsorted(position_l, position_l + bp, side="right").tolist()
    chain, start = [], 0
    while start < length:
        end = to_l[start]
        chain.append((start, end))
        start = from_l[end] if end < length else length
    near = np.diff(position_l) <= bp
    loaded_l = np.concatenate([near, [False]]) | np.concatenate([[False], near]) if length else np.zeros(0, dtype=bool)
    windows = np.array(chain, dtype=np.int64).reshape(-1, 2)
    return PruneRules(most, order, windows[:, 0].copy(), windows[:, 1].copy(), loaded_l)


def clump_rules(
    length: int, p_l: Any, position_bp: Any, p1: float, p2: float, least: float, bp: int, rule: str, unphased: bool
) -> ClumpRules:
    """An index has p <= p1; what joins it has p < p2 (plink2: <=) or might have been an index; nan is no p-value."""
    if rule not in ("plink1", "plink2"):
        raise UsageError("rule plink1 or plink2", repr(rule), WHERE)
    if not (bp >= 0 and least >= 0):
        raise UsageError("bp and least of 0 or more", f"{bp}, {least}", WHERE)
    p = np.asarray(p_l.cpu() if hasattr(p_l, "cpu") else p_l, dtype=np.float64)
    if p.shape != (length,):
        raise UsageError(f"{length} p-values", f"shape {p.shape}", WHERE)
    if ((p < 0) | (p > 1)).any():
        raise UsageError("p-values in [0, 1]", f"{p[(p < 0) | (p > 1)][0]}", WHERE)
    position_l = numbers(position_bp, length, "position_bp", rising=True)
    candidates = np.flatnonzero(p <= p1)
    return ClumpRules(
        candidates=candidates[np.argsort(p[candidates], kind="stable")],
        joins_l=(p < p2 if rule == "plink1" else p <= p2) | (p <= p1),
        start_l=np.searchsorted(position_l, position_l - bp, side="left"),
        end_l=np.searchsorted(position_l, position_l + bp, side="right"),
        least=least if rule == "plink1" else least * (1 + EPSILON),
        likelihood=unphased and rule == "plink1",
    )


def block_rules(
    length: int, position_bp: Any, min_maf: float, share: float, max_bp: int, small_blocks_short: bool
) -> BlockRules:
    """Haploview's limits, as PLINK 1.9 has them."""
    if not (0 <= min_maf <= 0.5 and 0 < share < 1 and max_bp >= 0):
        raise UsageError(
            "min_maf in [0, 0.5], share in (0, 1), max_bp of 0 or more", f"{min_maf}, {share}, {max_bp}", WHERE
        )
    position_l = numbers(position_bp, length, "position_bp", rising=True)
    two, three = (20_000, 30_000) if small_blocks_short else (max_bp, max_bp)
    return BlockRules(position_l, min_maf, share + 2.0**-35, max_bp, min(two, max_bp), min(three, max_bp))


def index_pairs(i: Any, j: Any, like: Any, length: int) -> tuple[Any, Any]:
    """Two int64 vectors of one length, each in [0, length)."""
    i, j = integers(i, like, "i"), integers(j, like, "j")
    if i.shape != j.shape:
        raise UsageError("i and j of one length", f"{tuple(i.shape)} and {tuple(j.shape)}", WHERE)
    for name, index in (("i", i), ("j", j)):
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= length):
            raise UsageError(f"{name} in [0, {length})", f"{int(index.min())} to {int(index.max())}", WHERE)
    return i, j


def _plane(bits: Any, n: int, name: str) -> Any:
    """`bits` contiguous, its shape and type checked; torch uint64 is viewed as int64, which torch knows better."""
    if not hasattr(bits, "ndim") or bits.ndim != 2:
        raise UsageError(f"{name} with two axes", f"shape {tuple(getattr(bits, 'shape', ()))}", WHERE)
    if bits.shape[1] != (n + 63) // 64:
        raise UsageError(f"{name} of {(n + 63) // 64} words for {n} haplotypes", f"{bits.shape[1]} words", WHERE)
    kind = str(bits.dtype).removeprefix("torch.")
    if isinstance(bits, np.ndarray):
        if kind != "uint64":
            raise UsageError(f"{name} of type uint64", kind, WHERE)
        return np.ascontiguousarray(bits)
    if kind not in ("int64", "uint64"):
        raise UsageError(f"{name} of type int64 or uint64", kind, WHERE)
    import torch

    return bits.contiguous().view(torch.int64)
