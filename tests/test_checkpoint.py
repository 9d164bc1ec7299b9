"""Checkpoints survive what happens to files: truncation, altered bytes, a full disk, a kill while writing."""

import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from common import UsageError
from gpt2 import checkpoint
from gpt2.config import GPTConfig
from gpt2.model import GPT

CPU = torch.device("cpu")


def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=2, n_embd=8))


@pytest.mark.core
def test_what_is_saved_is_loaded(tmp_path):
    model = tiny()
    path = checkpoint.save(tmp_path, 500, checkpoint.model_state(model))
    assert path.name == "step_000500.pt"
    state = checkpoint.load_newest(tmp_path)
    assert state["step"] == 500 and GPTConfig(**state["model_config"]) == model.config
    assert all(torch.equal(state["model"][k], v) for k, v in model.state_dict().items())


@pytest.mark.core
def test_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    save, training, done = checkpoint.save, threading.Event(), []

    def slow(*args):
        assert training.wait(30)
        return save(*args)

    monkeypatch.setattr(checkpoint, "save", slow)
    writer, weight = checkpoint.Writer(done.append), torch.zeros(3)
    writer.save(tmp_path, 1, {"weight": weight}, 2)
    weight += 1  # the next step
    assert not done
    training.set()
    writer.wait()
    assert torch.equal(checkpoint.load_newest(tmp_path)["weight"], torch.zeros(3)) and len(done) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="lists what a process has mapped as Linux does")
def test_tensors_are_mapped_from_the_file_so_that_ranks_share_them(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"weight": torch.zeros(3)})
    state = checkpoint.read(path)
    assert str(path) in Path("/proc/self/maps").read_text(encoding="utf-8") and not state["weight"].any()


@pytest.mark.parametrize("harm", ["truncated", "altered", "no sum"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, harm):
    for step in (1, 2):
        newest = checkpoint.save(tmp_path, step, {"x": torch.arange(1000)})
    data = bytearray(newest.read_bytes())
    if harm == "truncated":
        newest.write_bytes(data[:-10])
    elif harm == "altered":
        data[len(data) // 2] ^= 1
        newest.write_bytes(data)
    else:
        newest.with_name(newest.name + ".sha256").unlink()
    warnings = []
    assert checkpoint.load_newest(tmp_path, warn=warnings.append)["step"] == 1
    assert len(warnings) == 1 and "step_000002.pt is skipped" in warnings[0]
    with pytest.raises(UsageError, match="not a usable checkpoint"):
        checkpoint.load(newest)


@pytest.mark.core
def test_the_newest_are_kept(tmp_path):
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("step_000010.pt", "step_000010.pt.sha256", "step_000100.pt", "step_000100.pt.sha256")
    ]


def test_what_a_kill_while_saving_left_is_swept_up(tmp_path):
    (tmp_path / ".step_000001.pt.4711.part").write_bytes(b"half of a checkpoint")
    assert checkpoint.load_newest(tmp_path) is None
    checkpoint.save(tmp_path, 2, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000002.pt", "step_000002.pt.sha256"]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_later_one_does_not_count_among_those_kept(tmp_path, keep):
    for step in (1, 2, 9):
        checkpoint.save(tmp_path, step, {}, keep=3)
    (tmp_path / "step_000009.pt").write_bytes(b"")
    checkpoint.save(tmp_path, 3, {}, keep=keep)
    assert checkpoint.load_newest(tmp_path, warn=lambda _: None)["step"] == 3
    assert (tmp_path / "step_000002.pt").exists() == (keep == 2) and not (tmp_path / "step_000001.pt").exists()


def test_a_full_disk_keeps_the_last_good_one_and_is_one_line(tmp_path):
    """The limit on a file's size stands in for the disk: a write beyond it fails in the same way."""
    resource = pytest.importorskip("resource")
    checkpoint.save(tmp_path, 1, {"x": torch.zeros(10)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises(UsageError, match=r"could not be written \(.*File too large\); earlier"):
            checkpoint.save(tmp_path, 2, {"x": torch.zeros(1_000_000)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.load_newest(tmp_path)["step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_000001.pt", "step_000001.pt.sha256"]


def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path, 1, {})
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    with pytest.raises(UsageError, match="version 1, not"):
        checkpoint.load(path)
    with pytest.raises(UsageError, match="does not exist"):
        checkpoint.load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no usable checkpoint"):
        checkpoint.load_model(tmp_path / "empty")


def test_random_states_come_back_through_a_checkpoint(tmp_path):
    torch.manual_seed(1)
    torch.rand(3)
    checkpoint.save(tmp_path, 1, {"rng": [checkpoint.rng_state(CPU)]})
    drawn = torch.rand(3)
    checkpoint.set_rng_state(checkpoint.load_newest(tmp_path)["rng"][0], CPU)
    assert torch.equal(drawn, torch.rand(3))
