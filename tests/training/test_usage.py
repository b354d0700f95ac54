"""Memory and energy: NVML is played by a stand-in, because there is no GPU where the tests run."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from engine.training.usage import gpu_joules, peak_memory_gib


class Nvml:
    """A card called GPU-1234 that has drawn 5,250 mJ."""

    def __init__(self, old: bool = False) -> None:
        self.old = old

    def nvmlDeviceGetHandleByUUID(self, name, handle):
        handle._obj.value = 7
        return 0 if name == b"GPU-1234" else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, millijoules):
        assert handle.value == 7
        ctypes.cast(millijoules, ctypes.POINTER(ctypes.c_ulonglong))[0] = 5250
        return 3 if self.old else 0


def test_energy_is_read_from_the_card_by_its_uuid(monkeypatch):
    device = torch.device("cuda")
    for uuid in ("1234", "GPU-1234"):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, uuid=uuid: SimpleNamespace(uuid=uuid))
        assert gpu_joules(device, Nvml()) == 5.25
    assert gpu_joules(device, Nvml(old=True)) is None  # a card without a counter
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="other"))
    assert gpu_joules(device, Nvml()) is None


def test_a_cpu_has_no_energy_and_some_memory():
    assert gpu_joules(torch.device("cpu"), Nvml()) is None
    before = peak_memory_gib(torch.device("cpu"))
    held = torch.ones(2**26)  # 256 MiB
    assert peak_memory_gib(torch.device("cpu")) >= max(before, 0.25)
    assert float(held[0]) == pytest.approx(1.0)
