"""Haplotypes that carry the same alleles over a short block of sites are one class there: the panel made smaller, exactly.

Within a block, the probability of copying haplotype k is (its probability before the block) * alpha + prior_k * c, with
alpha and c the same for all haplotypes that look alike: sites can then be walked class by class, and haplotypes are
touched once per block. This is the lossless state space reduction of minimac (Howie et al., Nature Genetics 44:955,
2012; Das et al., Nature Genetics 48:1284, 2016). 4,006 haplotypes of the 1000 Genomes have 67 classes over 32 SNPs.

Here blocks are chosen and classes are named; the recursions are elsewhere in this room. Blocks start at every eighth
site at most and hold up to 64 sites, so that a class's alleles are one word. A block grows while that makes the work
per site smaller, HAPLOTYPE_COST per haplotype and CLASS_COST per class and site.
"""

# mypy: disable-error-code="no-untyped-def"
# Functions compiled by Numba carry no annotations: their types are those of their arguments.

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from engine.kernels.haplotype_hmm.threads import in_threads

HAPLOTYPE_COST = 6.0
CLASS_COST = 5.0
MOST_CLASSES = 4096  # a block with more does not grow
STRETCH = 256  # sites that one thread cuts into blocks; a block does not cross its end
MOST_LABELS = 255  # 256 alleles of eight sites times the labels must fit in 16 bits


class Condensed(NamedTuple):
    """A panel by blocks and classes.

    block_b: int64 (B+1,), first site of each block, and L.
    class_bk: uint16 (rows, K), class of each haplotype, counted from 0 in each block; block b is row row_b[b].
    row_b: int64 (B,).
    offset_b: int64 (B+1,), classes of block b are offset_b[b] .. offset_b[b+1] - 1.
    pattern_c: uint64 (C,), bit j is the allele at the block's site j.
    label_c: int32 (C,), the label that all haplotypes of the class have.
    """

    block_b: np.ndarray
    class_bk: np.ndarray
    row_b: np.ndarray
    offset_b: np.ndarray
    pattern_c: np.ndarray
    label_c: np.ndarray


@njit(cache=True, nogil=True)
def transpose64(tile):
    """Transpose 64 words as a 64 x 64 bit matrix in place (Warren, Hacker's Delight, section 7-3)."""
    width = 32
    mask = np.uint64(0x00000000FFFFFFFF)
    while width > 0:
        shift = np.uint64(width)
        for block in range(0, 64, 2 * width):
            for i in range(block, block + width):
                swap = ((tile[i] >> shift) ^ tile[i + width]) & mask
                tile[i + width] ^= swap
                tile[i] ^= swap << shift
        width >>= 1
        mask ^= mask << np.uint64(width)


