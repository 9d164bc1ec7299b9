"""Figures in Markdown tables against the records that they cite, for the tests of report.md and README.md.

The convention: a table row cites the records of its figures as `records/NAME` (braces and * may name several), or else
the paragraph before the table does, for all rows. A figure holds if one of the cited records has a number that rounds
to it as printed, in record.json, a sweep's table, or a row of metrics other than training steps (adapters' included); a
percentage may be a share there. Where the row's words are those of one entry of a benchmark's `rows`, or its `summary`
(as "train" and "ours"), the figures must be that entry's. A figure may also stand in a cited test. Runs that differ by
their seed (NAME-seed1, …) also give their mean and standard deviation. Not figures: what is in backticks, names with a
digit (GPT-2, float64, 124M), and what is said to be "aimed at". Columns headed original, question or nothing at all are
not looked at.
"""

import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from statistics import mean, stdev

from conftest import ROOT

from common import read_json
from runlog import read_run

NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?!\.?\d|[\w-])(?: ?%)?")
CITED = re.compile(r"`((?:records|runs|tests)/[^`\s]+)`")
NOT_OURS = ("original", "question", "row")


@dataclass
class Row:
    """One row of a table: {head: cell}, the records and tests that it cites, and where it stands."""

    cells: dict
    cited: list
    line: int


def table_rows(text):
    """The rows of all tables in a Markdown text."""
    paragraph, head, lines = "", None, text.splitlines()
    for number, line in enumerate(lines, 1):
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if head is None:
                head = cells
            elif set(line) - set("|-: "):
                yield Row(dict(zip(head, cells)), paths(line) or paths(paragraph), number)
        elif head is not None or line.startswith("#"):
            paragraph, head = "", None
        elif line.strip():
            paragraph = (paragraph if lines[number - 2].strip() else "") + line + "\n"


def paths(text):
    """The records and tests cited in a text: `records/{a,b}-seed{1,2}` names four."""
    found = []
    for cited in CITED.findall(text):
        parts = re.split(r"\{([^}]*)\}", cited)
        choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
        for name in map("".join, product(*choices)):
            found += sorted(ROOT.glob(name)) if "*" in name else [ROOT / name]
    return found


def figures(row):
    """The figures of a row, as printed."""
    found = []
    for head, cell in row.cells.items():
        if head and not any(word in head.lower() for word in NOT_OURS):
            found += NUMBER.findall(re.sub(r"`[^`]*`|[\d.,]+ ?[×%]?(?= aimed at)", " ", cell))
    return found


def wrong_figures(row):
    """The figures of a row that none of its records has, as printed."""
    wanted = figures(row)
    if not wanted:
        return []
    known = [n for path in row.cited for n in (entry_numbers(path, row) or numbers(path))]
    known += over_seeds(row.cited)
    return [figure for figure in wanted if not any(holds(figure, number) for number in known)]


def holds(figure, number):
    """Whether a number rounds to the figure: holds("27 %", 0.273), holds("1,024", 1024), not holds("0.28", 0.273)"""
    digits = figure.rstrip(" %").replace(",", "")
    shown = float(digits)
    if "e" in digits:
        return shown == number
    half = 0.5 * 10.0 ** -len(digits.partition(".")[2]) + 1e-9
    return abs(number - shown) <= half or ("%" in figure and abs(100 * number - shown) <= half)


@cache
def numbers(path):
    """Every number in a record, or in the source of a test."""
    if path.suffix in (".py", ".txt", ".md"):
        return tuple(in_text(path.read_text(encoding="utf-8").replace("_", "")))
    if path.suffix == ".json":
        return tuple(in_value(read_json(path)))
    run, found = read_run(path), []
    for one in [run, *run.adapters()]:
        rows = [{k: v for k, v in row.items() if k != "time"} for row in one.metrics if row["kind"] != "train"]
        found += in_value([one.config, one.env, one.result, rows])
    for file in path.glob("lora_experiments_*.log"):
        table = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        found += in_text("\n".join(table))
    return tuple(found)


def entry_numbers(path, row):
    """The numbers of those entries of a benchmark's `rows` that have the row's words; none where no word is theirs."""
    found = result(path)
    entries = [entry for entry in [*(found.get("rows") or []), *found.get("summary", [])] if isinstance(entry, dict)]
    words = {value for entry in entries for value in entry.values() if isinstance(value, str)} & {*row.cells.values()}
    same = [entry for entry in entries if words <= {v for v in entry.values() if isinstance(v, str)}]
    return [n for entry in same for n in in_value(entry)] if words else []


@cache
def result(path):
    """The result of a cited record, or of its record.json."""
    folder = path.parent if path.suffix == ".json" else path
    return read_run(folder).result if (folder / "record.json").is_file() else {}


def over_seeds(cited):
    """Means, standard deviations, and differences of means, of the results of runs that differ by their seed."""
    groups = {}
    for path in cited:
        if re.search(r"-seed\d+$", path.name):
            groups.setdefault(re.sub(r"-seed\d+$", "", path.name), []).append(result(path))
    found, means = [], []
    for runs in groups.values():
        fields = [
            k for k, v in runs[0].items() if isinstance(v, int | float) and all(r.get(k) is not None for r in runs)
        ]
        means.append({k: mean(r[k] for r in runs) for k in fields})
        found += means[-1].values()
        found += [stdev(r[k] for r in runs) for k in fields if len(runs) > 1]
    for one, other in product(means, means):
        found += [one[k] - other[k] for k in one.keys() & other.keys() if one[k] > other[k]]
    return found


def in_value(value):
    """Every number in a JSON value, those inside texts too."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in in_value(v)]
    if isinstance(value, list):
        return [n for v in value for n in in_value(v)]
    if isinstance(value, str):
        return in_text(value)
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def in_text(text):
    return [float(n.replace(",", "")) for n in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?!\w)", text)]
