"""From latents to arrays: whole or in a stream of planes, whichever fits the budget, while the next latent is sampled.

A volume whose decoding is estimated to need more than the budget is streamed within it (`streamed`), on all GPUs where
there are several. With overlap a thread decodes one volume while the caller samples the next: on a GPU in a stream of its
own; on a CPU both share the cores, so that nothing is won there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.imaging import streamed
from engine.imaging.autoencoder import Autoencoder

Item = TypeVar("Item")


@torch.no_grad()
def decode(autoencoder: Autoencoder, z_bcdhw: Tensor, *, memory_gb: float, bf16: bool = False) -> np.ndarray:
    """Volumes of latents, float32 (b, c, d, h, w), on the host.

    Args:
        memory_gb: budget beyond latent and volume; see `streamed.whole_bytes` and `streamed.make_plan`.

    Raises:
        UsageError: the budget holds not even single planes; says what would.
    """
    budget = int(memory_gb * 1e9)
    if streamed.whole_bytes(streamed.steps_of(autoencoder.decoder), z_bcdhw.shape) <= budget:
        # channels last: convolutions without turning every map into their own layout and back
        z_bcdhw = z_bcdhw.contiguous(memory_format=torch.channels_last_3d)
        with torch.autocast(z_bcdhw.device.type, torch.bfloat16, enabled=bf16):
            return autoencoder.decode(z_bcdhw).float().contiguous().cpu().numpy()
    places: list[torch.device | str] = [z_bcdhw.device]
    if z_bcdhw.is_cuda:
        places = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    return streamed.decode(autoencoder, z_bcdhw, budget_bytes=budget, devices=places, bf16=bf16).numpy()


def decoded(
    latents: Iterable[tuple[Item, Tensor]], autoencoder: Autoencoder, *, memory_gb: float, bf16: bool, overlap: bool
) -> Iterator[tuple[Item, np.ndarray]]:
    """Every item with the decoded volume of its latent (1, c, d, h, w), in order; at most one volume is in the making
    while the next latent is drawn from `latents`."""

    def make(z: Tensor, ready: torch.cuda.Event | None) -> np.ndarray:
        with ExitStack() as stack:
            if ready is not None:
                stream = torch.cuda.Stream(z.device)
                stack.enter_context(torch.cuda.stream(stream))
                stream.wait_event(ready)
                z.record_stream(stream)
            return decode(autoencoder, z, memory_gb=memory_gb, bf16=bf16)[0]

    if not overlap:
        for item, z in latents:
            yield item, make(z, None)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as thread:
        waiting: tuple[Item, Future[np.ndarray]] | None = None
        for item, z in latents:
            ready = torch.cuda.current_stream(z.device).record_event() if z.is_cuda else None
            coming = thread.submit(make, z, ready)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = item, coming
        if waiting is not None:
            yield waiting[0], waiting[1].result()
