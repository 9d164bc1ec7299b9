"""What would break a first run here: one line each, with its fix. Seconds; starts nothing, downloads nothing.

    python doctor.py                        against the quickstart
    python doctor.py --preset gpt2-124M     disk and memory for another preset of gpt2/train_gpt2.py

Needs nothing but Python, so it also tells what is missing where nothing is installed yet. Exit status 1 if something is
MISSING; a note slows a run down or leaves something out, and breaks nothing.
"""

import argparse
import importlib.metadata
import importlib.util
import locale
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)
DRIVERS = {13: 580, 12: 525, 11: 450}  # oldest NVIDIA driver for a major version of CUDA
RANKS_SECONDS = 60
INSTALL = "pip install -r requirements.txt"


@dataclass
class Finding:
    """One line: "ok", "note" or "MISSING", what it is about, what was seen, and what to do."""

    state: str
    name: str
    text: str
    fix: str = ""

    def __str__(self):
        return f"{self.state:<8} {self.name:<11} {self.text}" + (f"; fix: {self.fix}" if self.fix else "")


# ---------------------------------------------------------------------------------------------------------------------
# what is installed


def check_python(args):
    version = sys.version.split()[0]
    if sys.version_info < OLDEST_PYTHON:
        return Finding("MISSING", "python", f"{version} is too old", "make .venv with Python 3.11 or later")
    return Finding("ok", "python", f"{version}, {sys.executable}")


def pins():
    """{name: version} of requirements.txt."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.M))


def installed(name):
    """Version of a package without a build's suffix ("2.13.0+cpu" -> "2.13.0"), or None."""
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(args):
    """All pins but torch's, which has a line of its own."""
    wanted = {name: version for name, version in pins().items() if name != "torch"}
    found = {name: installed(name) for name in wanted}
    absent = [name for name in wanted if found[name] is None]
    other = [f"{n} {found[n]} instead of {wanted[n]}" for n in wanted if found[n] not in (None, wanted[n])]
    if importlib.util.find_spec("runlog") is None:
        absent.append("the repository itself")
    if absent or other:
        parts = [f"not installed: {', '.join(absent)}"] if absent else []
        return Finding("MISSING", "packages", "; ".join(parts + other), INSTALL)
    return Finding("ok", "packages", f"{len(wanted)} are as requirements.txt pins them")


def check_torch(args):
    """Its version against the pin, and whether it is a release that works here."""
    pinned, found = pins()["torch"], installed("torch")
    if found is None:
        return Finding("MISSING", "torch", "not installed", INSTALL)
    fix = f"pip install torch=={pinned}"
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < OLDEST_TORCH:
        return Finding("MISSING", "torch", f"{found} is too old, requirements.txt pins {pinned}", fix)
    if found != pinned:
        return Finding("note", "torch", f"{found} instead of the pinned {pinned} (2.11 and later work)", fix)
    import torch  # an installation that is damaged, or for another machine, fails here

    return Finding("ok", "torch", torch.__version__)


# ---------------------------------------------------------------------------------------------------------------------
# the device


def gpus():
    """[(name, driver)] as nvidia-smi lists them; empty without one."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [tuple(part.strip() for part in line.split(",")) for line in done.stdout.splitlines() if "," in line]


def check_gpu(args):
    """torch's CUDA against the driver of the GPUs."""
    import torch

    found, cuda = gpus(), torch.version.cuda
    if not found:
        if torch.backends.mps.is_available():
            return Finding("ok", "gpu", "Apple's, through mps")
        return Finding("ok", "gpu", "none here: everything runs on the CPU")
    name, driver = found[0]
    index = "pip install torch=={} --index-url https://download.pytorch.org/whl/cu{}"
    if cuda is None:
        if torch.cuda.is_available():  # ROCm
            return Finding("ok", "gpu", f"{len(found)} x {name}")
        fix = index.format(pins()["torch"], "130" if int(driver.split(".")[0]) >= DRIVERS[13] else "126")
        return Finding("MISSING", "gpu", f"{len(found)} x {name}, but this torch is built for the CPU", fix)
    wanted = DRIVERS.get(int(cuda.split(".")[0]), 0)
    if int(driver.split(".")[0]) < wanted:
        text = f"driver {driver} is older than the {wanted} that torch's CUDA {cuda} needs"
        return Finding("MISSING", "gpu", text, index.format(pins()["torch"], "126") + ", or a newer driver")
    if not torch.cuda.is_available():
        return Finding("MISSING", "gpu", f"{name}, driver {driver}: torch does not see it", "ask nvidia-smi, or reboot")
    return Finding("ok", "gpu", f"{len(found)} x {name}, driver {driver}, CUDA {cuda}")


def check_bf16(args):
    """Whether 16-bit matmuls are in hardware, or emulated and slow."""
    import torch

    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Finding("ok", "bfloat16", "in the GPU's hardware")
        return Finding("note", "bfloat16", "this GPU lacks it: --dtype auto takes float16 with a gradient scaler")
    flags = cpu_flags()
    has = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    if has:
        return Finding("ok", "bfloat16", f"in the CPU's hardware ({', '.join(has)})")
    return Finding("note", "bfloat16", "not in this CPU's hardware: --dtype auto takes float32")


