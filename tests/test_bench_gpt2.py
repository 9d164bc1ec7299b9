"""The benchmarks at toy size, in this process: their rows, and that all do the same work. No speed is judged."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from bench.baselines import SIZES, Levers, batches, first_weights, ours, transformers
from bench.harness import contest
from common import UsageError
from gpt2 import bench_gpt2, race, starting
from gpt2.machine import CPU_MEMORY_SETTINGS, matmul_peak, peak_of_a_step, sdpa_backend
from runlog import read_run

TINY = ("--size", "tiny", "--device", "cpu", "--rounds", 1, "--steps", 1, "--no-own-process")
NANOGPT_MODEL = """
from dataclasses import dataclass
import torch
from gpt2.config import GPTConfig as Ours
from gpt2.model import GPT as Model

@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8

def GPT(config):
    model = Model(Ours(**vars(config), pad_vocab_to=1))
    model.configure_optimizers = lambda *args: torch.optim.AdamW(model.parameters(), lr=args[1], weight_decay=args[0])
    return model
"""


@pytest.fixture
def bench(in_process, tmp_path, monkeypatch):
    """run(subcommand, *flags) -> the Run; nothing is compiled."""
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: model)

    def run(command, *flags):
        code, _, err = in_process(bench_gpt2.main, command, *TINY, *flags, "--run-dir", tmp_path / "run")
        assert code == 0, err
        return read_run(tmp_path / "run")

    return run


def test_the_ladder_names_every_lever_with_its_gain(bench):
    run = bench("ladder")
    rows = run.result["rows"]
    levers = [row["lever"] for row in rows]
    assert levers[0] == "float32, naive attention" and "chunked cross-entropy" in levers
    assert all({"ms", "tok_per_sec", "mfu", "peak_mb", "ratio", "ratio_to", "kept"} <= row.keys() for row in rows)
    kept = [row for row in rows if row["kept"]]
    for before, row in pairwise(kept):
        assert row["before"] == before["lever"]
        assert row["ratio"] == pytest.approx(before["seconds"] / row["seconds"], abs=1e-3)
    # One model throughout: levers change the speed, not what is learned.
    losses = [row["last_loss"] for row in rows if "bfloat16" not in row["lever"]]
    assert max(losses) - min(losses) < 1e-3
    assert (run.run_dir / "bench.png").stat().st_size > 5000


def test_peers_start_from_the_same_weights_and_stand_against_ours(bench, tmp_path):
    (tmp_path / "nanoGPT").mkdir()
    (tmp_path / "nanoGPT" / "model.py").write_text(NANOGPT_MODEL, encoding="utf-8")
    (tmp_path / "build").mkdir()
    code = NANOGPT_MODEL.replace("*args:", "decay, lr, device:").replace("args[1]", "lr").replace("args[0]", "decay")
    (tmp_path / "build" / "train_gpt2.py").write_text(code + "\nimport tiktoken\nraise SystemExit", encoding="utf-8")
    run = bench("peers", "--nanogpt", tmp_path / "nanoGPT", "--build-nanogpt", tmp_path / "build")
    rows = {row["who"]: row for row in run.result["rows"]}
    assert {"ours", "ours eager", "nanoGPT eager float32", "build-nanogpt eager float32"} <= rows.keys()
    assert any(who.startswith("Trainer") for who in rows) and any("eager float32" in who for who in rows)
    mine = rows["ours"]
    assert mine["ratio"] == 1 and all(row["ratio_to"] == "seconds of ours" for row in rows.values())
    for who, row in rows.items():
        assert row["ratio"] == pytest.approx(row["seconds"] / mine["seconds"], abs=1e-3)
        exact = who.startswith(("ours", "nanoGPT", "build"))  # the others shift labels or shuffle rows
        assert row["first_loss"] == pytest.approx(mine["first_loss"], abs=1e-4 if exact else 0.6)
    assert [r["kind"] for r in run.metrics].count("turn ours") == 1


def test_transformers_starts_as_the_same_function():
    size = SIZES["tiny"]
    mine, theirs = ours(size, "cpu", Levers(compile=False)).model, transformers(size, "cpu").model
    idx, _ = next(batches(size, "cpu"))
    torch.testing.assert_close(mine.eval()(idx)[0], theirs.eval()(idx).logits, rtol=0, atol=1e-5)


def test_a_contestant_runs_in_a_process_of_its_own_with_its_environment():
    from bench.harness import OwnProcess

    one = OwnProcess(ours, SIZES["tiny"], "cpu", {"levers": Levers(compile=False)}, CPU_MEMORY_SETTINGS)
    try:
        facts = one.ready()
        seconds, loss = one.turn(2)
        assert seconds > 0 and loss < 6 and facts["first_loss"] == pytest.approx(5.56, abs=0.1)
    finally:
        one.close()


def cannot_start(size, device):
    raise RuntimeError("CUDA out of memory")


def test_who_cannot_start_is_left_out_and_the_others_go_on():
    said, log = [], SimpleNamespace(print=lambda text: said.append(text), metric=lambda *args, **kwargs: None)
    good = (ours, SIZES["tiny"], {"levers": Levers(compile=False)}, {})
    entrants = {"good": good, "bad": (cannot_start, SIZES["tiny"], {}, {})}
    facts = contest(entrants, "cpu", 1, 1, log)
    assert list(facts) == ["good"] and facts["good"]["seconds"] > 0
    assert said == ["bad is left out: RuntimeError: CUDA out of memory"]
    with pytest.raises(UsageError, match="no contestant"):
        contest({"bad": entrants["bad"]}, "cpu", 1, 1, log)


def test_start_measures_the_same_work_done_in_two_ways(bench, monkeypatch):
    commands = []
    monkeypatch.setattr(starting, "run", lambda command, env=None: commands.append((command, env)))
    rows = {row["who"]: row for row in bench("start", "--items", 8, "--new-tokens", 6).result["rows"]}
    assert rows["ours"]["agree"] == rows["ours"]["items"] == 8
    assert rows["ours, KV cache"]["same_tokens"] and rows["recomputing"]["tok_per_sec"] > 0
    assert {"ours eager", "ours compiled, cold cache", "ours compiled, warm cache"} <= rows.keys()
    assert len(commands) == 3 and commands[1][1] == commands[2][1]


def test_the_profile_lists_kernels_and_leaves_a_trace(bench):
    run = bench("profile", "--top", 5)
    assert len(run.result["rows"]) == 5 and sum(row["ratio"] for row in run.result["rows"]) <= 1
    assert (run.run_dir / "trace.json.gz").stat().st_size > 1000


def test_the_race_counts_whose_loss_is_lower(bench, monkeypatch, tmp_path):
    losses = {"ours AdamW": 4.0, "ours Muon": 3.5, "nanoGPT lr 0.001": 5.0, "nanoGPT lr 0.01": 4.5}
    figures = {who: {"val_loss": y, "steps": 10, "tokens": 100, "seconds": 2.0} for who, y in losses.items()}
    monkeypatch.setattr(race, "entrants", lambda cfg: {who: lambda who=who: figures[who] for who in figures})
    bench("race", "--only", "nanoGPT")
    run = bench("race", "--only", "ours")  # the others' figures are kept
    rows = {row["who"]: row for row in run.result["rows"]}
    assert rows.keys() == losses.keys() and rows["ours Muon"]["nats_ahead"] == pytest.approx(1.0)


def test_scaling_without_torchrun_is_one_rank(bench):
    (row,) = bench("scaling").result["rows"]
    assert row["ranks"] == 1 and row["efficiency"] == 1


@pytest.mark.slow
def test_a_killed_run_ends_the_same(bench):
    (row,) = bench("resume", "--no-compile", "--max-steps", 40).result["rows"]
    assert row["metrics_equal"] and row["weights_equal"]


def test_a_folder_without_a_model_is_refused(in_process, tmp_path):
    for flag, says in [("--nanogpt", "model.py"), ("--build-nanogpt", "train_gpt2.py")]:
        code, _, err = in_process(bench_gpt2.main, "peers", *TINY, flag, tmp_path, "--run-dir", tmp_path / "run")
        assert code == 2 and f"it has no {says}" in err and len(err.strip().splitlines()) == 1


def test_the_machine_is_asked_what_it_can():
    assert matmul_peak("cpu", n=32) > 0
    assert sdpa_backend(torch.randn(1, 2, 8, 4)) != ""
    contestant = ours(SIZES["tiny"], "cpu", Levers(compile=False))
    peak = peak_of_a_step(contestant.step, contestant.model, "cpu")
    weights = sum(p.numel() for p in first_weights(SIZES["tiny"]).parameters()) * 4 / 2**20
    assert peak is None or peak >= 3 * weights
