"""Genotype bytes of one record to bits, 64 haplotypes at a time.

A genotype is two bytes as BCF stores it (VCF 4.3 specification, section 6.3.3): (allele + 1) << 1 | phase, 0 or 1 for an
allele that is not called, 0x81 for none (a haploid call). 64 such bytes are one vector; a comparison of it is one word of
`engine.kernels.bits`. Text is brought to the same bytes first (`text_to_bytes`), so that there is one way to decode.

Written in LLVM's vectors, so that it becomes 512-bit code where the processor has it and 256-bit code elsewhere.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

MOST_ALTS = 60  # beyond it (allele + 1) << 1 comes near the bytes that mean something else
_ABSENT = 0x81
_FIRST, _SECOND = (
    np.uint64(0x5555555555555555),
    np.uint64(0xAAAAAAAAAAAAAAAA),
)  # bits of a sample's first and second allele
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)

_BYTE, _WORD = ir.IntType(8), ir.IntType(64)
_BYTES = ir.VectorType(_BYTE, 64)
_PAIRS = ir.VectorType(ir.IntType(16), 32)
_LANES = ir.VectorType(ir.IntType(32), 64)
_intrinsic: Any = intrinsic  # called with one argument less than defined, which a type checker cannot know


def _same(value: int) -> ir.Constant:
    return ir.Constant(_BYTES, [value & 255] * 64)


def _spread(builder: Any, value: Any) -> Any:
    """A vector whose 64 bytes are the low byte of an integer."""
    one = builder.insert_element(
        ir.Constant(_BYTES, ir.Undefined), builder.trunc(value, _BYTE), ir.Constant(_LANES.element, 0)
    )
    return builder.shuffle_vector(one, ir.Constant(_BYTES, ir.Undefined), ir.Constant(_LANES, [0] * 64))


def _vector_at(builder: Any, start: Any, at: Any, kind: Any = _BYTES) -> Any:
    return builder.bitcast(builder.gep(start, [at]), kind.as_pointer())


def _mask(builder: Any, truth: Any) -> Any:
    return builder.bitcast(truth, _WORD)


def _reduce(builder: Any, operation: str, vector: Any) -> Any:
    kind = vector.type
    name = f"llvm.vector.reduce.{operation}.v{kind.count}i{kind.element.width}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind.element, [kind]), name)
    return builder.call(function, [vector])


def _loop(builder: Any, count: Any, starts: list[Any], body: Any) -> list[Any]:
    """`values = body(k, values)` for k < count, in registers."""
    entry = builder.block
    head, inside, done = (builder.append_basic_block(name) for name in ("head", "inside", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    k = builder.phi(_WORD)
    k.add_incoming(ir.Constant(_WORD, 0), entry)
    values = [builder.phi(start.type) for start in starts]
    for value, start in zip(values, starts):
        value.add_incoming(start, entry)
    builder.cbranch(builder.icmp_signed("<", k, count), inside, done)
    builder.position_at_end(inside)
    after = body(k, values)
    k.add_incoming(builder.add(k, ir.Constant(_WORD, 1)), builder.block)
    for value, new in zip(values, after):
        value.add_incoming(new, builder.block)
    builder.branch(head)
    builder.position_at_end(done)
    return values


@_intrinsic
def pointer(typingctx: Any, array: Any) -> Any:
    """First element of an array that outlives its use: a pointer is passed on without counting references."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@_intrinsic
