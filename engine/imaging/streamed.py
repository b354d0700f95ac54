"""Decode and encode in a stream of planes: the whole-volume result within a stated budget of memory.

A network is written as a list of `Step`s. A pass pulls chunks of planes (first spatial axis) through generators; every
convolution keeps the two planes it still needs and waits for the next ones, so that nothing is computed twice for want of
a halo, and pads with zeros only where the volume ends. Group normalisation needs the statistics of its whole input before
its first output plane: one pass per normalisation gathers them, and the next one starts from the latest map that the
budget had room to keep, or, failing that, computes it again from an earlier one. With room for two maps nothing is
computed twice. The result differs from the network called on the whole volume by the order of summation only.

Several devices each take a slab of the first axis with the halo that the network's receptive field asks for, and add up
their statistics. A layer whose reach is the whole volume (attention) is refused.

It leaves to others: which volumes are worth it (`generate`), the layers themselves (`autoencoder`).
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import Unsupported, UsageError
from engine.imaging.autoencoder import (
    Autoencoder,
    Decoder,
    Encoder,
    ResidualBlock,
    convolve,
    depth_to_space,
    space_to_depth,
)

Kind = Literal["convolve", "normalise", "activate", "double", "double_linear", "fold", "unfold", "keep", "add"]
Shape = tuple[int, int, int, int]  # channels, d, h, w
_WORKSPACE = 2  # a convolution's input and output, each in the layout of the library and of the caller
_BYTES = 4


@dataclass(frozen=True)
class Step:
    """One operation of a network.

    Attributes:
        kind: "convolve" (1x1x1, or 3x3x3 with stride 1 or 2 and one voxel of padding), "normalise" (group normalisation),
            "activate" (SiLU), "double" and "double_linear" (upsampling by 2, nearest or trilinear), "fold" and "unfold"
            (space to depth and back), "keep" (what a later "add" adds, through its projection if it has one).
        module: nn.Conv3d, the normalisation (num_groups, eps, weight, bias), or the projection.
        factor: of fold and unfold. silu: of normalise, whether SiLU follows.
    """

    kind: Kind
    module: nn.Module | None = None
    factor: int = 1
    silu: bool = False


@dataclass(frozen=True)
class Plan:
    """How a network will be streamed.

    Attributes:
        chunk: planes of the input per chunk.
        working_bytes: what chunks and waiting planes take at most.
        kept: indices of the normalisations whose input is kept.
        peak_bytes: working_bytes and what is kept, at most; input and result not counted.
    """

    chunk: int
    working_bytes: int
    kept: tuple[int, ...]
    peak_bytes: int


def steps_of(network: nn.Module) -> list[Step]:
    """The steps of an `Encoder` or `Decoder`.

    Raises:
        Unsupported: a layer that cannot be streamed.
    """
    if isinstance(network, Encoder):
        return [Step("fold", factor=network.patch), *_sequence(network.layers)]
    if isinstance(network, Decoder):
        tail = [Step("unfold", factor=network.patch), Step("activate"), Step("convolve", network.smooth)]
        return [*_sequence(network.layers), *tail]
    raise Unsupported("an Encoder or a Decoder", type(network).__name__, "streamed")


def _sequence(layers: nn.Sequential) -> list[Step]:
    steps: list[Step] = []
    for layer in layers:
        if isinstance(layer, nn.Conv3d):
            steps.append(Step("convolve", layer))
        elif isinstance(layer, ResidualBlock):
            projection = None if isinstance(layer.skip, nn.Identity) else layer.skip
            steps += residual(layer.norm1, layer.conv1, layer.norm2, layer.conv2, projection)
        elif isinstance(layer, nn.GroupNorm):
            steps.append(Step("normalise", layer))
        elif isinstance(layer, nn.SiLU) and steps and steps[-1].kind == "normalise":
            steps[-1] = replace(steps[-1], silu=True)
        elif isinstance(layer, nn.Upsample) and layer.scale_factor == 2 and layer.mode == "nearest":
            steps.append(Step("double"))
        else:
            raise Unsupported(
                "layers of bounded reach", type(layer).__name__, "streamed", "a budget that holds the whole volume"
            )
    return steps


def residual(
    norm1: nn.Module, conv1: nn.Module, norm2: nn.Module, conv2: nn.Module, projection: nn.Module | None
) -> list[Step]:
    """norm, SiLU, convolution, twice, added to the (projected) input."""
    return [
        Step("keep"),
        Step("normalise", norm1, silu=True),
        Step("convolve", conv1),
        Step("normalise", norm2, silu=True),
        Step("convolve", conv2),
        Step("add", projection),
    ]


# --- what a volume of a given size takes ------------------------------------------------------------------------------


def shapes(steps: Sequence[Step], shape: Shape) -> list[Shape]:
    """Shape before every step and after the last: len(steps) + 1 entries."""
    found = [shape]
    for step in steps:
        c, *size = found[-1]
        if step.kind == "convolve":
            conv = _conv(step)
            c, size = conv.out_channels, [(n - 1) // conv.stride[0] + 1 for n in size]
        elif step.kind in ("double", "double_linear"):
            size = [2 * n for n in size]
        elif step.kind == "fold":
            c, size = c * step.factor**3, [n // step.factor for n in size]
        elif step.kind == "unfold":
            c, size = c // step.factor**3, [n * step.factor for n in size]
        found.append((c, *size))  # type: ignore[arg-type]
    return found


def partners(steps: Sequence[Step]) -> dict[int, int]:
    """Index of the "add" of every "keep"."""
    open_keeps: list[int] = []
    found = {}
    for index, step in enumerate(steps):
        if step.kind == "keep":
            open_keeps.append(index)
        elif step.kind == "add":
            found[open_keeps.pop()] = index
    return found


def make_plan(steps: Sequence[Step], shape: Shape, batch: int, budget_bytes: int, where: str = "streamed") -> Plan:
    """Chunk size and what is kept, within `budget_bytes` over input and result.

    Raises:
        UsageError: not even single planes fit; says what would.
    """
    at, pairs = shapes(steps, shape), partners(steps)
    plane = [batch * c * h * w * _BYTES for c, _, h, w in at]
    whole = [batch * c * d * h * w * _BYTES for c, d, h, w in at]

    def working(chunk: int) -> int:
        planes = [max(1, math.ceil(Fraction(chunk * s[1], shape[1]))) for s in at]
        # a convolution or a linear doubling waits for two planes, a branch as long as the convolutions beside it take
        waiting = sum(2 * plane[k] for k, step in enumerate(steps) if step.kind in ("convolve", "double_linear"))
        waiting += sum((planes[k] + 6) * plane[k] for k in pairs)
        busy = max((planes[k] + 2) * plane[k] + planes[k + 1] * plane[k + 1] for k in range(len(steps)))
        return waiting + _WORKSPACE * busy

    def live(index: int) -> int:  # the first normalisation of a block and the block's branch share their chunks
        return whole[index] + sum(whole[k] for k, end in pairs.items() if k + 1 < index < end)

    aligned = math.prod(step.factor for step in steps if step.kind == "fold")
    if working(aligned) > budget_bytes:
        raise UsageError(
            f"a memory budget of at least {working(aligned) / 1e9:.2g} GB for this size",
            f"{budget_bytes / 1e9:.2g} GB", where, "a larger sampling.memory_gb",
        )  # fmt: skip

    def keeping(chunk: int) -> tuple[tuple[int, ...], int]:
        """Normalisations whose input fits beside the chunks, and what the maps take at most."""
        kept, before, most = [], 0, 0
        for k in (k for k, step in enumerate(steps) if step.kind == "normalise"):
            needed = max(before, live(k))  # the old map is freed chunk by chunk as the new one grows
            if needed <= budget_bytes - working(chunk):
                kept.append(k)
                before, most = live(k), max(most, needed)
        return tuple(kept), most

    chunk = aligned  # larger chunks copy less; maps that are kept save whole passes, and go first
    while 2 * chunk <= shape[1] and working(2 * chunk) <= budget_bytes and keeping(2 * chunk)[0] == keeping(chunk)[0]:
        chunk *= 2
    kept, most = keeping(chunk)
    return Plan(chunk, working(chunk), kept, working(chunk) + most)


def whole_bytes(steps: Sequence[Step], shape_bcdhw: Sequence[int]) -> int:
    """Estimate of what the network called on a whole volume takes at its widest point, input and result not counted: the
    layer's input and output, each also in the library's own layout, and what residual blocks hold."""
    batch, *shape = shape_bcdhw
    whole = [batch * c * d * h * w * _BYTES for c, d, h, w in shapes(steps, tuple(shape))]  # type: ignore[arg-type]
    pairs = partners(steps)
    held = [sum(whole[i] for i, end in pairs.items() if i <= k < end) for k in range(len(steps))]
    return max(2 * (whole[k] + whole[k + 1]) + held[k] for k in range(len(steps)))


# --- one share of the first axis --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Span:
    """Planes start .. stop - 1 of a map that has `total`."""

    start: int
    stop: int
    total: int


def _after(step: Step, span: _Span) -> _Span:
    """Planes of the result that can be had from the planes `span` of the input."""
    start, stop, total = span.start, span.stop, span.total
    first, last = start == 0, stop == total
    if step.kind == "convolve" and _conv(step).kernel_size[0] == 3:
        stride = _conv(step).stride[0]
        made = (total - 1) // stride + 1
        return _Span(0 if first else -(-(start + 1) // stride), made if last else (stop - 2) // stride + 1, made)
    if step.kind == "double":
        return _Span(2 * start, 2 * stop, 2 * total)
    if step.kind == "double_linear":
        return _Span(0 if first else 2 * start + 2, 2 * total if last else 2 * stop - 2, 2 * total)
    if step.kind == "fold":
        return _Span(start // step.factor, stop // step.factor, total // step.factor)
    if step.kind == "unfold":
        return _Span(start * step.factor, stop * step.factor, total * step.factor)
    return span


@dataclass
class _Part:
    """One device's share: where its input comes from now, and what is known so far.

    Attributes:
        chunks: the map it starts from, as a list of chunks; branches: kept inputs of open residual blocks, by the index
            of their "add". at: index of the step that takes `chunks`; spans: planes of every map it sees.
        core: base planes it answers for; scale_k: (b, c, 1, 1, 1) factor and offset of every normalisation known so far.
    """

    steps: list[Step]
    device: torch.device
    spans: list[_Span]
    core: tuple[int, int]
    source: Callable[[], Iterator[Tensor]]
    at: int = 0
    branches: dict[int, deque[Tensor]] = field(default_factory=dict)
    chunks: deque[Tensor] | None = None
    scales: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def core_of(self, index: int) -> tuple[int, int]:
        """Planes of the map before step `index` that this part answers for."""
        total, base = self.spans[index].total, self.spans[0].total
        return self.core[0] * total // base, self.core[1] * total // base

    def stream(self, stop: int, free: bool) -> tuple[Iterator[Tensor], dict[int, deque[Tensor]]]:
        """Chunks of the map before step `stop`, and the inputs of residual blocks that are open there, by "add".

        free: what the part starts from is not needed again and given up chunk by chunk.
        """
        pairs = partners(self.steps)
        flow = self.source() if self.chunks is None else _handed_out(self.chunks, free)
        queues: dict[int, Iterator[Tensor]] = {end: _handed_out(q, free) for end, q in self.branches.items()}
        firsts = {end: self.spans[k].start for k, end in pairs.items()}
        open_here = dict(self.branches) if free else {end: deque(q) for end, q in self.branches.items()}
        for index in range(self.at, stop):
            step, span = self.steps[index], self.spans[index]
            if step.kind == "keep":
                queue: deque[Tensor] = deque()
                queues[pairs[index]] = _handed_out(queue, True)
                if pairs[index] < stop or free:
                    flow = _tapped(flow, queue)
                    open_here[pairs[index]] = queue
            elif step.kind == "add":
                skipped = self.spans[index].start - firsts[index]
                flow = _added(flow, queues[index], skipped, step.module)
                open_here.pop(index, None)
            elif step.kind == "normalise":
                flow = _normalised(flow, *self.scales[index], step.silu)
            elif step.kind == "convolve" and _conv(step).kernel_size[0] == 3:
                flow = _convolved(flow, _conv(step), span)
            elif step.kind == "double_linear":
                flow = _doubled(flow, span)
            else:
                flow = _each(flow, step)
        return flow, open_here


def _handed_out(chunks: deque[Tensor], free: bool) -> Iterator[Tensor]:
    if free:
        while chunks:
            yield chunks.popleft()
    else:
        yield from chunks


def _tapped(flow: Iterator[Tensor], queue: deque[Tensor]) -> Iterator[Tensor]:
    for x in flow:
        queue.append(x)
        yield x


def _each(flow: Iterator[Tensor], step: Step) -> Iterator[Tensor]:
    for x in flow:
        if step.kind == "convolve":
            x = _conv(step)(x)
        elif step.kind == "activate":
            x = F.silu(x)
        elif step.kind == "double":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = (space_to_depth if step.kind == "fold" else depth_to_space)(x, step.factor)
        handed = [x]
        del x  # a suspended generator must not hold what it has handed on
        yield handed.pop()


def _normalised(flow: Iterator[Tensor], scale: Tensor, offset: Tensor, silu: bool) -> Iterator[Tensor]:
    for x in flow:
        handed = [torch.addcmul(offset, x.float(), scale)]
        del x
        if silu:
            F.silu(handed[0], inplace=True)
        yield handed.pop()


def _convolved(flow: Iterator[Tensor], conv: nn.Conv3d, span: _Span) -> Iterator[Tensor]:
    """3x3x3 convolution of a stream: zeros stand before the first and after the last plane of the volume only."""
    stride = conv.stride[0]
    made = _after(Step("convolve", conv), span)
    late = 0 if span.start == 0 else stride * made.start - 1 - span.start  # planes before the first whole window
    held: Tensor | None = None
    for x in flow:
        if held is None:
            held = F.pad(x, (0, 0, 0, 0, 1, 0)) if span.start == 0 else x[:, :, late:]
        else:
            held = torch.cat([held, x], dim=2)
        del x
        windows = (held.shape[2] - 3) // stride + 1
        if windows > 0:
            handed = [convolve(held, conv.weight, conv.bias, conv.stride, (0, 1, 1))]
            held = held[:, :, stride * windows :].clone()
            yield handed.pop()
    if held is not None and span.stop == span.total:
        held = F.pad(held, (0, 0, 0, 0, 0, 1))
        if held.shape[2] >= 3:
            yield convolve(held, conv.weight, conv.bias, conv.stride, (0, 1, 1))


def _doubled(flow: Iterator[Tensor], span: _Span) -> Iterator[Tensor]:
    """Trilinear upsampling by 2 (corners not aligned); the volume's last plane continues itself."""
    held: Tensor | None = None
    for x in flow:
        if held is None:
            held = torch.cat([x[:, :, :1], x], dim=2) if span.start == 0 else x
        else:
            held = torch.cat([held, x], dim=2)
        del x
        if held.shape[2] >= 3:
            handed = [F.interpolate(held, scale_factor=2.0, mode="trilinear")[:, :, 2:-2]]
            held = held[:, :, -2:].clone()
            yield handed.pop()
    if held is not None and span.stop == span.total:
        held = torch.cat([held, held[:, :, -1:]], dim=2)
        yield F.interpolate(held, scale_factor=2.0, mode="trilinear")[:, :, 2:-2]