def cpu_flags():
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith(("flags", "Features"))), "")
    return set(line.split())


def check_compile(args):
    """What torch.compile calls: a C++ compiler and Python's headers, for a GPU Triton as well."""
    import torch

    missing = missing_for_compile(torch.cuda.is_available())
    if missing is None:
        return Finding("ok", "compile", "a C++ compiler and Python's headers are there")
    fixes = {"Triton": "pip install triton", "Python.h": "apt install python3-dev (on a cluster: module load python)"}
    fix = fixes.get(missing, "apt install g++ (macOS: xcode-select --install; Windows: the Visual Studio build tools)")
    return Finding("MISSING", "compile", f"no {missing}: --compile is left out, training runs eager and slower", fix)


def missing_for_compile(on_gpu):
    """The first thing that is missing, or None. (Compiling something would tell more, and takes half a minute.)"""
    from torch._inductor.cpp_builder import get_cpp_compiler

    if on_gpu and importlib.util.find_spec("triton") is None:
        return "Triton"
    try:
        get_cpp_compiler()
    except Exception:  # torch raises several kinds, by platform and version
        return "C++ compiler"
    return None if (Path(sysconfig.get_path("include")) / "Python.h").exists() else "Python.h"


def check_threads(args):
    """Threads against the cores that this process may use."""
    import torch

    cores, threads = usable_cores(), torch.get_num_threads()
    if threads > cores:
        text = f"torch starts {threads} threads on {cores:g} cores and will be slow"
        return Finding("note", "threads", text, f"export OMP_NUM_THREADS={max(1, int(cores))}")
    if threads < cores and "OMP_NUM_THREADS" in os.environ:
        text = f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} leaves {cores - threads:g} of {cores:g} cores idle"
        return Finding("note", "threads", text, "unset OMP_NUM_THREADS")
    return Finding("ok", "threads", f"{threads} on {cores:g} cores")


def usable_cores():
    """Cores that this process may use: by affinity, and by a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return cores if quota == "max" else min(cores, int(quota) / int(period))
    except (OSError, ValueError):
        return cores


# ---------------------------------------------------------------------------------------------------------------------
# room for the preset


def check_disk(args):
    """Checkpoints of the preset, and its corpus if that is not there yet."""
    from gpt2.config import PRESETS

    cfg = PRESETS[args.preset]
    parameters = 12 * cfg.n_layer * cfg.n_embd**2 + (50304 + cfg.block_size) * cfg.n_embd
    need = 12 * parameters * (cfg.keep_checkpoints + 1)  # weights and two moments in float32; one more while writing
    if not (Path(cfg.data_dir) / "meta.json").exists():
        need += 2 * cfg.max_steps * cfg.total_batch_size  # a token is two bytes
    folder = Path(cfg.run_dir)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{gb(free)} free in {folder}, {args.preset} takes about {gb(need)}"
    if free < need:
        return Finding("MISSING", "disk", text, "free some, or set --run-dir and --data-dir on another disk")
    return Finding("ok", "disk", text)


def check_memory(args):
    """Weights, gradients, moments and activations of a step of the preset."""
    import torch

    from gpt2.config import PRESETS, GPTConfig
    from gpt2.model import GPT
    from gpt2.plan import free_memory, largest_micro_batch, memory_estimate

    cfg = PRESETS[args.preset]
    with torch.device("meta"):  # shapes alone
        model = GPT(GPTConfig(**{k: getattr(cfg, k) for k in ("block_size", "n_layer", "n_head", "n_embd")}))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    fixed, per_sequence = memory_estimate(model, cfg, device)
    free = free_memory(device)
    if free is None:
        return Finding("note", "memory", "not known on this system: `gpt2/train_gpt2.py --plan` estimates the need")
    need = fixed + cfg.micro_batch_size * per_sequence
    text = f"{gb(free)} free on the {device.type}, {args.preset} takes about {gb(need)}"
    if need <= free:
        return Finding("ok", "memory", text)
    fits = largest_micro_batch(cfg, 1, fixed, per_sequence, free)
    fix = f"--micro-batch-size {fits} (the result stays the same)" if fits else "another machine, or a smaller preset"
    return Finding("MISSING", "memory", text, fix)


def gb(n):
    return f"{n / 2**30:.2f} GB"


# ---------------------------------------------------------------------------------------------------------------------
# what comes over the network


def check_hub(args):
    """Where the hub is reached, and where its files are kept."""
    from huggingface_hub import constants

    from bpe.interop import answers

    cache = Path(constants.HF_HUB_CACHE)
    if (folder := unwritable(cache)) is not None:
        return Finding("MISSING", "hub", f"its cache {cache} cannot be written ({folder})", "export HF_HOME=DIR")
    if constants.HF_HUB_OFFLINE:
        kept = len(list(cache.glob("*--*"))) if cache.is_dir() else 0
        return Finding("ok", "hub", f"offline, as HF_HUB_OFFLINE says: {kept} repositories in {cache}")
    if answers(constants.ENDPOINT):
        return Finding("ok", "hub", f"{constants.ENDPOINT} answers; its files go to {cache}")
    fix = "export HF_ENDPOINT=MIRROR, or bundle.py on a machine with network and HF_HUB_OFFLINE=1 here"
    return Finding("MISSING", "hub", f"{constants.ENDPOINT} does not answer", fix)


def unwritable(folder):
    """The nearest existing parent of a folder that nothing may be written to, or None."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return None if os.access(folder, os.W_OK) else folder


