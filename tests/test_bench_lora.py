import pytest

from bench import bench_lora
from runlog import read_run


@pytest.fixture
def run(contestants_here, in_process, tmp_path):
    """Measure a tiny size in this process -> (exit status, stdout, stderr)."""
    flags = ("--run-dir", tmp_path, "--sizes", "tiny", "--k", 2, "--vocab-size", 50, "--rounds", 1, "--device", "cpu")
    return lambda *args: in_process(bench_lora.main, *flags, *args)


@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_rows_say_what_they_are_a_ratio_to(run, tmp_path, family):
    code, out, err = run("--family", family)
    assert code == 0, err
    rows = {row["name"].removeprefix("tiny/"): row for row in read_run(tmp_path).result["rows"]}
    assert rows.keys() == {"trainer", "loop", "engine", "fast gelu"} and out.count("tiny/") == 4
    engine, trainer = rows["engine"], rows["trainer"]
    assert trainer["ratio"] == 1 and trainer["who"].startswith("transformers ") and engine["who"] == "ours"
    assert engine["ratio"] == pytest.approx(trainer["seconds"] / engine["seconds"]) and engine["tokens"] == 8
    assert all(row["ratio_to"] == "trainer" for row in rows.values())
    kinds = {row["kind"] for row in read_run(tmp_path).metrics}
    assert {"tiny/engine", "tiny/trainer", "tiny/loop"} <= kinds


def test_contestants_that_did_other_work_are_detected(run, tmp_path, monkeypatch):
    monkeypatch.setitem(bench_lora.CONTESTANTS, "loop", lambda cfg, size, who: lambda: [9.0] * cfg.k)
    with pytest.raises(RuntimeError, match="did not do the same work"):
        run()
    assert read_run(tmp_path).result["status"] == "failed" and read_run(tmp_path).metrics  # measured, so written
