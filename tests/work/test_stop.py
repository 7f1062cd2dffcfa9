"""The stop flag: one request however often it is passed on, an end at once for who asks again."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from megakd.errors import StoppedBySignal
from megakd.work.stop import StopFlag

ASKED_TWICE = """
import os, signal, sys, time
from megakd.work import stop
stop._SAME_REQUEST_SECONDS = float(sys.argv[1])
with stop.StopFlag() as flag:
    os.kill(os.getpid(), signal.SIGTERM)
    assert flag.is_set()
    time.sleep(0.05)
    os.kill(os.getpid(), int(sys.argv[2]))
    print("saved", flush=True)
"""


def ask_twice(same_request_seconds: float, second: signal.Signals) -> tuple[int, str]:
    command = [sys.executable, "-c", ASKED_TWICE, str(same_request_seconds), str(int(second))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_is_passed_on_is_the_same_request(second: signal.Signals) -> None:
    assert ask_twice(60.0, second) == (0, "saved\n")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_later_signal_ends_the_process_at_once(second: signal.Signals) -> None:
    assert ask_twice(0.01, second) == (-second, "")


def test_the_first_signal_is_told_and_earlier_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopFlag() as flag:
        flag.check()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StoppedBySignal, match="SIGINT"):
            flag.check()
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_has_no_handlers() -> None:
    seen: list[bool] = []

    def run() -> None:
        with StopFlag() as flag:
            seen.append(flag.is_set())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]
