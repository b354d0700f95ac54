"""Decode and encode plane by plane: equal to the whole volume without seams, within the stated budget, over several shares."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from engine.errors import Unsupported, UsageError
from engine.imaging import streamed
from engine.imaging.autoencoder import Autoencoder, Convolution
from engine.imaging.config import AutoencoderConfig
from engine.imaging.streamed import Step


def autoencoder(patch: int = 2, widths: tuple[int, ...] = (8, 16), blocks: int = 2, channels: int = 1) -> Autoencoder:
    """Random weights everywhere, the zero-initialised ones too, so that every layer reaches the output."""
    torch.manual_seed(0)
    model = Autoencoder(
        AutoencoderConfig(steps=1, patch=patch, widths=list(widths), blocks=blocks, latent_channels=3), channels
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def relative(streamed_one: torch.Tensor, whole: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return ((streamed_one - whole).abs().max() / whole.abs().max()).item()


def smallest_budget(network: nn.Module, shape: tuple[int, ...]) -> int:
    """The least budget that `run` accepts: asked of the error that states it, then met to one part in a hundred."""
    steps, low, high = streamed.steps_of(network), 1, 1 << 34
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        try:
            streamed.make_plan(steps, shape[1:], shape[0], middle)
            high = middle
        except UsageError:
            low = middle
    return high


@pytest.mark.parametrize(
    ("patch", "widths", "size"),
    [
        (2, (8, 16), (12, 5, 7)),
        (1, (8, 8, 16), (9, 4, 3)),
        (4, (8,), (6, 3, 5)),
        (2, (8, 16), (1, 1, 1)),
        (1, (8,), (2, 9, 4)),
    ],
)
@pytest.mark.parametrize("room", ["planes", "half", "all"])
def test_decode_equals_the_whole_volume(patch, widths, size, room):
    """One plane at a time, some maps kept, and all of them: within 1e-4 relative of the network called on the whole."""
    model = autoencoder(patch, widths)
    z = torch.randn(2, 3, *size)
    with torch.no_grad():
        whole = model.decode(z)
    least = smallest_budget(model.decoder, tuple(z.shape))
    most = streamed.whole_bytes(streamed.steps_of(model.decoder), z.shape)
    budget = {"planes": least, "half": max(least, most // 2), "all": 8 * max(least, most)}[room]
    made = streamed.decode(model, z, budget_bytes=budget)
    assert made.shape == whole.shape
    assert relative(made, whole) < 1e-4


@pytest.mark.parametrize(
    ("patch", "widths", "size"), [(2, (8, 16), (24, 12, 8)), (1, (8, 8, 16), (20, 8, 4)), (4, (8,), (12, 8, 16))]
)
@pytest.mark.parametrize("room", ["planes", "all"])
def test_encode_equals_the_whole_volume(patch, widths, size, room):
    model = autoencoder(patch, widths, channels=2)
    x = torch.randn(1, 2, *size)
    with torch.no_grad():
        whole = model.encode(x)
    least = smallest_budget(model.encoder, tuple(x.shape))
    made = streamed.encode(model, x, budget_bytes=least if room == "planes" else 1 << 32)
    for one, other in zip(made, whole):
        assert one.shape == other.shape
        assert relative(one, other) < 1e-4


@pytest.mark.parametrize("shares", [2, 3, 5, 40])
def test_several_devices_share_the_first_axis_without_a_seam(shares):
    """Shares of one volume on "several" devices (the CPU again and again), odd cuts and more shares than planes included."""
    model = autoencoder()
    z = torch.randn(1, 3, 14, 5, 4)
    with torch.no_grad():
        whole = model.decode(z)
    made = streamed.decode(model, z, budget_bytes=1 << 28, devices=["cpu"] * shares)
    assert relative(made, whole) < 1e-4
    x = torch.randn(1, 1, 40, 8, 8)
    with torch.no_grad():
        mean, _ = model.encode(x)
    assert relative(streamed.encode(model, x, budget_bytes=1 << 28, devices=["cpu"] * shares)[0], mean) < 1e-4


def test_statistics_of_the_whole_volume_are_what_removes_the_seams():
    """The same planes normalised piece by piece differ a hundred times more than is allowed: the comparison can fail."""
    model = autoencoder()
    z = torch.randn(1, 3, 12, 4, 4) * torch.linspace(0.2, 3.0, 12).view(1, 1, 12, 1, 1)
    with torch.no_grad():
        whole = model.decode(z)
        halves = torch.cat([model.decode(z[:, :, :6]), model.decode(z[:, :, 6:])], dim=2)
    assert relative(halves, whole) > 1e-2
    assert relative(streamed.decode(model, z, budget_bytes=1 << 28), whole) < 1e-4


def test_trilinear_doubling_and_strided_convolutions():
    """Steps that the autoencoder does not use in this order, those of MONAI's networks among them."""
    torch.manual_seed(0)
    first, second = nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 4, 3, stride=2, padding=1)
    norm, project = nn.GroupNorm(2, 4), nn.Conv3d(2, 4, 1)
    steps = [
        Step("keep"), Step("convolve", first), Step("add", project), Step("double_linear"), Step("normalise", norm),
        Step("activate"), Step("convolve", second), Step("double"),
    ]  # fmt: skip
    x = torch.randn(1, 2, 11, 5, 6)
    with torch.no_grad():
        h = first(x) + project(x)
        h = nn.functional.interpolate(h, scale_factor=2.0, mode="trilinear")
        whole = nn.functional.interpolate(second(nn.functional.silu(norm(h))), scale_factor=2.0, mode="nearest")
    for devices in (["cpu"], ["cpu"] * 2):
        made = streamed.run(steps, x, budget_bytes=1 << 26, devices=devices)
        assert relative(made, whole) < 1e-4


