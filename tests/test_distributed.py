"""gpt2/distributed.py: what ranks find out about each other before they train."""

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.distributed as dist

from gpt2.distributed import Ranks, Stop, TreeSum, _interface_to


def test_gloo_gets_the_interface_that_leads_to_the_master():
    """By itself it binds what the host's name resolves to, which on Debian no other node reaches."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = _interface_to("127.0.0.1")
    assert loopback in names and loopback.startswith("lo")
    assert _interface_to("no.such.host.invalid") is None


def test_every_group_of_ranks_has_the_interface_and_the_same_timeout(monkeypatch):
    """gloo's own timeout is 30 minutes; a rank that is gone would be noticed that late."""
    timeouts, variables = [], {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 0, 2)]))
    for name in ("init_process_group", "new_group"):
        monkeypatch.setattr(dist, name, lambda *args, timeout=None, **kwargs: timeouts.append(timeout))
    Ranks("cpu")
    assert timeouts == [timedelta(minutes=10)] * 2
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == _interface_to("127.0.0.1")


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


def test_a_process_that_is_done_does_not_shut_the_interpreter_down():
    """Which gloo's threads abort now and then; torchrun would restart a run that is done, or was told to stop."""
    code = "import atexit, os; from common import cli; from gpt2.distributed import Ranks; atexit.register(os.abort)"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", f"{code}; print('done', end=''); cli(lambda: Ranks('cpu').wait())"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done")


def sum_in_a_tree(rank, world_size, store, leaves, out):
    """TreeSum of a rank's block of leaves, twice, on one of `world_size` gloo ranks; every rank saves its sums."""
    if world_size > 1:
        shared = dist.FileStore(store, world_size)
        dist.init_process_group("gloo", store=shared, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    tree, n = TreeSum(SimpleNamespace(rank=rank, world_size=world_size)), len(leaves) // world_size
    for _ in range(2):
        for leaf in leaves[rank * n :][:n]:
            tree.add([leaf[0].clone(), leaf.clone()])
            assert len(tree.sums) <= n.bit_length()
        torch.save(tree.total(), f"{out}-{rank}.pt")
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.core
@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")
def test_a_tree_sum_has_the_same_bits_on_1_2_and_4_ranks(tmp_path):
    leaves = torch.randn(8, 1000, generator=torch.Generator().manual_seed(0))
    a, b, c, d, e, f, g, h = leaves
    expected = ((a + b) + (c + d)) + ((e + f) + (g + h))
    assert not torch.equal(expected, a + b + c + d + e + f + g + h)  # an order of its own
    sum_in_a_tree(0, 1, None, leaves, tmp_path / "1")
    for world_size in (2, 4):
        args = (world_size, str(tmp_path / f"store{world_size}"), leaves, tmp_path / str(world_size))
        torch.multiprocessing.start_processes(sum_in_a_tree, args, nprocs=world_size, start_method="fork")
    for world_size, rank in [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]:
        first, whole = torch.load(tmp_path / f"{world_size}-{rank}.pt")
        assert torch.equal(whole, expected) and first == expected[0]
