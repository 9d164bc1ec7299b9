"""Contestants taking turns: each in a process of its own, which steps when told to; medians, a table and bars.

Turns, because a machine's speed drifts: who runs first and who last would otherwise decide. Processes, because of
memory, and because settings of torch and of the C library are a process's own.
"""

import contextlib
import multiprocessing
import os
import statistics
import time
import traceback

from tqdm import tqdm

from common import UsageError, atomic_open

WARM_UP = 3  # steps that are not timed
SLOW_SECONDS = 3.0  # who needs longer for a step has one step of warming up and one turn


class Here:
    """A contestant in this process: warmed up, its first loss and its memory known, ready for `turn`."""

    def __init__(self, make, size, device, kwargs):
        from gpt2.machine import peak_of_a_step

        started = time.perf_counter()
        self.device, self.contestant = device, make(size, device, **kwargs)
        first_loss = self.contestant.step().item()
        self.facts = {"first_step_seconds": round(time.perf_counter() - started, 2), "first_loss": first_loss}
        for _ in range(WARM_UP - 1):
            started = time.perf_counter()
            self.contestant.step().item()
            if time.perf_counter() - started > SLOW_SECONDS:
                break
        self.facts["peak_mb"] = peak_of_a_step(self.contestant.step, self.contestant.model, device)

    def turn(self, steps):
        """So many steps -> (seconds a step, the last loss). The host waits for the device once, at the end."""
        from gpt2.machine import synchronize

        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(steps):
            loss = self.contestant.step()
        loss = loss.item()
        return (time.perf_counter() - started) / steps, loss

    def ready(self):
        """The facts of the start."""
        return self.facts

    def close(self):
        self.contestant = None


class OwnProcess:
    """The same in a fresh interpreter with more environment variables; built while others are being built."""

    def __init__(self, make, size, device, kwargs, env):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, there = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(there, make, size, device, kwargs), daemon=False)
        with _environment(env):
            self.process.start()
        there.close()

    def _receive(self):
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"a contestant died (exit status {self.process.exitcode})") from None
        if kind == "mistake":
            raise UsageError(value)
        if kind == "failed":
            raise RuntimeError(f"a contestant failed:\n{value}")
        return value

    def ready(self):
        """Wait for the facts of the start."""
        return self._receive()

    def turn(self, steps):
        """As `Here.turn`."""
        self.pipe.send(steps)
        return self._receive()

    def close(self):
        self.pipe.close()  # the other side reads that as the end
        self.process.join(5)
        self.process.kill()
        self.process.join()


def _serve(pipe, make, size, device, kwargs):
    """The other side of `OwnProcess`."""
    try:
        here = Here(make, size, device, kwargs)
        _give_back(device)
        pipe.send(("ready", here.facts))
        while True:
            steps = pipe.recv()
            if device == "cuda":
                here.contestant.step()  # takes the memory anew, before the clock starts
            took = here.turn(steps)
            _give_back(device)
            pipe.send(("turn", took))
    except EOFError:
        os._exit(0)  # a Trainer's thread may still wait for its next step
    except UsageError as e:
        pipe.send(("mistake", str(e)))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))


