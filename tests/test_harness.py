"""bench/harness.py: what it refuses; how it measures is tested with the benchmarks."""

import pytest

from bench.harness import BenchConfig, open_log
from common import UsageError


def test_no_round_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="--rounds 0 measures nothing"):
        open_log(BenchConfig(run_dir=tmp_path / "run", rounds=0), "bench")
    assert not (tmp_path / "run").exists()


def test_a_finished_benchmark_is_replaced_only_on_demand(tmp_path):
    with open_log(BenchConfig(run_dir=tmp_path), "bench") as log:
        log.finish("success")
    with pytest.raises(UsageError, match="replace it by --overwrite"):
        open_log(BenchConfig(run_dir=tmp_path), "bench")
    open_log(BenchConfig(run_dir=tmp_path, overwrite=True), "bench")
