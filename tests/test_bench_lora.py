import pytest

from bench.bench_lora import Size
from lora import bench_lora
from runlog import read_run

TINY = {"tiny": Size(layers=1, width=32, batch_size=2, tokens=8, steps=4)}


@pytest.fixture
def here(monkeypatch):
    """Measure in this process (importing torch anew takes seconds) and at a tiny size."""
    monkeypatch.setattr(bench_lora, "apart", lambda function, *args: function(*args))
    monkeypatch.setattr(bench_lora, "SIZES", TINY)


def run(in_process, folder, *args):
    flags = ("--run-dir", folder, "--sizes", "tiny", "--k", 2, "--vocab-size", 50, "--repeats", 1, "--device", "cpu")
    return in_process(bench_lora.main, *flags, *args)


@pytest.mark.parametrize("family, gains", [("bloom", 6), ("llama", 5)])
def test_rows_say_what_they_are_a_ratio_to(here, in_process, tmp_path, family, gains):
    code, out, err = run(in_process, tmp_path, "--family", family)
    assert code == 0, err
    rows = {row["name"].removeprefix("tiny/"): row for row in read_run(tmp_path).result["rows"]}
    assert len(rows) == gains and out.count("tiny/") == gains
    engine, trainer = rows["batching/engine"], rows["batching/trainer"]
    assert trainer["ratio"] == 1 and trainer["who"].startswith("transformers ") and engine["who"] == "ours"
    assert engine["ratio"] == pytest.approx(trainer["seconds"] / engine["seconds"], rel=0.02, abs=0.05)
    assert rows["masked/masked"]["ratio_to"] == "all logits" and rows["masked/masked"]["vocab_size"] == 400
    assert rows["early stop/early stop"]["ratio_to"] == "engine" and engine["tokens"] == 8
    kinds = {row["kind"] for row in read_run(tmp_path).metrics}
    assert {"tiny/engine", "tiny/trainer", "tiny/loop"} <= kinds


def test_contenders_that_did_other_work_are_found_out(here, in_process, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_lora, "loop", lambda cfg, size, contender: lambda: [9.0] * cfg.k)
    with pytest.raises(RuntimeError, match="did not do the same work"):
        run(in_process, tmp_path)
    assert read_run(tmp_path).result["status"] == "failed" and read_run(tmp_path).metrics  # measured, so written


def test_mistakes_are_one_line(in_process, tmp_path):
    for flag, value in (("--sizes", "huge"), ("--family", "mamba")):
        code, _, err = in_process(bench_lora.main, "--run-dir", tmp_path / "run", flag, value)
        assert code == 2 and value in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