def _give_back(device):
    """Let go of a GPU's memory that torch keeps for later: in their turns the others need it."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


@contextlib.contextmanager
def _environment(more):
    before = {k: os.environ.get(k) for k in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for k, v in before.items():
            os.environ.pop(k) if v is None else os.environ.update({k: v})


def contest(entrants, device, rounds, steps, log, own_process=True):
    """Let everybody take `rounds` turns of `steps` steps -> {label: facts with "seconds", the median of the turns}.

    entrants: {label: (make, size, kwargs, environment)}. One that cannot start here, for want of memory or of a
    compiler, is left out with a line; UsageError if that leaves nobody.
    """
    running, facts, seconds = {}, {}, {label: [] for label in entrants}
    together = os.cpu_count() if device == "cpu" else 1  # as many start at once: compiling is mostly one thread's work
    try:
        waiting = list(entrants.items())
        bar = tqdm(total=len(waiting), desc="starting", leave=False, disable=None)
        while waiting or len(facts) < len(running):
            while waiting and len(running) - len(facts) < together:
                label, (make, size, kwargs, env) = waiting.pop(0)
                running[label] = (
                    OwnProcess(make, size, device, kwargs, env) if own_process else Here(make, size, device, kwargs)
                )
            label = next(name for name in running if name not in facts)
            bar.update()
            try:
                facts[label] = running[label].ready()
            except RuntimeError as e:
                log.print(f"{label} is left out: {str(e).splitlines()[-1]}")
                running.pop(label).close()
        bar.close()
        if not running:
            raise UsageError("no contestant could start here; the lines above say why")
        for k in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
            order = list(running)
            for label in order[k % len(order) :] + order[: k % len(order)]:  # another one begins every round
                if seconds[label] and seconds[label][0] > SLOW_SECONDS:
                    continue
                took, facts[label]["last_loss"] = running[label].turn(steps)
                seconds[label].append(took)
                log.metric(k, f"turn {label}", seconds=took, loss=facts[label]["last_loss"])
    finally:
        for contestant in running.values():
            contestant.close()
    for label, fact in facts.items():
        fact["seconds"] = statistics.median(seconds[label])
        fact["turns"] = len(seconds[label])
        fact["spread"] = (max(seconds[label]) - min(seconds[label])) / fact["seconds"]
    return facts


def row(name, label, fact, size, flops_per_token, peak, ratio, ratio_to):
    """The row of one contestant, from its facts. peak: FLOP/s that its own are a share of, or None."""
    speed = size.tokens / fact["seconds"]
    return {
        "name": name, "who": label, "ms": round(1e3 * fact["seconds"], 2), "seconds": fact["seconds"],
        "tok_per_sec": round(speed, 1), "mfu": round(speed * flops_per_token / peak, 4) if peak else None,
        "peak_mb": round(fact["peak_mb"], 1) if fact["peak_mb"] else None,
        "first_step_seconds": fact["first_step_seconds"], "spread": round(fact["spread"], 3),
        "turns": fact["turns"],
        "first_loss": round(fact["first_loss"], 4), "last_loss": round(fact["last_loss"], 4),
        "ratio": round(ratio, 3), "ratio_to": ratio_to,
    }  # fmt: skip


def table(rows, share):
    """The rows as text. share: what "mfu" is called on this device."""
    wide = max(len(_label(r)) for r in rows) + 2
    lines = [f"{'':<{wide}} {'ms':>9} {'tok/s':>10} {share:>8} {'MB':>8} {'loss':>7} {'ratio':>6}"]
    for r in rows:
        part = f"{r['mfu']:>8.1%}" if r["mfu"] else f"{'-':>8}"
        memory = f"{r['peak_mb']:>8.0f}" if r["peak_mb"] else f"{'-':>8}"
        figures = f"{r['ms']:>9.1f} {r['tok_per_sec']:>10,.0f} {part} {memory} {r['last_loss']:>7.3f}"
        lines.append(f"{_label(r):<{wide}} {figures} {r['ratio']:>6.2f}")
    return "\n".join(lines)


def _label(row):
    return row.get("lever", row["who"])


def draw(rows, title, file):
    """Bars of tokens a second, the first row on top; ours in orange, rungs that were not kept in grey."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8, 0.9 + 0.36 * len(rows)), dpi=130, layout="constrained")
    ax = fig.subplots()
    labels, speeds = [_label(r) for r in rows], [r["tok_per_sec"] for r in rows]
    plain = ["#D55E00" if r["who"].startswith("ours") else "#8FB8D8" for r in rows]
    colors = [color if r.get("kept", True) else "#BBBBBB" for r, color in zip(rows, plain)]
    bars = ax.barh(range(len(rows)), speeds, color=colors)
    ax.bar_label(bars, [f"{r['tok_per_sec']:,.0f}  ({r['ratio']:.2f})" for r in rows], padding=3, fontsize=8)
    ax.set_yticks(range(len(rows)), labels, fontsize=8)
    ax.invert_yaxis()
    ax.margins(x=0.22)
    grey = "" if all(r.get("kept", True) for r in rows) else "; grey: measured, not kept"
    ax.set_xlabel(f"tokens a second (in brackets: ratio to {rows[0]['ratio_to']}{grey})", fontsize=8)
    ax.set_title(title, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    with atomic_open(file, "wb") as f:
        fig.savefig(f, format="png")