def _alleles_to_words(typingctx: Any, gt: Any, at: Any, words: Any, alt: Any, out: Any, out_at: Any) -> Any:
    """Words of allele number `alt` from whole vectors, and whether anything but the usual was there:
    (largest allele number, 255 where one is missing or absent; nonzero where every second allele is phased).
    """
    signature = types.UniTuple(types.int64, 2)(gt, types.intp, types.intp, types.intp, out, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = _vector_at(builder, args[0], args[1])
        target = _vector_at(builder, args[4], args[5], _WORD)
        wanted = _spread(builder, builder.add(args[3], ir.Constant(_WORD, 1)))

        def body(k: Any, values: list[Any]) -> list[Any]:
            largest, phased = values
            v = builder.load(builder.gep(source, [k]), align=1)
            code = builder.lshr(v, _same(1))
            builder.store(_mask(builder, builder.icmp_unsigned("==", code, wanted)), builder.gep(target, [k]), align=8)
            number = builder.sub(code, _same(1))
            larger = builder.icmp_unsigned(">", number, largest)
            return [builder.select(larger, number, largest), builder.and_(phased, v)]

        largest, phased = _loop(builder, args[2], [_same(0), _same(255)], body)
        pairs = _reduce(builder, "and", builder.bitcast(phased, _PAIRS))
        result = [
            builder.zext(_reduce(builder, "umax", largest), _WORD),
            builder.zext(builder.and_(pairs, ir.Constant(pairs.type, 256)), _WORD),
        ]
        return cgutils.pack_array(builder, result)

    return signature, codegen


@_intrinsic
def _words_of(typingctx: Any, gt: Any, at: Any, most: Any) -> Any:
    """Of one vector: (missing, absent, phased, none of missing, absent and alleles 0 to `most`)."""
    signature = types.UniTuple(types.uint64, 4)(gt, types.intp, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = builder.load(_vector_at(builder, args[0], args[1]), align=1)
        code = builder.lshr(v, _same(1))
        most = _spread(builder, builder.add(args[2], ir.Constant(_WORD, 1)))
        absent = builder.icmp_unsigned("==", v, _same(_ABSENT))
        beyond = builder.and_(builder.icmp_unsigned(">", code, most), builder.not_(absent))
        phased = builder.icmp_unsigned("!=", builder.and_(v, _same(1)), _same(0))
        missing = builder.icmp_unsigned("==", code, _same(0))
        return cgutils.pack_array(builder, [_mask(builder, truth) for truth in (missing, absent, phased, beyond)])

    return signature, codegen


@_intrinsic
def _word_of_allele(typingctx: Any, gt: Any, at: Any, allele: Any) -> Any:
    """Where one vector has this allele."""
    signature = types.uint64(gt, types.intp, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = builder.load(_vector_at(builder, args[0], args[1]), align=1)
        wanted = _spread(builder, builder.add(args[2], ir.Constant(_WORD, 1)))
        return _mask(builder, builder.icmp_unsigned("==", builder.lshr(v, _same(1)), wanted))

    return signature, codegen


@_intrinsic
def text_to_bytes(typingctx: Any, text: Any, at: Any, groups: Any, out: Any, out_at: Any) -> Any:
    """Groups of 32 samples `a|b<TAB>` to genotype bytes; nonzero where a byte is none of 0-9 . | / and tab in its place."""
    signature = types.uint64(text, types.intp, types.intp, out, types.intp)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source = _vector_at(builder, args[0], args[1])
        target = _vector_at(builder, args[3], args[4])
        even = ir.Constant(_LANES, [2 * k for k in range(64)])
        odd = ir.Constant(_LANES, [2 * k + 1 for k in range(64)])
        phased, unphased = (ir.Constant(_BYTES, [ord(c), ord("\t")] * 32) for c in "|/")
        bar = ir.Constant(_BYTES, [ord("|"), 0] * 32)

        def body(k: Any, values: list[Any]) -> list[Any]:
            two = builder.shl(k, ir.Constant(_WORD, 1))
            a = builder.load(builder.gep(source, [two]), align=1)
            b = builder.load(builder.gep(source, [builder.add(two, ir.Constant(_WORD, 1))]), align=1)
            allele = builder.shuffle_vector(a, b, even)
            between = builder.shuffle_vector(a, b, odd)
            digit = builder.icmp_unsigned("<", builder.sub(allele, _same(ord("0"))), _same(10))
            known = builder.or_(digit, builder.icmp_unsigned("==", allele, _same(ord("."))))
            placed = builder.or_(
                builder.icmp_unsigned("==", between, phased), builder.icmp_unsigned("==", between, unphased)
            )
            # '.' (46) becomes 0, '0' (48) becomes 1: nothing that is valid lies between
            number = builder.select(digit, builder.sub(allele, _same(47)), _same(0))
            is_phased = builder.zext(builder.icmp_unsigned("==", between, bar), _BYTES)
            second = builder.shl(builder.bitcast(is_phased, _PAIRS), ir.Constant(_PAIRS, [8] * 32))
            value = builder.or_(builder.shl(number, _same(1)), builder.bitcast(second, _BYTES))
            builder.store(value, builder.gep(target, [k]), align=1)
            fine = _mask(builder, builder.and_(known, placed))
            return [builder.or_(values[0], builder.not_(fine))]

        return _loop(builder, args[2], [ir.Constant(_WORD, 0)], body)[0]

    return signature, codegen


@_intrinsic
def places_of(typingctx: Any, text: Any, at: Any, characters: Any) -> Any:
    """Of 64 bytes: where each of the literal `characters` is, and at last where digits are; uint64 each."""
    if not isinstance(characters, types.StringLiteral):
        return None
    wanted = characters.literal_value
    signature = types.UniTuple(types.uint64, len(wanted) + 1)(text, types.intp, characters)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        v = builder.load(_vector_at(builder, args[0], args[1]), align=1)
        found = [builder.icmp_unsigned("==", v, _same(ord(c))) for c in wanted]
        found.append(builder.icmp_unsigned("<", builder.sub(v, _same(ord("0"))), _same(10)))
        return cgutils.pack_array(builder, [_mask(builder, truth) for truth in found])

    return signature, codegen


@_intrinsic
def count_ones(typingctx: Any, word: Any) -> Any:
    return types.int64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


@_intrinsic
def lowest_one(typingctx: Any, word: Any) -> Any:
    """Place of the lowest one of a word that is not zero."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), codegen


@numba.njit(cache=True, nogil=True)
def decode(
    gt: Any,
    at: int,
    samples: int,
    ploidy: int,
    alts: int,
    row: int,
    words: int,
    bits: Any,
    missing: Any,
    seen: Any,
    kept: Any,
    found: Any,
) -> bool:
    """Genotype bytes gt[at:] of one record to rows `row`, `row` + 1, ... of the planes, one row per ALT.

    All but the numbers are pointers; 63 bytes behind the genotypes may be read.

    Args:
        ploidy: bytes per sample, 1 or 2.
        alts: number of ALT alleles, at most MOST_ALTS; without one there is one row all the same.
        words: of one row, ceil(2 samples / 64).
        missing: plane of missing alleles, zero before; written only where something is missing.
        seen: uint64 (3, W), by second allele's bit: seen diploid, seen haploid, seen haploid with a called allele.
        kept: uint64 (W,), second alleles of the samples that count for `phased`.
        found: uint8 (3,): something missing, an unphased heterozygote, all samples diploid in some record.

    Returns:
        False where a byte is none of those above; rows are then undefined, the rest is untouched.
    """
    full = samples // 32
    last = _ALL if samples % 32 == 0 else (np.uint64(1) << np.uint64(2 * (samples % 32))) - np.uint64(1)
    if ploidy == 2:
        largest, phased = _alleles_to_words(gt, at, full, 1, bits, row * words)
        usual = full == 0 or (largest <= alts and phased != 0)
        if usual and full < words:
            none, absent, phase, beyond = _words_of(gt, at + 64 * full, alts)
            usual = (none | absent | beyond | (~phase & _SECOND)) & last == 0
        if usual:
            for k in range(max(1, alts)):
                if k > 0:
                    _alleles_to_words(gt, at, full, k + 1, bits, (row + k) * words)
                if full < words:
                    word = _word_of_allele(gt, at + 64 * full, k + 1)
                    bits[(row + k) * words + full] = word & last
            found[2] = 1
            return True
    return _decode_unusual(gt, at, ploidy, alts, row, words, last, bits, missing, seen, kept, found)


@numba.njit(cache=True, nogil=True)
def _decode_unusual(
    gt: Any,
    at: int,
    ploidy: int,
    alts: int,
    row: int,
    words: int,
    last: Any,
    bits: Any,
    missing: Any,
    seen: Any,
    kept: Any,
    found: Any,
) -> bool:
    """`decode` where something is missing, absent or unphased; `last`: bits in use of a row's last word."""
    holes = np.uint64(0)
    for w in range(words):
        valid = last if w == words - 1 else _ALL
        none, absent, phase, beyond = _vector(gt, at, w, ploidy, alts)
        if (beyond | (absent & _FIRST)) & valid != 0:
            return False
        holes |= (none | absent) & valid
    for w in range(words):
        valid = last if w == words - 1 else _ALL
        none, absent, phase, beyond = _vector(gt, at, w, ploidy, alts)
        hole = none | absent
        first_called = (~hole & _FIRST) << np.uint64(1)
        single = (absent | (none & ~phase & first_called)) & _SECOND & valid
        seen[w] |= (~hole | (none & phase)) & _SECOND & valid
        seen[words + w] |= single
        seen[2 * words + w] |= single & first_called
        unphased = ~hole & first_called & ~phase & kept[w]
        for k in range(max(1, alts)):
            allele = _allele(gt, at, w, ploidy, k + 1) & valid
            bits[(row + k) * words + w] = allele
            if holes != 0:
                missing[(row + k) * words + w] = hole & valid
            if (allele ^ (allele << np.uint64(1))) & unphased != 0:
                found[1] = 1
    if holes != 0:
        found[0] = 1
    return True


@numba.njit(cache=True, nogil=True)
def _vector(gt: Any, at: int, w: int, ploidy: int, alts: int) -> tuple[Any, Any, Any, Any]:
    """`_words_of` for word `w` of a record; the second alleles of a haploid record are absent."""
    if ploidy == 2:
        return _words_of(gt, at + 64 * w, alts)
    none, absent, _, beyond = _words_of(gt, at + 32 * w, alts)
    return _double(none), _double(absent) | _SECOND, np.uint64(0), _double(beyond)


@numba.njit(cache=True, nogil=True)
def _allele(gt: Any, at: int, w: int, ploidy: int, allele: int) -> Any:
    if ploidy == 2:
        return _word_of_allele(gt, at + 64 * w, allele)
    return _double(_word_of_allele(gt, at + 32 * w, allele))


@numba.njit(cache=True, nogil=True)
def _double(word: Any) -> Any:
    """The low 32 bits, each moved to the first of its sample's two."""
    x = word & np.uint64(0xFFFFFFFF)
    x = (x | (x << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    x = (x | (x << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    x = (x | (x << np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    x = (x | (x << np.uint64(2))) & np.uint64(0x3333333333333333)
    return (x | (x << np.uint64(1))) & _FIRST
