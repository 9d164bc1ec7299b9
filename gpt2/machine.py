"""What this machine can do, and the settings that let it: number formats, memory, the attention kernel, matmul peak."""

import os
import sys
import time
from pathlib import Path

import torch

from common import has_bfloat16, synchronize

# glibc gives large freed buffers back to the system at once, and each comes back as a page fault per 4 kB: up to a
# third of a step on a CPU. Kept and backed by huge pages they cost nothing, and the matmuls miss fewer translations.
CPU_MEMORY_SETTINGS = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{k}" for k in ("mmap_threshold=4294967296", "trim_threshold=4294967296", "hugetlb=1")
    )
}


def can_keep_memory():
    """Whether CPU_MEMORY_SETTINGS mean something here: the C library is glibc."""
    return sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names


def advice(device, cfg):
    """What would make a run on a CPU faster and is not set, for its second line."""
    if device.type != "cpu":
        return ""
    text = ""
    if cfg.dtype == "float32" and has_bfloat16("cpu"):
        text += " | this CPU multiplies bfloat16: --dtype bfloat16 is faster"
    if can_keep_memory() and "GLIBC_TUNABLES" not in os.environ:
        settings = " ".join(f"{k}={v}" for k, v in CPU_MEMORY_SETTINGS.items())
        text += f" | fewer page faults: --cpu-memory-settings, or export {settings}"
    return text


def restart_with_memory_settings():
    """Start this program anew with CPU_MEMORY_SETTINGS, which the C library reads only at the start; once."""
    if can_keep_memory() and any(os.environ.get(k) != v for k, v in CPU_MEMORY_SETTINGS.items()):
        os.environ.update(CPU_MEMORY_SETTINGS)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def sdpa_backend(q):
    """Name of the kernel that F.scaled_dot_product_attention takes for causal attention on q (B, nh, T, hs)."""
    from torch.nn.attention import SDPBackend

    try:
        return SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True)).name.lower()
    except (AttributeError, RuntimeError, ValueError):  # a private function; MPS has none
        return "unknown"


def matmul_peak(device, dtype="float32", n=2048):
    """FLOP/s of a square matmul, the best of several: the peak that a CPU's share is a share of."""
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    out, best = torch.empty_like(a), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_of_a_step(step, model, device):
    """Memory in MB of weights and optimizer state and of what a step takes on top of them; None where unknown.

    On Linux CPUs the second part is the growth of the resident memory during a step, freed memory having been given
    back before; the first counts twice the weights for AdamW's moments. CUDA counts its own allocations.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    if device != "cpu" or not can_keep_memory():
        return None
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark falls to what is there
        before = _status("VmRSS")
        step().item()
        grown = _status("VmHWM") - before
    except OSError:
        return None
    return 3 * sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20 + grown


def _status(field):
    """A field of /proc/self/status in MB."""
    return int(Path("/proc/self/status").read_text(encoding="ascii").split(f"{field}:")[1].split()[0]) / 1024
