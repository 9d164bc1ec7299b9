"""Write a run directory, mirror it to TensorBoard and Weights & Biases, and export it as a compact record."""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
import uuid
from contextlib import ExitStack, closing
from pathlib import Path

from tqdm import tqdm

from common import ROOT, UsageError, atomic_folder, locked, plain, write_json
from runlog.run import draw_curves, read_run

STATUSES = ("running", "success", "preempted", "diverged", "failed")


class RunLog:
    """Writes one run directory.

        with RunLog("runs/mine", kind="gpt2", config=cfg, resume=True) as log:
            log.metric(step, "train", loss=4.2)
            log.print("step 1 | loss 4.2")
            log.finish("success", val_loss=3.9)

    config: a dataclass or dict of every setting.
    resume: keep the rows of an earlier start and append to them; otherwise they are replaced.
    enabled: False on every rank but one; then all methods do nothing.
    tensorboard, wandb: also log every number there, as KIND/FIELD; UsageError where the package is missing.

    Leaving the block with an exception records status "failed" and the reason. The directory is locked while the block
    runs (the operating system drops the lock of a process that died); a second writer gets a UsageError.
    """

    def __init__(self, run_dir, kind, config, *, resume=False, enabled=True, tensorboard=False, wandb=False):
        self.run_dir, self.kind, self.config = Path(run_dir), kind, config
        self.resume, self.enabled = resume, enabled
        self._mirror_names = ["tensorboard"] * tensorboard + ["wandb"] * wandb
        self.ckpt_dir = self.run_dir / "ckpt"
        self.finished = False

    def __enter__(self):
        if not self.enabled:
            return self
        for name in self._mirror_names:  # a missing package is reported before anything is written
            if importlib.util.find_spec(name) is None:
                raise UsageError(f"--{name} needs the package {name}, which is not installed: pip install {name}")
        settings, self._losses = plain(self.config), {"train": {}, "val": {}}  # {kind: {step: loss}}, for the picture
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:  # a start that fails releases what it holds
            stack.enter_context(locked(self.run_dir / "run.lock", self.run_dir))
            self._mirrors = [stack.enter_context(closing(MIRRORS[name](self, settings))) for name in self._mirror_names]
            if not self.resume:
                for name in ("metrics.jsonl", "log.txt", "samples.txt", "loss.png", "result.json"):
                    (self.run_dir / name).unlink(missing_ok=True)
            metrics = self.run_dir / "metrics.jsonl"
            if metrics.exists():  # without an incomplete last line
                os.truncate(metrics, metrics.read_bytes().rfind(b"\n") + 1)
            write_json(self.run_dir / "config.json", {"kind": self.kind, "settings": settings, **provenance()})
            write_json(self.run_dir / "env.json", environment())
            for row in read_run(self.run_dir).metrics:
                self._remember_loss(row)
            self._metrics = stack.enter_context(open(metrics, "a", encoding="utf-8", newline="\n"))
            self._log = stack.enter_context(open(self.run_dir / "log.txt", "a", encoding="utf-8", newline="\n"))
            self.started = time.time()
            self._write_result("running", {})
            self._held = stack.pop_all()
        return self

    def __exit__(self, exc_type, exc, tb):
        if not self.enabled:
            return
        try:
            with self._held:
                if exc is not None and not self.finished:
                    status = "preempted" if exc_type is KeyboardInterrupt else "failed"
                    if status == "failed" and exc_type is not UsageError:  # for runs without a terminal
                        self._log.write("".join(traceback.format_exception(exc)).replace(f"{ROOT}{os.sep}", ""))
                    self.finish(status, reason=f"{exc_type.__name__}: {exc}".splitlines()[0])
        except OSError:  # a full disk: the first error is the better one
            if exc is None:
                raise

    def metric(self, step, kind, **fields):
        """Append one row and flush it, so that a kill loses at most the row being written."""
        if self.enabled:
            row = plain({"step": step, "kind": kind, **fields, "time": round(time.time(), 3)})
            self._metrics.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            self._metrics.flush()
            self._remember_loss(row)
            for mirror in self._mirrors:
                mirror.add(step, {f"{kind}/{k}": row[k] for k in fields if type(row[k]) in (int, float)})

    def _remember_loss(self, row):
        if row["kind"] in self._losses and row.get("loss") is not None:
            self._losses[row["kind"]][row["step"]] = row["loss"]

    def print(self, text=""):
        """Show a line on the terminal (above a progress bar, if any) and append it to log.txt."""
        if self.enabled:
            tqdm.write(str(text), file=sys.stdout)
            sys.stdout.flush()
            self._log.write(f"{text}\n")
            self._log.flush()

    def sample(self, step, text):
        """Append a generated text to samples.txt."""
        if self.enabled:
            with open(self.run_dir / "samples.txt", "a", encoding="utf-8", newline="\n") as f:
                f.write(f"--- step {step}\n{text}\n")

    def plot(self, reference=None, submit=lambda work, *args, **kwargs: work(*args, **kwargs)):
        """Refresh loss.png from the rows kept in memory. reference: {label: loss}, drawn as dashed lines.

        submit: an executor's `submit`, to draw on its thread.
        """
        if self.enabled:
            curves = {kind: tuple(zip(*sorted(losses.items()))) for kind, losses in self._losses.items() if losses}
            submit(draw_curves, self.run_dir / "loss.png", curves, reference, title=self.run_dir.resolve().name)

    def finish(self, status, **numbers):
        """Write result.json: status, seconds since this start, the final numbers, a checksum of the metrics."""
        assert status in STATUSES, status
        self.finished = True
        if self.enabled:
            checksum = read_run(self.run_dir).metrics_sha256
            facts = {"seconds": round(time.time() - self.started, 3), **numbers, "metrics_file_sha256": checksum}
            self._write_result(status, facts)

    def _write_result(self, status, numbers):
        write_json(self.run_dir / "result.json", {"status": status, "kind": self.kind, **numbers})


