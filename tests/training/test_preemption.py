"""Signals set a flag and nothing else; handlers are put back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from engine.training import preemption


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_sets_the_flag_and_names_itself(number):
    before = signal.getsignal(number)
    with preemption.watch() as flag:
        assert not flag
        os.kill(os.getpid(), number)
        assert flag
        assert flag.signal == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_exit_code_is_the_documented_one():
    assert preemption.Preempted("stopped").exit_code == 85


def test_outside_the_main_thread_nothing_is_installed():
    seen = []

    def work():
        with preemption.watch() as flag:
            seen.append((bool(flag), signal.getsignal(signal.SIGUSR1)))

    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
