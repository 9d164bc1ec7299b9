"""What every test shares: no network, one thread a process (so that bits repeat), scripts run as a person runs them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from common import cli, file_sha256

pytest.register_assert_rewrite("gpt2_runs")  # before it is imported

if (
    not torch.cuda.is_available()
):  # scripts under --device auto then take the CPU, even beside a GPU that torch cannot use
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

# What split patterns tell apart: kinds of characters, separators that `re` takes for whitespace, contractions.
SPLIT_PARTS = ["a", "'s", "'LL", "'", " ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u3000"]
SPLIT_PARTS += ["7", "1234", "²", "①", "٣", "é", "北京", "。", "!", "...", "_", "’", "😀", "e\u0301", "\x00", "\ufeff"]


@pytest.fixture
def shared_data():
    """The folder of real corpora beside the project; tests that need it skip, saying so, where it is not."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture
def script():
    """run(path, *args, ok=True) -> CompletedProcess of `python path args`, from the repository's root."""

    def run(path, *args, ok=True, timeout=300, cwd=ROOT, env=None):
        command = [sys.executable, str(ROOT / path), *map(str, args)]
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=timeout, cwd=cwd,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        if ok:
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done

    return run


@pytest.fixture
def in_process(monkeypatch, capsys):
    """run(main, *args) -> (exit status, stdout, stderr) of a script's `main` under `cli`, without a new process.

    For what needs no process of its own: importing torch anew takes seconds.
    """

    def run(main, *args):
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, args)])
        capsys.readouterr()
        try:
            cli(main)
            code = 0
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def signal_handlers():
    """Training in this process takes over SIGTERM and SIGINT; give them back."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    yield
    for s, handler in handlers.items():
        signal.signal(s, handler)


@pytest.fixture
def assert_refuses(script):
    """check(path, *args, says=…) asserts a usage error: one line on stderr, exit status 2, no traceback."""

    def check(path, *args, says):
        done = script(path, *args, ok=False)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], done.stderr
        return lines[0]

    return check


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A random GPT-2 of two layers as a Hugging Face folder: what the tests of lora/ put adapters on."""
    from lora_models import save_tiny

    return save_tiny(tmp_path_factory.mktemp("base") / "gpt2")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small real corpus: 200 kB of Python's documentation, a byte-pair vocabulary of 384, one shard a split."""
    from pydoc_data.topics import topics

    import numpy as np

    from bpe import Tokenizer
    from data.shards import write_meta, write_shard

    folder = tmp_path_factory.mktemp("corpus")
    text = "".join(topics[k] for k in sorted(topics))[:200_000]
    tokenizer = Tokenizer("gpt2")
    tokenizer.train(text, 384)
    tokenizer.register_special_tokens({"<|endoftext|>": 384})
    tokenizer.save(str(folder / "tokenizer"))
    shards = []
    for split, part in [("val", text[:20_000]), ("train", text[20_000:])]:
        ids = np.array([tokenizer.eot_token, *tokenizer.encode_ordinary(part)])
        path = folder / f"tiny_{split}_{split == 'train':06d}.bin"
        write_shard(path, ids)
        facts = {"documents": 1, "tokens": len(ids), "bytes": len(part.encode()), "sha256": file_sha256(path)}
        shards.append({"file": path.name, "split": split, **facts})
    identity = {"name": "tokenizer.model", "sha256": tokenizer.sha256}
    write_meta(folder, name="tiny", source={}, tokenizer=identity, vocab_size=tokenizer.n_vocab, eot=384, shards=shards)
    return folder


@pytest.fixture
def contestants_here(monkeypatch):
    """Benchmarks measure in this process: importing torch anew takes seconds."""
    from bench import harness

    def turn(self, limit_seconds):
        try:
            self.pool = self.pool or self.make(*self.args)
            return self.pool()
        except RuntimeError as e:
            return {"failed": str(e)}

    monkeypatch.setattr(harness.Contestant, "turn", turn)
    monkeypatch.setattr(harness.Contestant, "close", lambda self: setattr(self, "pool", None))