def git(*args, seconds=10):
    """Output of a git command in the repository, or None if it fails or takes longer."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *args], capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def provenance():
    """{argv, git_commit, git_dirty}: the command and the code. Untracked files do not count as changes."""
    changes = git("status", "--porcelain", "--untracked-files=no")
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    code = {"git_commit": git("rev-parse", "HEAD"), "git_dirty": None if changes is None else bool(changes)}
    return {"argv": [script.as_posix(), *sys.argv[1:]], **code}


def environment():
    """Versions and hardware that affect results: GPU, threads, world size, nodes and job id."""
    env = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
        "nodes": os.environ.get("SLURM_JOB_NODELIST") or os.environ.get("GROUP_WORLD_SIZE"),  # torchrun's: how many
        "job_id": os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID"),
    }
    imported = {name: sys.modules[name] for name in ("numpy", "torch", "transformers", "peft") if name in sys.modules}
    env |= {name: module.__version__ for name, module in imported.items()}
    if torch := imported.get("torch"):  # not imported just for this
        env |= {"threads": torch.get_num_threads(), "cuda": torch.version.cuda}
        env["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return env


def _cpu_name():
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


# --- mirrors of metrics.jsonl in other tools


class TensorBoard:
    """The numbers as scalars in RUN_DIR/tensorboard, for `tensorboard --logdir runs`."""

    def __init__(self, log, settings):
        self.folder, self.writer = log.run_dir / "tensorboard", None
        if not log.resume:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, step, numbers):
        if self.writer is None:  # resumed: hide the points of steps that are computed again
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=step)
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self):
        if self.writer is not None:
            self.writer.close()


class Wandb:
    """The numbers as one run at Weights & Biases, continued on resume. WANDB_MODE=offline keeps it in RUN_DIR."""

    def __init__(self, log, settings):
        import wandb

        id_file = log.run_dir / "wandb_id.txt"
        if not (log.resume and id_file.exists()):
            id_file.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "bytes-to-lora"), group=log.kind, name=log.run_dir.name,
                id=id_file.read_text(encoding="utf-8"), resume="allow", dir=str(log.run_dir), config=settings,
            )  # fmt: skip
        except Exception as e:  # no network, no key, …: each has its own class
            why = f"{type(e).__name__}: {e}".splitlines()[0]
            raise UsageError(f"wandb did not start ({why}); set WANDB_MODE=offline, or leave out --wandb") from e
        # Steps may repeat after a kill, which wandb's own counter refuses: the step is an ordinary field.
        self.run.define_metric("*", step_metric="step")

    def add(self, step, numbers):
        self.run.log({"step": step, **numbers})

    def close(self):
        self.run.finish()


MIRRORS = {"tensorboard": TensorBoard, "wandb": Wandb}


# --- a compact record


def export_record(run_dir, out):
    """Write a record of a run: at most four files (records/README.md), which read_run reads like the run itself."""
    run, out = read_run(run_dir), Path(out)
    if out.exists():
        raise UsageError(f"{out} exists; remove it first, or choose another --out")
    log, end = run.run_dir / "log.txt", "samples.txt"
    if run.kind == "lora_sweep":
        log, end = next(run.run_dir.glob("lora_experiments_*.log"), log), "table.md"
    pictures = [run.run_dir / "loss.png", *sorted(run.run_dir.glob("*.png"))]
    files = [path for path in pictures if path.exists()][:1]
    files += [run.run_dir / name for name in ("metrics.jsonl", "hellaswag.jsonl") if run.read_text(name)]
    adapters = [_adapter_row(adapter, run) for adapter in run.adapters()]
    with atomic_folder(out) as part:
        for file in files:
            shutil.copyfile(file, part / file.name)
        (part / log.name).write_text(run.read_text(log.name) + run.read_text(end), encoding="utf-8", newline="\n")
        if adapters:
            with open(part / "adapters.jsonl", "w", encoding="utf-8", newline="\n") as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in adapters)
        write_json(part / "record.json", {"config": run.config, "env": run.env, "result": run.result})


def _adapter_row(adapter, sweep):
    """An adapter's line in adapters.jsonl, with the checksums of its inputs, which the sweep stores once."""
    config = {**adapter.config, "settings": {"inputs": sweep.settings.get("inputs"), **adapter.settings}}
    rows = [json.loads(line) for line in adapter.read_text("metrics.jsonl").split("\n")[:-1]]
    return {"name": adapter.name, "config": config, "env": adapter.env, "result": adapter.result, "metrics": rows}