def check_vocabulary(args):
    """GPT-2's, which the presets beside the quickstart are tokenized with."""
    from bpe.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_tiktoken("gpt2")
    return Finding("ok", "vocabulary", f"GPT-2's {tokenizer.n_vocab:,} tokens, every byte as published")


# ---------------------------------------------------------------------------------------------------------------------
# processes, text, pictures


def start_ranks():
    """Start two processes that add a number over gloo, and over NCCL with two GPUs -> what `check_ranks` waits for."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(rank), "--port", str(port)], text=True, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUTF8": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip


def be_rank(rank, port):
    """One of the two processes: add rank + 1 over both of them."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    where = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": 2, "timeout": timedelta(seconds=45)}
    names = ["gloo"]
    dist.init_process_group("gloo", **where)
    one = torch.tensor(float(rank + 1))
    dist.all_reduce(one)
    assert one.item() == 3.0
    if torch.cuda.device_count() > 1:
        names.append("NCCL")
        torch.cuda.set_device(rank)
        group, one = dist.new_group(backend="nccl"), torch.tensor(float(rank + 1), device="cuda")
        dist.all_reduce(one, group=group)
        assert one.item() == 3.0
    dist.destroy_process_group()
    print(" and ".join(names))


def check_ranks(args):
    """The two processes that were started first, so that they compute while the other checks run."""
    if not args.ranks:
        return Finding("MISSING", "processes", "torch is not installed, so none was started", INSTALL)
    outs, errors = [], []
    for process in args.ranks:
        try:
            out, err = process.communicate(timeout=RANKS_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = "", f"no answer in {RANKS_SECONDS} s"
        outs.append(out.strip())
        errors.append(last_line(err) if process.returncode else "")
    if any(errors) or not all(outs):
        fix = "let `hostname` resolve (/etc/hosts), or export GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo"
        return Finding("MISSING", "processes", f"two local ranks do not reach each other ({max(errors)})", fix)
    return Finding("ok", "processes", f"two local ranks agree over {outs[0]}")


def last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:160] if lines else "it died without a word"


def check_utf8(args):
    names = {"stdout": sys.stdout.encoding, "files": locale.getpreferredencoding(False)}
    other = [f"{what} {name}" for what, name in names.items() if (name or "").lower().replace("-", "") != "utf8"]
    if other:
        return Finding("MISSING", "utf-8", f"{', '.join(other)}: samples may not print", "export PYTHONUTF8=1")
    return Finding("ok", "utf-8", "terminal and files")


def check_fonts(args):
    """Chinese characters in figures (tokenizers are compared on Chinese text, too)."""
    import warnings

    from matplotlib import font_manager

    chinese = re.compile(r"CJK|SimHei|SimSun|YaHei|PingFang|Hiragino|WenQuanYi|Heiti|Droid Sans Fallback|Unifont")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = sorted({font.name for font in font_manager.fontManager.ttflist if chinese.search(font.name)})
    if found:
        return Finding("ok", "fonts", f"Chinese characters in {found[0]}")
    return Finding("note", "fonts", "none has Chinese characters: figures show boxes", "apt install fonts-noto-cjk")


CHECKS = (
    *(check_python, check_packages, check_torch, check_gpu, check_bf16, check_compile, check_threads, check_disk),
    *(check_memory, check_hub, check_vocabulary, check_utf8, check_fonts, check_ranks),
)


def examine(check, args):
    """One check -> its Finding; one that cannot even be made is missing something."""
    name = check.__name__.removeprefix("check_")
    try:
        return check(args)
    except Exception as e:  # whatever a damaged installation raises
        told = last_line(str(e)) if str(e).strip() else type(e).__name__
        if type(e).__name__ == "UsageError":  # says by itself what to do
            return Finding("MISSING", name, told)
        return Finding("MISSING", name, f"could not be checked ({type(e).__name__}: {told})", INSTALL)


def unknown_preset(name):
    """What to say of a preset that does not exist, or None (also where nothing is installed that could tell)."""
    try:
        from gpt2.config import PRESETS
    except ImportError:
        return None
    return None if name in PRESETS else f"no preset {name}; choose from {', '.join(PRESETS)}"


def main():
    """All checks in order, a line each; exit status 1 if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="quickstart", help="of gpt2/train_gpt2.py, for disk and memory")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        return be_rank(args.rank, args.port)
    if unknown := unknown_preset(args.preset):
        parser.error(unknown)
    args.ranks = start_ranks() if installed("torch") else []
    missing = 0
    for check in CHECKS:
        finding = examine(check, args)
        missing += finding.state == "MISSING"
        print(finding, flush=True)
    print(f"{missing} missing" if missing else "nothing is missing")
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