@njit(cache=True, nogil=True)
def _octets(reference_lw, first, stop, octet_ik):
    """octet_ik[i, k]: alleles of haplotype k at the eight sites from first + 8 i, one bit each; none beyond `stop`."""
    tile = np.empty(64, np.uint64)
    k = octet_ik.shape[1]
    for begin in range(first, stop, 64):
        rows = min(8, octet_ik.shape[0] - (begin - first) // 8)
        for word in range(reference_lw.shape[1]):
            for i in range(64):
                tile[i] = reference_lw[begin + i, word] if begin + i < stop else np.uint64(0)
            transpose64(tile)
            for row in range(rows):
                to = octet_ik[(begin - first) // 8 + row, 64 * word : min(k, 64 * word + 64)]
                for i in range(len(to)):
                    to[i] = np.uint8(tile[i] >> np.uint64(8 * row))


@njit(cache=True, nogil=True)
def _refine(class_k, octet_k, finer_k, name, start):
    """Classes split by eight more alleles, numbered by first appearance; how many there are now.

    `name` is scratch of 256 places per old class: a number below `start` is of an earlier call and means nothing.
    """
    found = start
    for k in range(len(class_k)):
        key = np.uint64(256) * np.uint64(class_k[k]) + np.uint64(octet_k[k])
        own = name[key]
        if own < start:
            own = found
            name[key] = found
            found += 1
        finer_k[k] = own - start
    return found - start


@njit(cache=True, nogil=True)
def _cut(begin, end, reference_lw, label_k, labels, size_sb, classes_sb, class_bk):
    """Blocks of each stretch: their sites, numbers of classes and classes, at most STRETCH // 8 of each."""
    sites, k = len(reference_lw), len(label_k)
    per_stretch = STRETCH // 8
    name, start = np.zeros(256 * max(labels, MOST_CLASSES), np.int64), 1
    for s in range(begin, end):
        first = s * STRETCH
        stop = min(sites, first + STRETCH)
        octet_ik = np.empty(((stop - first + 7) // 8, k), np.uint8)
        _octets(reference_lw, first, stop, octet_ik)
        classes_k, finer_k = np.empty(k, np.int32), np.empty(k, np.int32)
        row, block = 0, 0
        while row < len(octet_ik):
            classes = _refine(label_k, octet_ik[row], classes_k, name, start)
            start += classes
            width = 1
            while row + width < len(octet_ik) and width < 8 and classes <= MOST_CLASSES:
                finer = _refine(classes_k, octet_ik[row + width], finer_k, name, start)
                start += finer
                old = HAPLOTYPE_COST * k / (8 * width) + CLASS_COST * classes
                new = HAPLOTYPE_COST * k / (8 * width + 8) + CLASS_COST * finer
                if new > old or finer > 65535:
                    break
                classes_k, finer_k = finer_k, classes_k
                classes = finer
                width += 1
            to = class_bk[s * per_stretch + block]
            for i in range(k):
                to[i] = classes_k[i]
            classes_sb[s, block] = classes
            size_sb[s, block] = min(8 * width, stop - first - 8 * row)
            row += width
            block += 1


@njit(cache=True, nogil=True)
def _describe(begin, end, reference_lw, label_k, block_b, row_b, offset_b, class_bk, pattern_c, label_c):
    """Alleles and label of each class, from one of its haplotypes."""
    for b in range(begin, end):
        classes = offset_b[b + 1] - offset_b[b]
        member = np.empty(classes, np.int64)
        of_k = class_bk[row_b[b]]
        for k in range(len(of_k)):
            member[of_k[k]] = k
        for c in range(classes):
            k = member[c]
            pattern = np.uint64(0)
            for site in range(block_b[b], block_b[b + 1]):
                bit = (reference_lw[site, k >> 6] >> np.uint64(k & 63)) & np.uint64(1)
                pattern |= bit << np.uint64(site - block_b[b])
            pattern_c[offset_b[b] + c] = pattern
            label_c[offset_b[b] + c] = label_k[k]


def condense(reference_lw: np.ndarray, k: int, label_k: np.ndarray | None = None, labels: int = 1) -> Condensed:
    """Blocks and classes of a panel; with labels (int32 (K,), 0 .. labels-1, at most MOST_LABELS) no class has two.

    About as much work as one target walked directly through three times the sites. Memory: 2 K bytes per block.
    """
    label_k = np.zeros(k, np.int32) if label_k is None else label_k
    stretches = (len(reference_lw) + STRETCH - 1) // STRETCH
    size_sb = np.zeros((stretches, STRETCH // 8), np.int64)
    classes_sb = np.zeros((stretches, STRETCH // 8), np.int64)
    class_bk = np.empty((stretches * (STRETCH // 8), k), np.uint16)  # rows that are not needed are never touched
    in_threads(_cut, stretches, reference_lw, label_k, labels, size_sb, classes_sb, class_bk)
    row_b = np.flatnonzero(size_sb)
    block_b = np.concatenate([[0], np.cumsum(size_sb.ravel()[row_b])]).astype(np.int64)
    offset_b = np.concatenate([[0], np.cumsum(classes_sb.ravel()[row_b])]).astype(np.int64)
    pattern_c, label_c = np.empty(offset_b[-1], np.uint64), np.empty(offset_b[-1], np.int32)
    in_threads(_describe, len(row_b), reference_lw, label_k, block_b, row_b, offset_b, class_bk, pattern_c, label_c)
    return Condensed(block_b, class_bk, row_b, offset_b, pattern_c, label_c)
