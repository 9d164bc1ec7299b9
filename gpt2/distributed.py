"""Ranks, the collectives between them, and the agreement on when to stop.

`Ranks(device)` reads the variables that torchrun sets; without them there is one process and every method is trivial.
"""

import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from common import UsageError, half_type, pick_device


def pick_dtype(name, device):
    """auto | float32 | bfloat16 | float16 -> the type of the matmuls; auto: 16 bits where the hardware has them."""
    return name if name != "auto" else half_type(device.type) or "float32"


def autocast(device, dtype):
    """The context of a forward pass: matmuls in `dtype` (a name), what needs the range in float32."""
    return torch.autocast(device.type, dtype=getattr(torch, dtype), enabled=dtype != "float32")


class Ranks:
    """This process among `world_size`: its rank, its device, and what the processes agree on.

    Agreement goes over a gloo group on the CPU, so that it never waits for the GPU's queue. `started`: Unix time
    at which this process, or the torchrun that launched it, started; --max-restarts does not reset it.
    """

    def __init__(self, device="auto"):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(device)
        self.main, self.control, self.started = self.rank == 0, None, time.time()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            import psutil  # which imports what only Unix has

            self.started = psutil.Process(os.getppid()).create_time()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if "RANK" in os.environ:
            if interface := _interface_to(os.environ["MASTER_ADDR"]):
                os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            store, _, _ = next(dist.rendezvous("env://"))
            # Keys that a killed rank left in the store would make a restart wait forever for an address that is gone.
            store = dist.PrefixStore("attempt_" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            backend, timeout = "nccl" if self.device.type == "cuda" else "gloo", timedelta(minutes=10)
            dist.init_process_group(backend, timeout=timeout, store=store, rank=self.rank, world_size=self.world_size)
            self.control = dist.new_group(backend="gloo", timeout=timeout)

    def gather(self, value):
        """`value` of every rank, in order, on every rank."""
        if self.control is None:
            return [value]
        values = [None] * self.world_size
        try:
            dist.all_gather_object(values, value, group=self.control)
        except RuntimeError:  # a rank that fails prints why; the others, whose collectives then fail, add this line
            raise UsageError("another process of this training has ended; what it printed says why") from None
        return values

    def sum(self, values):
        """Elementwise sums over the ranks of a list of numbers -> list of floats, the same on every rank."""
        return [sum(column) for column in zip(*self.gather([float(v) for v in values]))]

    def wait(self):
        """Wait until every rank has come here, as at the end: srun and torchrun kill the others when one ends early."""
        self.gather(None)


def _interface_to(host):
    """The network interface that leads to a host, or None. By itself gloo takes the one that this host's own name
    resolves to, on Debian 127.0.1.1, which other nodes cannot reach.
    """
    import psutil  # which imports what only Unix has

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect((host, 9))  # sends nothing, but chooses a route
            address = s.getsockname()[0]
    except OSError:
        return None
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if address in [a.address for a in found]), None)


class TreeSum:
    """Sums the tensors of a step's micro-batches in one binary tree, whatever the number of ranks that computed them.

    Micro-batches 2i and 2i + 1 are added first, then the pairs, and so on: a rank sums the subtree of its block, and
    ranks exchange sums with partners at distance 1, 2, 4, … (recursive doubling; Thakur et al. 2005). a + b rounds as
    b + a does. Both numbers are powers of two; at most log2(micro-batches of a rank) + 1 sums are kept.
    """

    def __init__(self, ranks):
        self.ranks, self.sums, self.added = ranks, [], 0

    def add(self, tensors):
        """One micro-batch's tensors, in the order of the micro-batches. They are kept, and changed."""
        self.added += 1
        carries = (self.added & -self.added).bit_length() - 1  # as in a binary counter: trailing zeros
        for _ in range(carries):
            torch._foreach_add_(tensors, self.sums.pop())
        self.sums.append(tensors)

    def total(self):
        """The sums over all micro-batches and ranks; the next step's tree begins. Collective."""
        (tensors,) = self.sums
        self.sums, self.added, distance = [], 0, 1
        while distance < self.ranks.world_size:
            partner, theirs = self.ranks.rank ^ distance, [torch.empty_like(t) for t in tensors]
            sends = [dist.P2POp(dist.isend, t, partner) for t in tensors]
            receives = [dist.P2POp(dist.irecv, t, partner) for t in theirs]
            for work in dist.batch_isend_irecv(sends + receives):
                work.wait()
            torch._foreach_add_(tensors, theirs)
            distance *= 2
        return tensors


class Stop:
    """Whether and why training stops before its last step, agreed on by all ranks.

    SIGTERM (a scheduler, torchrun), SIGINT (Ctrl-C; a second one interrupts at once), a file STOP in the run directory,
    the time limit of --stop-after-minutes, or the death of torchrun, which leaves its processes behind when killed.
    """

    def __init__(self, ranks, run_dir, after_minutes=0.0):
        self.ranks, self.file = ranks, Path(run_dir) / "STOP"
        self.deadline = ranks.started + 60 * after_minutes if after_minutes else None
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.why = None  # set once, then kept
        for name in ("SIGTERM", "SIGINT"):
            signal.signal(getattr(signal, name), self._handle)

    def _handle(self, number, frame):
        if number == signal.SIGINT and self.why:
            raise KeyboardInterrupt
        self.why = f"received {signal.Signals(number).name}"

    def here(self):
        """Why this rank would stop, or None. Not collective: the other ranks may not know yet."""
        if not self.why and self.ranks.main and self.file.exists():
            self.file.unlink(missing_ok=True)  # the next start shall run
            self.why = "found the file STOP"
        if not self.why and self.deadline and time.time() > self.deadline:
            self.why = "the time of --stop-after-minutes is over"
        if not self.why and self.torchrun and self.torchrun != os.getppid():
            self.why = "torchrun is gone"
        return self.why

    def reason(self):
        """Why to stop, the same text on every rank, or None. Collective: call it on every rank."""
        self.why = next(filter(None, self.ranks.gather(self.here())), None)
        return self.why
