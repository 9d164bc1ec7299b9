"""Does the judge keep its word? Changes whose effect is known, each trained over several seeds and judged.

    python bench/bench_judge.py                                # hours on two cores; killed, the same command resumes
    python bench/bench_judge.py --arms 4 --max-seeds 3         # the first four of either kind

Null changes alter the bits of a run and not the loss that one expects: other seeds, another order of the documents,
another micro-batch, threads, compiled kernels. Effects are rates off by factors, no warmup, dropout, other sizes,
AdamW. Each is trained over all --max-seeds, so that three rules can be compared on the same runs: the judge, asked
after each seed and stopped at its first decision, and Student's t interval with 3 and with --max-seeds seeds. A row for
each change tells what each rule said, and how many runs it took; the summary, how often a null change was called better
or worse, with the upper end of the 95 % interval (Clopper and Pearson 1934), and how often an effect was found.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas
import tyro
from matplotlib.figure import Figure
from scipy.stats import beta
from tqdm import tqdm

from bench.harness import open_log
from common import ROOT, UsageError, atomic_open, cli, file_sha256
from data.shards import open_split, read_meta, write_meta, write_shard
from gpt2.experiment import Arm, ExperimentConfig, Runner
from runlog.judge import COLORS, judge

BASE = "quickstart --n-layer 2 --n-embd 96 --n-head 4 --block-size 64 --total-batch-size 1024 --max-steps 150"
BASE += " --warmup-steps 40 --val-every 150 --val-tokens 65536 --sample-every 0 --checkpoint-every 0 --device cpu"
EFFECTS = """--muon-lr 5e-4|--muon-lr 1.5e-3|--muon-lr 2.5e-3|--muon-lr 1e-2|--muon-lr 2e-2|--max-lr 1e-3|--max-lr 3e-3
--max-lr 3e-2|--warmup-steps 0|--warmup-steps 100|--optimizer adamw|--dropout 0.05|--dropout 0.1|--dropout 0.2
--n-embd 64|--n-embd 128|--n-layer 1|--n-layer 3|--weight-decay 1|--block-size 32""".replace("\n", "|").split("|")
SEED_NULLS, ORDER_NULLS = 10, 4


@dataclass(kw_only=True)
class Config:
    run_dir: Path | None = None  # run directory; none: runs/bench_judge
    data_dir: Path = ROOT / "data/corpora/pydocs-1024"  # token shards
    arms: int = 20  # changes of either kind: the first so many
    max_seeds: int = 8  # seeds of each
    alpha: float = 0.05  # error rate of each change's verdict
    jobs: int = 2  # runs at a time
    overwrite: bool = False  # replace a finished calibration in the run directory


def in_another_order(data_dir, out, seed):
    """Write the shards of data_dir to `out` with the training documents in another order, if they are not there yet."""
    meta = read_meta(data_dir)
    if not (out / "meta.json").exists():
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(data_dir / "tokenizer.model", out)
        shards = []
        for split in ("val", "train"):
            ids, path = np.concatenate(open_split(data_dir, split)), out / f"{split}.bin"
            if split == "train":  # a document begins with <|endoftext|>
                pieces = np.split(ids, np.flatnonzero(ids == meta["eot"])[1:])
                ids = np.concatenate([pieces[i] for i in np.random.default_rng(seed).permutation(len(pieces))])
            documents, size = (sum(s[k] for s in meta["shards"] if s["split"] == split) for k in ("documents", "bytes"))
            facts = {"tokens": write_shard(path, ids), "documents": documents, "bytes": size}
            shards.append({"file": path.name, "split": split, **facts, "sha256": file_sha256(path)})
        write_meta(out, **{**meta, "shards": shards})
    return out


def nulls(cfg, folder):
    """[Arm] of changes that alter the bits and not the expected loss."""
    arms = [Arm(f"seeds-from-{1000 * k}", [], seed_offset=1000 * k) for k in range(1, SEED_NULLS + 1)]
    for k in range(1, ORDER_NULLS + 1):
        other = in_another_order(cfg.data_dir, folder / f"order-{k}", k)
        arms.append(Arm(f"order-of-documents-{k}", ["--data-dir", str(other)]))
    arms += [Arm(f"micro-batch-{n}", ["--micro-batch-size", str(n)]) for n in (1, 2, 4, 8)]
    return [*arms, Arm("compiled", ["--compile"]), Arm("2-threads", [], env={"OMP_NUM_THREADS": "2"})]


def first_decision(baseline, arm, cfg):
    """The judge, asked after each seed from the first on -> (Verdict, seeds that it took)."""
    for n in range(1, cfg.max_seeds + 1):
        verdict = judge(*[[side.runs[i] for i in range(1, n + 1)] for side in (baseline, arm)], alpha=cfg.alpha)
        if verdict.verdict != "undecided":
            break
    return verdict, n


def judged(baseline, arm, kind, cfg):
    """A row: what the three rules say of a change, and its effect in units of the noise."""
    verdict, n = first_decision(baseline, arm, cfg)
    row = {"name": arm.name, "kind": kind, "verdict": verdict.verdict, "seeds": n}
    for fixed in (3, cfg.max_seeds):
        sides = [[side.runs[i] for i in range(1, fixed + 1)] for side in (baseline, arm)]
        v = judge(*sides, alpha=cfg.alpha, fixed=True)
        row[f"fixed_{fixed}"] = v.verdict
    row |= {"difference": v.difference, "low": v.low, "high": v.high, "noise": v.noise, "paired": v.paired}
    seconds = [run.result["seconds"] for run in arm.runs.values()]
    return {**row, "effect": v.difference / v.noise, "seconds": float(np.median(seconds)), "values": v.values}


def rates(rows, cfg):
    """How often each rule erred on the null changes and found the effects -> rows of the summary."""
    for rule in ("verdict", "fixed_3", f"fixed_{cfg.max_seeds}"):
        seeds = {"verdict": None, "fixed_3": 3}.get(rule, cfg.max_seeds)
        for kind in ("null", "effect"):
            some = [r for r in rows if r["kind"] == kind]
            counts = {said: sum(r[rule] == said for r in some) for said in ("better", "worse", "no difference")}
            false = counts["better"]
            yield {
                "rule": rule.replace("verdict", "judge"), "kind": kind, "changes": len(some), **counts,
                "better_at_most": float(beta.ppf(0.975, false + 1, len(some) - false)) if kind == "null" else None,
                "runs": sum(seeds or r["seeds"] for r in some),
                "minutes": sum((seeds or r["seeds"]) * r["seconds"] for r in some) / 60,
            }  # fmt: skip


def draw(out, rows, cfg):
    """Seeds until the judge decided, and what it said, by the size of the effect in units of the noise."""
    fig = Figure(figsize=(7.2, 4), dpi=130, layout="constrained")
    ax = fig.subplots()
    for kind, marker in (("null", "x"), ("effect", "o")):
        for said, color in COLORS.items():
            some = [(abs(r["effect"]), r["seeds"]) for r in rows if (r["kind"], r["verdict"]) == (kind, said)]
            if some:
                ax.plot(*zip(*some), marker, color=color, alpha=0.7, label=f"{kind}: {said} ({len(some)})")
    ax.set_xscale("symlog", linthresh=0.1)
    ax.set(xlabel=f"|difference of the loss over {cfg.max_seeds} seeds| / standard deviation of the baseline")
    ax.set(ylabel="seeds until the verdict", ylim=(0, cfg.max_seeds + 1), title=f"alpha = {cfg.alpha:g}")
    ax.legend(frameon=False, fontsize=8)
    with atomic_open(out, "wb") as f:
        fig.savefig(f, format="png")


def main():
    """Train all arms, judge them, and record the rates."""
    cfg = tyro.cli(Config, description=__doc__)
    if cfg.max_seeds < 3 or cfg.arms < 1:
        raise UsageError("the rules are compared over at least 3 seeds, on at least one change: --max-seeds, --arms")
    with open_log(cfg, "bench_judge", resume=True) as log:
        baseline, null = Arm("baseline", []), nulls(cfg, log.run_dir)[: cfg.arms]
        effects = [Arm(flags.strip("-").replace(" ", "_"), flags.split()) for flags in EFFECTS[: cfg.arms]]
        options = {"run_dir": str(log.run_dir), "jobs": cfg.jobs, "change": ("none",)}
        runner = Runner(ExperimentConfig(base=f"{BASE} --data-dir {cfg.data_dir}", **options), log.print)
        arms = [baseline, *null, *effects]
        todo = [(arm, seed) for seed in range(1, cfg.max_seeds + 1) for arm in arms]
        with tqdm(total=len(todo), unit="run", dynamic_ncols=True) as bar:
            runner.round(todo, bar)
        rows = [judged(baseline, arm, "null" if arm in null else "effect", cfg) for arm in arms[1:]]
        rows.sort(key=lambda r: (r["kind"], abs(r["effect"])))
        summary = list(rates(rows, cfg))
        shown = pandas.DataFrame(rows).drop(columns=["low", "high", "values", "noise"])
        log.print(f"{shown.to_string(index=False, float_format='{:,.3g}'.format)}\n")
        log.print(pandas.DataFrame(summary).to_string(index=False, float_format="{:,.3g}".format, na_rep="-"))
        draw(log.run_dir / "bench.png", rows, cfg)
        log.finish("success", rows=rows, summary=summary)


if __name__ == "__main__":
    cli(main)
