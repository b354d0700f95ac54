"""Whole or streamed decoding gives the same bytes' worth of volume, and overlap changes neither order nor result."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from engine.errors import UsageError
from engine.imaging import decoding, streamed
from engine.imaging.generate import load_model, sample


@pytest.fixture(scope="module")
def model(tiny_run):
    return load_model(tiny_run, "cpu")


def test_a_small_budget_streams_and_gives_the_same_volume(model, monkeypatch):
    z = torch.randn(1, 2, 4, 4, 4)
    whole = decoding.decode(model.autoencoder, z, memory_gb=4.0)
    called = []
    monkeypatch.setattr(
        streamed, "decode", lambda *a, real=streamed.decode, **k: called.append(k["budget_bytes"]) or real(*a, **k)
    )
    again = decoding.decode(model.autoencoder, z, memory_gb=1e-3)
    assert called == [1_000_000] or not called
    tight = streamed.whole_bytes(streamed.steps_of(model.autoencoder.decoder), z.shape) / 1e9 - 1e-9
    made = decoding.decode(model.autoencoder, z, memory_gb=tight)
    assert called[-1] == int(tight * 1e9)
    for one in (again, made):
        assert one.shape == whole.shape == (1, 1, 16, 16, 16)
        assert one.dtype == np.float32
        assert np.abs(one - whole).max() < 1e-4 * np.abs(whole).max()
    with pytest.raises(UsageError, match="memory"):
        decoding.decode(model.autoencoder, z, memory_gb=1e-6)


def test_sampling_within_a_small_budget_is_the_same_volume(model):
    whole = [volume.array_cdhw for _, volume, _ in sample(model, 2, seed=4)]
    tight = streamed.whole_bytes(streamed.steps_of(model.autoencoder.decoder), (1, 2, 4, 4, 4)) / 1e9 - 1e-9
    for one, other in zip(whole, sample(model, 2, seed=4, memory_gb=tight)):
        assert np.abs(one - other[1].array_cdhw).max() < 1e-4 * 1000.0
        assert not np.array_equal(one, whole[1]) or one is whole[1]


def test_overlap_decodes_in_a_thread_in_order_and_alike(model):
    latents = [(k, torch.randn(1, 2, 4, 4, 4, generator=torch.manual_seed(k))) for k in range(4)]
    plain = list(decoding.decoded(latents, model.autoencoder, memory_gb=4.0, bf16=False, overlap=False))
    seen: list[tuple[str, int]] = []

    def drawn():
        for k, z in latents:
            seen.append((threading.current_thread().name, k))
            yield k, z

    overlapped = []
    for k, array in decoding.decoded(drawn(), model.autoencoder, memory_gb=4.0, bf16=False, overlap=True):
        overlapped.append((k, array))
        assert len(seen) <= k + 2  # one volume in the making while the next latent is drawn, no more
    assert [k for k, _ in overlapped] == [0, 1, 2, 3]
    for (_, one), (_, other) in zip(plain, overlapped):
        assert np.array_equal(one, other)


def test_a_fault_in_the_thread_reaches_the_caller(model):
    with pytest.raises(RuntimeError):
        list(
            decoding.decoded(
                [(0, torch.randn(1, 9, 4, 4, 4))], model.autoencoder, memory_gb=4.0, bf16=False, overlap=True
            )
        )