def test_bf16_differs_as_bf16_does_and_keeps_its_statistics_in_fp32():
    model = autoencoder()
    z = torch.randn(1, 3, 8, 4, 4)
    with torch.no_grad():
        whole = model.decode(z)
        with torch.autocast("cpu", torch.bfloat16):
            cast = model.decode(z).float()
    made = streamed.decode(model, z, budget_bytes=1 << 26, bf16=True)
    assert made.dtype == torch.float32
    assert 1e-5 < relative(made, whole) < 2 * relative(cast, whole) + 1e-2


def test_too_small_a_budget_states_what_would_do():
    model = autoencoder()
    z = torch.randn(1, 3, 8, 4, 4)
    with pytest.raises(UsageError, match=r"at least .* GB.*sampling.memory_gb"):
        streamed.decode(model, z, budget_bytes=1000)


def test_layers_of_unbounded_reach_are_refused():
    model = autoencoder()
    model.decoder.layers.append(nn.MultiheadAttention(8, 1))
    with pytest.raises(Unsupported, match="MultiheadAttention"):
        streamed.steps_of(model.decoder)
    with pytest.raises(Unsupported, match="Linear"):
        streamed.steps_of(nn.Linear(1, 1))
    with pytest.raises(Unsupported, match="3x3x3"):
        streamed.run(
            [Step("convolve", nn.Conv3d(1, 1, 5, padding=2))], torch.zeros(1, 1, 4, 4, 4), budget_bytes=1 << 20
        )


_MEASURE = """
import sys, threading, time, torch
from engine.imaging import decoding, streamed
from engine.imaging.autoencoder import Autoencoder
from engine.imaging.config import AutoencoderConfig

torch.set_num_threads(1)
model = Autoencoder(AutoencoderConfig(steps=1, widths=[16, 32], latent_channels=4)).eval()
steps, z, final = streamed.steps_of(model.decoder), torch.randn(1, 4, 40, 24, 24), 160 * 96 * 96 * 4


def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * 4096


def peak_of(work):
    before, highest, running = resident(), [0], [True]

    def watch():
        while running[0]:
            highest[0] = max(highest[0], resident())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    running[0] = False
    thread.join()
    return highest[0] - before - final


streamed.decode(model, torch.randn(1, 4, 4, 4, 4), budget_bytes=1 << 26)  # libraries warm up
for budget in map(int, sys.argv[1:]):
    planned = streamed.decode_plan(model, (4, 40, 24, 24), budget).peak_bytes
    print(peak_of(lambda: streamed.decode(model, z, budget_bytes=budget)), planned)
print(peak_of(lambda: decoding.decode(model, z, memory_gb=9)), streamed.whole_bytes(steps, z.shape))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_stays_within_the_budget():
    """Resident memory of a process of its own decoding 160 x 96 x 96, over input and result: within the plan, which is within
    the budget; the whole volume takes several times as much and no more than is estimated."""
    budgets = [20_000_000, 40_000_000]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }
    command = [sys.executable, "-c", _MEASURE, *map(str, budgets)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *streams, (whole, estimate) = [[int(n) for n in line.split()] for line in done.stdout.splitlines()]
    for budget, (peak, planned) in zip(budgets, streams):
        assert peak <= planned <= budget
    assert 3 * streams[0][0] < whole <= 1.25 * estimate


def test_small_maps_are_convolved_as_pytorch_would_and_not_by_its_unfolding(monkeypatch):
    """The engine's convolution without gradients equals PyTorch's; with them, and in double precision, it is PyTorch's."""
    torch.manual_seed(0)
    layer, x = Convolution(3, 5, 3, stride=2, padding=1), torch.randn(1, 3, 6, 7, 9)
    theirs = nn.functional.conv3d(x, layer.weight, layer.bias, 2, 1)
    assert layer(x).requires_grad
    with torch.no_grad():
        assert torch.allclose(layer(x), theirs, atol=1e-5)
        assert layer.double()(x.double()).dtype == torch.float64
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(layer.float()(x).float(), theirs, atol=5e-2)
        monkeypatch.setattr(torch.nn.functional, "conv3d", None)  # PyTorch's own is not asked
        assert layer(x).shape == theirs.shape