def _added(
    flow: Iterator[Tensor], branch: Iterator[Tensor], skipped: int, projection: nn.Module | None
) -> Iterator[Tensor]:
    """The stream plus the same planes of the branch, whose first `skipped` planes have no counterpart."""
    waiting: list[Tensor] = []
    for x in flow:
        while skipped or sum(w.shape[2] for w in waiting) < x.shape[2]:
            waiting.append(next(branch))
            if skipped:
                less = min(skipped, waiting[0].shape[2])
                skipped -= less
                waiting = [w for w in (waiting[0][:, :, less:], *waiting[1:]) if w.shape[2]]
        joined = torch.cat(waiting, dim=2) if len(waiting) > 1 else waiting[0]
        other = joined[:, :, : x.shape[2]]
        waiting = [joined[:, :, x.shape[2] :].clone()] if joined.shape[2] > x.shape[2] else []
        del joined
        handed = [(other if projection is None else projection(other)) + x]
        del other, x
        yield handed.pop()


# --- the whole --------------------------------------------------------------------------------------------------------


def run(
    steps: Sequence[Step],
    x_bcdhw: Tensor,
    *,
    budget_bytes: int,
    devices: Sequence[torch.device | str] | None = None,
    bf16: bool = False,
    where: str = "streamed",
) -> Tensor:
    """The steps on `x_bcdhw`, plane by plane: float32 on the CPU.

    Args:
        budget_bytes: for everything but `x_bcdhw` and the result, on each device.
        devices: the first axis is shared among them; default: where `x_bcdhw` lies.
        bf16: convolutions under autocast; statistics stay float32.

    Raises:
        UsageError: the budget holds not even single planes; says what would.
    """
    steps = list(steps)
    c, d, h, w = x_bcdhw.shape[1:]
    shape = (c, d, h, w)
    places = [torch.device(d) for d in devices or [x_bcdhw.device]]
    plan = make_plan(steps, shape, len(x_bcdhw), budget_bytes, where)
    parts = _parts(steps, x_bcdhw, plan.chunk, places)
    final = shapes(steps, shape)[-1]
    result = torch.empty((len(x_bcdhw), *final), dtype=torch.float32)

    def on_all(work: Callable[[_Part], Any]) -> list[Any]:
        def safely(part: _Part) -> Any:  # both contexts are a thread's own
            with torch.inference_mode(), torch.autocast(part.device.type, torch.bfloat16, enabled=bf16):
                return work(part)

        return [safely(parts[0])] if len(parts) == 1 else list(threads.map(safely, parts))

    with ThreadPoolExecutor(len(parts)) as threads:
        for index, step in enumerate(steps):
            if step.kind == "normalise":
                keep = index in plan.kept
                found = on_all(lambda part, k=index, keep=keep: _moments(part, k, keep))  # type: ignore[misc]
                mean, variance = _combined(found)
                for part in parts:
                    part.scales[index] = _scale(
                        part.steps[index].module, mean.to(part.device), variance.to(part.device)
                    )
        on_all(lambda part: _write(part, result))
    return result


