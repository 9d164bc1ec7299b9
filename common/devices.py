"""Device selection, 16-bit support, peak speed, cores and memory."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from common.usage import UsageError


def pick_device(name="auto"):
    """auto | cuda | mps | cpu -> torch.device (this process's GPU under torchrun); UsageError where not available.

    auto also refuses to fall back to the CPU where there is an NVIDIA GPU that torch does not see, as when its CUDA is
    newer than the driver: eight ranks on one CPU look like a slow cluster.
    """
    import torch

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        if not has["cuda"] and has_hidden_gpu():
            raise UsageError(
                f"there is an NVIDIA GPU that torch {torch.__version__} cannot use: install the build for your driver "
                "(README.md, Other drivers), or pass --device cpu"
            )
        name = next(d for d in ("cuda", "mps", "cpu") if has[d])
    if not has.get(name):
        raise UsageError(f"--device {name} is not available here; choose from {', '.join(d for d in has if has[d])}")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def has_hidden_gpu():
    """Whether there is an NVIDIA GPU that torch does not see although CUDA_VISIBLE_DEVICES does not hide it."""
    import torch

    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    if os.path.exists("/dev/nvidia0"):
        return True
    smi = shutil.which("nvidia-smi")  # under WSL there is no /dev/nvidia0
    return bool(smi) and subprocess.run([smi, "-L"], capture_output=True, text=True).stdout.startswith("GPU")


def half_type(device):
    """The 16-bit type for matmuls on a device type, "bfloat16" or "float16", or None where float32 is faster."""
    import torch

    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private functions, which may be removed
    in_hardware = device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in checks)
    has_kernels = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # ONEDNN_MAX_CPU_ISA caps them
    return "bfloat16" if in_hardware and has_kernels() else None


# Dense peaks in FLOP/s of the matmul units in 16 bits, from the vendors' data sheets, by words in torch's device name
# ("NVIDIA H100 80GB HBM3"); the first match counts.
PEAKS = {
    "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip


def peak_flops(device, dtype):
    """Peak FLOP/s of a GPU in bfloat16 or float16, or None where it is not known: no MFU is better than a wrong one."""
    if device.type != "cuda" or dtype == "float32":
        return None
    import torch

    name = torch.cuda.get_device_name(device)  # a "Laptop" GPU is another chip of the same name
    return next((p for words, p in PEAKS.items() if re.search(rf"\b{words}\b", name) and "Laptop" not in name), None)


def available_cores():
    """Cores that this process may use, which under a scheduler are fewer than the hardware has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory(device):
    """On a CPU, keep large freed buffers for reuse, in huge pages; call it before the first tensor. Needs glibc.

    By default glibc returns them to the system, and each comes back as a page fault per 4 kB: up to a third of a step.
    The process then stays at its peak of memory.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" and str(device) == "cpu" else None
    if hasattr(libc, "mallopt"):  # not in musl
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # read by torch at its first allocation
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer gets a mapping of its own, which would end with it
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap never shrinks


def synchronize(device):
    """Wait for all queued work on a device type."""
    if device != "cpu":  # synchronous, and must not import torch
        import torch

        getattr(torch, device).synchronize()


def peak_memory_mb(device="cpu"):
    """Peak memory of this process in MB: the GPU's on "cuda", else resident; None on Windows."""
    if device == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    # Linux has a peak that can be reset (bench/harness.py does) and that, unlike getrusage's, a fork does not inherit.
    status = Path("/proc/self/status").read_text(errors="replace") if sys.platform == "linux" else ""
    if peak := re.search(r"VmHWM:\s*(\d+)", status):
        return round(int(peak[1]) / 2**10, 1)
    try:
        import resource
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)  # macOS counts in bytes


def free_memory(device):
    """Free memory in bytes on a torch.device: the GPU's, else the system's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
