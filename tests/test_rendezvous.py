"""Where ranks are to meet and do not, one line says where and what to do."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Iterator

import pytest

from megakd.errors import UsageError
from megakd.layout import ParallelConfig
from megakd.parallel import _meet, init_parallel

LIMIT = datetime.timedelta(seconds=0.3)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment(monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_a_taken_port(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT=taken, RANK=0, WORLD_SIZE=1)
    with pytest.raises(
        ConnectionError, match=rf"rank 0 cannot listen at 127.0.0.1:{taken} .*free MASTER_PORT$"
    ) as error:
        _meet("gloo", LIMIT)
    assert "\n" not in str(error.value)


def test_nobody_there(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    environment(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=1, WORLD_SIZE=2)
    with pytest.raises(
        ConnectionError, match=rf"rank 1 of 2 met nobody at 127.0.0.1:{port} .*Connection refused; start"
    ):
        _meet("gloo", LIMIT)
    assert capfd.readouterr().err == "", "torch prints stacks where it is left to wait"


@pytest.mark.slow
def test_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    environment(monkeypatch, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=0, WORLD_SIZE=2)
    with pytest.raises(
        ConnectionError, match=rf"rank 0 of 2 did not meet all others at 127.0.0.1:{port} .*1/2 clients"
    ):
        _meet("gloo", LIMIT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"MASTER_PORT": "x", "RANK": 0}, "MASTER_PORT is 'x'; expected a number up to 65535: torchrun sets"),
        ({"MASTER_PORT": 70000, "RANK": 0}, "MASTER_PORT is '70000'"),
        ({"MASTER_PORT": 1234}, "RANK is not set"),
        ({"RANK": 0}, "MASTER_PORT is not set"),
    ],
)
def test_an_environment_that_does_not_say_where(
    values: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(monkeypatch, MASTER_ADDR="127.0.0.1", WORLD_SIZE=2, **values)
    with pytest.raises(UsageError, match=message):
        _meet("gloo", LIMIT)


def test_ranks_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, WORLD_SIZE=2)
    with pytest.raises(UsageError, match="WORLD_SIZE is 2 and MASTER_ADDR is not set"):
        init_parallel(ParallelConfig(), seed=1)
