"""What users of the well-known tokenizers and trainers complain of, and the test here that each complaint would fail.

Numbers are issues and pull requests on GitHub: of karpathy's repositories, openai/tiktoken, huggingface/tokenizers and
gautierdag/bpeasy. `COMPLAINTS` names the test of each, and the test names its complaints; tests of what belongs to no
single module are in this file.
"""

import ast
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from common import peak_flops, pick_device
from gpt2.config import GPTConfig
from gpt2.distributed import pick_dtype
from gpt2.model import GPT

# complaint: (what it is, file and test that names it)
COMPLAINTS = {
    "build-nanogpt#105": ("ranks drift apart at shard ends", "test_loader.py::test_rows_are_disjoint_across_ranks"),
    "build-nanogpt#109": ("ranks drift apart at shard ends", "test_loader.py::test_rows_are_disjoint_across_ranks"),
    "build-nanogpt#23": ("ranks drift apart at shard ends", "test_loader.py::test_rows_are_disjoint_across_ranks"),
    "build-nanogpt#83": ("no resume", "test_resume.py::test_killed_three_times"),
    "nanoGPT#467": ("a resume replays data", "test_resume.py::test_killed_three_times"),
    "build-nanogpt#79": ("compiling breaks HellaSwag", "test_train_gpt2.py::test_compiled_training"),
    "build-nanogpt#78": ("compiling breaks sampling", "test_train_gpt2.py::test_compiled_training"),
    "build-nanogpt#60": ("compiling breaks both", "test_train_gpt2.py::test_compiled_training"),
    "nanoGPT#325": ("_orig_mod. in checkpoints", "test_train_gpt2.py::test_compiled_training"),
    "build-nanogpt#81": ("ids from 50257 on crash the decoder", "test_sample.py::test_padding_of_the_vocabulary"),
    "build-nanogpt#4": ("no __main__ guard for worker processes", "test_complaints.py::test_importing_runs_nothing"),
    "build-nanogpt#46": ("no __main__ guard for worker processes", "test_complaints.py::test_importing_runs_nothing"),
    "build-nanogpt#57": ("no __main__ guard for worker processes", "test_complaints.py::test_importing_runs_nothing"),
    "build-nanogpt#52": ("unshuffled data, periodic loss", "test_loader.py::test_an_epoch_holds_every_sequence_once"),
    "nanoGPT#145": ("results depend on the GPUs", "test_train_gpt2.py::test_the_result_does_not_depend"),
    "nanoGPT#225": ("results depend on the GPUs", "test_train_gpt2.py::test_the_result_does_not_depend"),
    "nanoGPT#468": ("results depend on the GPUs", "test_train_gpt2.py::test_the_result_does_not_depend"),
    "build-nanogpt#182": ("MFU is wrong off the A100", "test_complaints.py::test_mfu_is_right_or_absent"),
    "build-nanogpt#28": ("Macs", "test_complaints.py::test_a_mac"),
    "build-nanogpt#140": ("Macs and Windows", "test_complaints.py::test_windows"),
    "build-nanogpt#150": ("Macs and Windows", "test_complaints.py::test_windows"),
    "build-nanogpt#243": ("Macs and Windows", "test_complaints.py::test_windows"),
    "nanochat#443": ("logits fill the memory", "test_complaints.py::test_no_tensor_holds_all_logits"),
    "nanochat#114": ("SLURM job files", "test_slurm.py::test_a_job_is_requeued"),
    "nanochat#511": ("stops before the time limit", "test_slurm.py::test_a_job_is_requeued"),
    "nanoGPT#87": ("float16 where there is no bfloat16", "test_train_gpt2.py::test_sixteen_bits_train"),
    "nanochat#502": ("no toolchain for torch.compile", "test_train_gpt2.py::test_without_a_compiler"),
    "nanochat#604": ("no toolchain for torch.compile", "test_train_gpt2.py::test_without_a_compiler"),
    "nanoGPT#202": ("no ready-made shards", "test_prepare.py::test_ready_made_shards"),
    "nanochat#7": ("comparing runs by step, tokens, seconds", "test_runlog_commands.py::test_the_axes"),
    "tiktoken#212": ("GPT-2's vocabulary without network", "test_interop.py::test_each_place_is_asked"),
    "tiktoken#369": ("GPT-2's vocabulary without network", "test_interop.py::test_each_place_is_asked"),
    "tokenizers#2058": ("32-bit counts overflow", "test_trainer.py::test_counts_beyond"),
    "tokenizers#1313": ("unsplit DNA takes hours", "test_tokenizer.py::test_a_million_characters"),
    "tokenizers#472": ("special tokens lost on save", "test_tokenizer.py::test_a_saved_tokenizer"),
    "minbpe#90": ("merges depend on the order of the text", "test_trainer.py::test_the_order_of_the_text"),
    "tiktoken#195": ("one long chunk is slow", "test_tokenizer.py::test_a_million_characters"),
    "tiktoken#15": ("one long chunk panics", "test_tokenizer.py::test_a_million_characters"),
    "bpeasy#2": ("broken exports", "test_interop.py::test_huggingface_gives"),
    "UTF-8": ("text on Windows", "test_runlog.py::test_what_is_printed_into_a_pipe_is_utf8"),
}