def _parts(steps: list[Step], x_bcdhw: Tensor, chunk: int, places: list[torch.device]) -> list[_Part]:
    total, aligned = x_bcdhw.shape[2], math.prod(step.factor for step in steps if step.kind == "fold")
    ends = shapes(steps, tuple(x_bcdhw.shape[1:]))[-1][1]  # type: ignore[arg-type]
    coarse = math.gcd(total, ends)  # boundaries between parts are planes of every map
    places = places[: max(1, coarse)]
    bounds = [coarse * k // len(places) * (total // coarse) for k in range(len(places) + 1)]
    parts = []
    for place, start, stop in zip(places, bounds, bounds[1:]):
        halo = 0
        while True:
            first, last = max(0, start - halo), min(total, stop + halo)
            spans = [_Span(first, last, total)]
            for step in steps:
                spans.append(_after(step, spans[-1]))
            if spans[-1].start <= start * ends // total and spans[-1].stop >= stop * ends // total:
                break
            halo += aligned
        own = [replace(s, module=_on(s.module, place)) for s in steps] if len(places) > 1 else steps

        def source(first: int = first, last: int = last, place: torch.device = place) -> Iterator[Tensor]:
            for a in range(first, last, chunk):
                yield x_bcdhw[:, :, a : min(a + chunk, last)].to(place)

        parts.append(_Part(own, place, spans, (start, stop), source))
    return parts


def _on(module: nn.Module | None, place: torch.device) -> nn.Module | None:
    if module is None or all(p.device == place for p in module.parameters()):
        return module
    return copy.deepcopy(module).to(place)


def _moments(part: _Part, index: int, keep: bool) -> tuple[int, Tensor, Tensor]:
    """Count, mean and sum of squared deviations per (sample, group) of a part's core before the normalisation `index`.

    keep: the map is kept, and what the part started from given up.
    """
    groups = int(part.steps[index].module.num_groups)  # type: ignore[union-attr, arg-type]
    flow, branches = part.stream(index, keep)
    first, last = part.core_of(index)
    at, kept = part.spans[index].start, deque[Tensor]()
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for x in flow:
        inside = x[:, :, max(0, first - at) : max(0, last - at)]
        at += x.shape[2]
        if keep:
            kept.append(x)
        if inside.shape[2]:
            variance, middle = torch.var_mean(inside.float().reshape(len(x), groups, -1), dim=2, correction=0)
            n = inside[0].numel() // groups
            found = (n, middle.double().cpu(), variance.double().cpu() * n)
            count, mean, squares = found if count == 0 else _chan((count, mean, squares), found)
        del x, inside
    if keep:
        part.at, part.chunks, part.branches = index, kept, branches
    return count, mean, squares


def _chan(a: tuple[int, Tensor, Tensor], b: tuple[int, Tensor, Tensor]) -> tuple[int, Tensor, Tensor]:
    """Moments of two sets together (Chan, Golub and LeVeque 1979)."""
    n, difference = a[0] + b[0], b[1] - a[1]
    return n, a[1] + difference * (b[0] / n), a[2] + b[2] + difference.square() * (a[0] * b[0] / n)


def _combined(found: list[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    total = found[0]
    for more in found[1:]:
        total = _chan(total, more)
    return total[1], total[2] / total[0]


def _scale(norm: Any, mean_bg: Tensor, variance_bg: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and offset per (sample, channel), float32 (b, c, 1, 1, 1): normalised = x * factor + offset."""
    each = norm.weight.numel() // norm.num_groups
    inverse = (variance_bg + norm.eps).rsqrt().repeat_interleave(each, dim=1)
    factor = inverse * norm.weight.double()
    offset = norm.bias.double() - mean_bg.repeat_interleave(each, dim=1) * factor
    return factor.float()[:, :, None, None, None], offset.float()[:, :, None, None, None]


def _write(part: _Part, result: Tensor) -> None:
    flow, _ = part.stream(len(part.steps), True)
    first, last = part.core_of(len(part.steps))
    at = part.spans[-1].start
    for x in flow:
        a, b = max(at, first), min(at + x.shape[2], last)
        if a < b:
            result[:, :, a:b] = x[:, :, a - at : b - at].float()
        at += x.shape[2]
        del x


def _conv(step: Step) -> nn.Conv3d:
    """The convolution of a step, checked."""
    conv = step.module
    if not isinstance(conv, nn.Conv3d):
        raise Unsupported("a Conv3d", type(conv).__name__, "streamed")
    if (conv.kernel_size[0], conv.stride[0], int(conv.padding[0])) not in ((1, 1, 0), (3, 1, 1), (3, 2, 1)):
        raise Unsupported("3x3x3 convolutions with padding 1, stride 1 or 2, or 1x1x1", f"{conv}", "streamed")
    return conv


# --- the autoencoder --------------------------------------------------------------------------------------------------


def decode_plan(autoencoder: Autoencoder, shape_cdhw: Shape, budget_bytes: int, batch: int = 1) -> Plan:
    """What decoding latents of this shape takes."""
    return make_plan(steps_of(autoencoder.decoder), shape_cdhw, batch, budget_bytes, "decode")


def decode(
    autoencoder: Autoencoder,
    z_bcdhw: Tensor,
    *,
    budget_bytes: int,
    devices: Sequence[torch.device | str] | None = None,
    bf16: bool = False,
) -> Tensor:
    """As `Autoencoder.decode`, float32 (b, c, d, h, w), on the CPU; arguments as `run`."""
    steps = steps_of(autoencoder.decoder)
    return run(steps, z_bcdhw, budget_bytes=budget_bytes, devices=devices, bf16=bf16, where="decode")


def encode(
    autoencoder: Autoencoder,
    x_bcdhw: Tensor,
    *,
    budget_bytes: int,
    devices: Sequence[torch.device | str] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `Autoencoder.encode`: mean and deviation, float32, on the CPU; arguments as `run`."""
    steps = steps_of(autoencoder.encoder)
    mean, log_variance = run(steps, x_bcdhw, budget_bytes=budget_bytes, devices=devices, where="encode").chunk(2, dim=1)
    return mean, (0.5 * log_variance.clamp(-14.0, 6.0)).exp()
