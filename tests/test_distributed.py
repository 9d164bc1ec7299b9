"""gpt2/distributed.py: what ranks find out about each other before they train."""

import os
import socket
import time

import psutil
import pytest

from gpt2.distributed import Ranks, Stop, _interface_to


def test_gloo_gets_the_interface_that_leads_to_the_master():
    """By itself it binds what the host's name resolves to, which on Debian no other node reaches."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = _interface_to("127.0.0.1")
    assert loopback in names and loopback.startswith("lo")
    assert _interface_to("no.such.host.invalid") is None


@pytest.mark.core
def test_the_time_limit_counts_from_the_first_attempt(tmp_path, signal_handlers):
    """A restart by torchrun --max-restarts must not run past the limit of its job."""
    ranks = Ranks("cpu")
    ranks.started = time.time() - 3000  # what the store says of the first attempt
    assert Stop(ranks, tmp_path, after_minutes=60).reason() is None
    assert Stop(ranks, tmp_path, after_minutes=45).reason() == "the time of --stop-after-minutes is over"


def test_restarts_keep_the_clock_of_the_first_attempt(monkeypatch):
    """torchrun restarts its processes, not itself."""
    alone = Ranks("cpu").started
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    starts = {Ranks("cpu").started for _ in range(2)}
    assert starts == {psutil.Process(os.getppid()).create_time()} and max(starts) < alone