@pytest.mark.parametrize("complaint", COMPLAINTS)
def test_every_complaint_has_a_test_that_names_it(complaint):
    file, start = COMPLAINTS[complaint][1].split("::")
    source = (ROOT / "tests" / file).read_text(encoding="utf-8")
    body = re.search(rf"^def {start}.*?(?=^def |^@|\Z)", source, re.M | re.S)[0]
    repository, _, number = complaint.partition("#")
    assert complaint == "UTF-8" or (repository in body and f"#{number}" in body)


@pytest.mark.parametrize("path", [p for d in ("bpe", "data", "gpt2", "lora") for p in (ROOT / d).glob("*.py")], ids=str)
def test_importing_runs_nothing(path):
    """build-nanogpt#4, #46, #57: without a `__main__` guard every worker process starts the whole script again."""
    allowed = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AugAssign | ast.Assert
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        assert isinstance(node, allowed) or guard or docstring, f"{path.name}, line {node.lineno}"


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX A1000", None),  # no A100
        ("NVIDIA A10G", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_mfu_is_right_or_absent(monkeypatch, name, tflops):
    """build-nanogpt#182: MFU against the A100's peak on whatever card."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda"), "bfloat16")
    assert peak == (tflops and tflops * 1e12)
    assert peak_flops(torch.device("cuda"), "float32") is None is peak_flops(torch.device("cpu"), "bfloat16")


def test_a_mac_is_trained_on_its_gpu(monkeypatch):
    """build-nanogpt#28."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "mps" and pick_dtype("auto", torch.device("mps")) == "float32"


def test_windows_and_macs_need_no_module_that_they_lack(tmp_path):
    """build-nanogpt#140, #150, #243. What Unix alone has is looked for only where it is used."""
    script = "import sys\n"
    for name in ("resource", "fcntl", "pwd", "grp", "termios"):
        script += f"sys.modules[{name!r}] = None\n"
    script += "import gpt2.train_gpt2, gpt2.sample, gpt2.export_hf\n"
    script += "sys.platform = 'win32'\n"
    script += "import torch\nassert gpt2.train_gpt2.peak_memory_mb('cpu') is None\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors)])
        return out


@pytest.mark.core
def test_no_tensor_holds_all_logits_of_a_micro_batch():
    """nanochat#443: the logits of a micro-batch do not fit into memory."""
    B, T, V = 32, 128, 16384
    model = GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=1, n_head=1, n_embd=8))
    idx = torch.randint(V, (B, T))
    with Largest() as largest:
        model(idx, idx, return_logits=False)[1].backward()
    assert largest.numel < B * T * V / 2
    with Largest() as largest:  # the measure is a measure
        model(idx, idx)[1].backward()
    assert largest.numel >= B * T * V
