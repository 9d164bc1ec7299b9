"""report.md: each figure in its tables equals the record that it cites, and no row of the reproduction is missing."""

import json
import re

import pytest
from conftest import ROOT
from figures import figures, holds, paths, table_rows, wrong_figures

from runlog.__main__ import find_named
from runlog.judge import judge

REPORT = (ROOT / "report.md").read_text(encoding="utf-8")
ROWS = [f"B{i}" for i in range(1, 8)] + [f"G{i}" for i in range(1, 25)] + [f"L{i}" for i in range(1, 8)]


def test_every_figure_in_the_tables_is_the_cited_records():
    wrong = {
        f"line {row.line}": (bad, [p.name for p in row.cited])
        for row in table_rows(REPORT)
        if (bad := wrong_figures(row))
    }
    assert not wrong, "\n".join(
        f"report.md, {where}: {bad} in none of {cited}" for where, (bad, cited) in wrong.items()
    )


def test_a_wrong_digit_is_noticed():
    """Each figure of the report with its last digit changed: few can be another number of the same record."""
    tried = missed = 0
    for row in table_rows(REPORT):
        for head, cell in row.cells.items():
            for figure in figures(type(row)({head: cell}, row.cited, row.line)):
                digit = re.search(r"\d(?=\D*$)", figure)
                other = figure[: digit.start()] + str((int(digit[0]) + 5) % 10) + figure[digit.end() :]
                changed = type(row)({**row.cells, head: cell.replace(figure, other)}, row.cited, row.line)
                tried += 1
                missed += other not in wrong_figures(changed)
    assert tried > 100
    assert missed / tried < 0.1, (missed, tried)


def test_everything_cited_exists():
    missing = [path for path in paths(REPORT) if not path.exists()]
    assert not missing


def test_every_row_of_the_reproduction_has_its_entry():
    text = REPORT
    for kind, first, last in re.findall(r"\b([BGL])(\d+)(?:–| to )[BGL]?(\d+)\b", text):
        text += " ".join(f" {kind}{i}" for i in range(int(first), int(last) + 1))
    assert [row for row in ROWS if not re.search(rf"\b{row}\b", text)] == []


@pytest.fixture
def record(tmp_path, monkeypatch):
    """A record to cite, as records/mine, and three that differ by their seed."""
    monkeypatch.setattr("figures.ROOT", tmp_path)
    entries = [{"name": "train", "who": "ours", "seconds": 1.25}, {"name": "train", "who": "peer", "seconds": 2.5}]
    results = {"mine": {"val_loss": 4.7856, "share": 0.273, "steps": 1024, "rows": entries}}
    results |= {f"a-seed{i}": {"val_loss": 2.0 + i / 10} for i in (1, 2, 3)}
    for name, result in results.items():
        (tmp_path / "records" / name).mkdir(parents=True)
        record = {"config": {"kind": "test", "settings": {}}, "env": {}, "result": result}
        (tmp_path / "records" / name / "record.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text("CASES = 5_000\nassert abs(a - b) < 1e-5\n", encoding="utf-8")


CITING = "| what | original | here |\n|---|---|---|\n| GPT-2, {what} | 38.9 s | {here} |\n"


@pytest.mark.parametrize(
    "here, wrong",
    [
        ("4.786 nats after 1,024 steps (`records/mine`)", []),
        ("4.787 nats after 1,025 steps (`records/mine`)", ["4.787", "1,025"]),
        ("27 %, 27.3%, 28 % (`records/mine`)", ["28 %"]),
        ("4.786, below the 9.9 aimed at, in `n_embd=77` (`records/mine`)", []),
        ("2.20 ± 0.10 (`records/a-seed{1,2,3}`)", []),
        ("2.20 ± 0.11 (`records/a-seed*`)", ["0.11"]),
        ("5,000 cases to 1e-5 (`tests/test_it.py`)", []),
        ("5,001 cases to 1e-6 (`tests/test_it.py`)", ["5,001", "1e-6"]),
        ("4.786 and 9 (`records/mine/record.json`)", ["9"]),
        ("4.786", ["4.786"]),
    ],
)
def test_what_counts_as_right(record, here, wrong):
    (row,) = table_rows(CITING.format(what="124M", here=here))
    assert wrong_figures(row) == wrong


def test_a_benchmarks_words_choose_its_entry(record):
    table = (
        "One run (`records/mine`):\n\n| what | who | s |\n|---|---|---|\n| train | ours | {} |\n| train | peer | {} |\n"
    )
    assert [wrong_figures(row) for row in table_rows(table.format("1.25", "2.5"))] == [[], []]
    assert [wrong_figures(row) for row in table_rows(table.format("2.5", "2.51"))] == [["2.5"], ["2.51"]]


def test_rounding():
    assert holds("9.936", 9.9365) and holds("12.62", 12.625) and holds("516", 515.6) and not holds("9.93", 9.9365)


def verdict_line(baseline, candidate):
    """A line of the report's list of verdicts: `runlog judge --fixed` on records, adapters by their held-out loss."""
    metric = "held_out_loss" if "adapters" in baseline else ""
    sides = []
    for pattern in (baseline, candidate):
        names = [pattern] if "adapters" in pattern else [p.name for p in sorted((ROOT / "records").glob(pattern))]
        sides.append([run for name in names for run in find_named(f"records/{name}")])
    v = judge(*sides, metric=metric, fixed=True)
    interval = f"{v.low:+.4f} … {v.high:+.4f}" if v.low is not None else "unbounded"
    return f"{baseline:<57} {candidate:<57} {v.n}  {v.difference:+.4f}  {interval:<19}  {v.verdict}"


def test_verdicts_are_the_judges():
    block = REPORT.split("```text\nbaseline ")[1].split("\n```")[0].splitlines()[1:]
    assert len(block) > 8
    assert block == [verdict_line(*line.split()[:2]) for line in block]
