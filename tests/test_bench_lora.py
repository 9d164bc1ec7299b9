import pytest

from bench import bench_lora
from bench.bench_lora import Size
from runlog import read_run


@pytest.fixture
def run(contestants_here, monkeypatch, in_process, tmp_path):
    """Measure a tiny size in this process -> (exit status, stdout, stderr)."""
    monkeypatch.setattr(bench_lora, "SIZES", {"tiny": Size(layers=1, width=32, batch_size=2, tokens=8, steps=4)})
    flags = ("--run-dir", tmp_path, "--sizes", "tiny", "--k", 2, "--vocab-size", 50, "--rounds", 1, "--device", "cpu")
    return lambda *args: in_process(bench_lora.main, *flags, *args)


@pytest.mark.parametrize("family, gains", [("bloom", 6), ("llama", 5)])
def test_rows_say_what_they_are_a_ratio_to(run, tmp_path, family, gains):
    code, out, err = run("--family", family)
    assert code == 0, err
    rows = {row["name"].removeprefix("tiny/"): row for row in read_run(tmp_path).result["rows"]}
    assert len(rows) == gains and out.count("tiny/") == gains
    engine, trainer = rows["batching/engine"], rows["batching/trainer"]
    assert trainer["ratio"] == 1 and trainer["who"].startswith("transformers ") and engine["who"] == "ours"
    assert engine["ratio"] == pytest.approx(trainer["seconds"] / engine["seconds"])
    assert rows["masked/masked"]["ratio_to"] == "all logits" and rows["masked/masked"]["vocab_size"] == 400
    assert rows["early stop/early stop"]["ratio_to"] == "engine" and engine["tokens"] == 8
    kinds = {row["kind"] for row in read_run(tmp_path).metrics}
    assert {"tiny/engine", "tiny/trainer", "tiny/loop"} <= kinds


def test_contestants_that_did_other_work_are_detected(run, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_lora, "loop", lambda cfg, size, who: lambda: [9.0] * cfg.k)
    with pytest.raises(RuntimeError, match="did not do the same work"):
        run()
    assert read_run(tmp_path).result["status"] == "failed" and read_run(tmp_path).metrics  # measured, so written


def test_usage_errors_are_one_line(in_process, tmp_path):
    code, _, err = in_process(bench_lora.main, "--run-dir", tmp_path / "run", "--sizes", "huge")
    assert code == 2 and "huge" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
