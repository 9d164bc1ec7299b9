"""common/devices.py: the device that is chosen, with the probes of torch and of the machine mocked both ways."""

import os
import subprocess
import sys

import pytest
import torch

from common import UsageError, devices, half_type, pick_device


@pytest.fixture
def machine(monkeypatch):
    """machine(cuda=…, nvidia0=…, smi=…, visible=…) pretends what torch sees and what the machine has."""

    def pretend(cuda=False, nvidia0=False, smi=None, visible=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        monkeypatch.setattr(devices.os.path, "exists", lambda path: nvidia0)
        monkeypatch.setattr(devices.shutil, "which", lambda name: None if smi is None else "/usr/bin/nvidia-smi")
        done = subprocess.CompletedProcess([], 0, stdout=smi or "")
        monkeypatch.setattr(devices.subprocess, "run", lambda *args, **kwargs: done)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return pretend


@pytest.mark.core
@pytest.mark.parametrize("has", [{"nvidia0": True}, {"smi": "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-x)"}])
def test_auto_refuses_a_gpu_that_torch_cannot_use(machine, has):
    """A driver older than the wheels' CUDA: training would silently run on the CPU."""
    machine(**has)
    with pytest.raises(UsageError, match=r"cannot use.*--device cpu"):
        pick_device("auto")
    assert pick_device("cpu").type == "cpu"
    machine(**has, visible="")
    assert pick_device("auto").type == "cpu"


@pytest.mark.core
def test_auto_takes_what_is_there(machine):
    machine()
    assert pick_device("auto").type == "cpu"
    machine(smi="No devices were found")
    assert pick_device("auto").type == "cpu"
    machine(cuda=True, nvidia0=True)
    assert pick_device("auto").type == "cuda"


def test_a_device_that_is_not_there_is_refused(machine):
    machine()
    with pytest.raises(UsageError, match="--device cuda is not available here; choose from cpu"):
        pick_device("cuda")


@pytest.mark.parametrize(("supported", "has_kernels"), [(True, True), (True, False), (False, True)])
def test_the_16_bit_type_follows_the_hardware_and_a_cap(monkeypatch, supported, has_kernels):
    """has_kernels: false where ONEDNN_MAX_CPU_ISA says less than the hardware has."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_kernels, raising=False)
    assert half_type("cuda") == ("bfloat16" if supported else "float16")
    assert half_type("cpu") == ("bfloat16" if supported and has_kernels else None) and half_type("mps") is None


@pytest.mark.skipif(sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs glibc")
def test_freed_memory_is_kept():
    """A buffer of 16 MB again and again: its 4,096 pages are not faulted in anew each time."""
    code = """
import resource, common, torch
common.keep_freed_memory("cpu")
faults = []
for _ in range(20):
    torch.ones(2**22)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[2])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) < 10_000  # of 70,000
