"""Compute a recorded adapter's held-out loss again: `python -m runlog verify RUN` calls this."""

from dataclasses import fields
from pathlib import Path

from common import ROOT, UsageError, pick_device, read_json
from lora.generate import adapter_folder, block_size, load_base, load_tokenizer, quiet_libraries
from lora.tasks import load_task, pad_id
from lora.train_lora import TrainConfig, fingerprint, held_out_loss
from runlog.verify import compare_figures, locate_input

# Relative. Other threads or kernels add up in another order; so does the engine that trains many adapters at once.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def replay_run(run, report, *, data=None, **_):
    """Base and rows are those of the run, and the kept adapter has the recorded held-out loss."""
    recorded = run.result.get("held_out_loss")
    if recorded is None:
        raise UsageError("no held-out loss is recorded: the run did not come to its end")
    cfg = config_of(run, data)
    if not check_inputs(run, report, cfg):
        return
    if run.result.get("stopped"):
        report.reasons.append("the loss was computed together with other adapters'")
    again = {"held_out_loss": loss_of(cfg, run)}
    figures = {"held_out_loss": recorded}
    best = [row["loss"] for row in run.rows("val") if row["step"] == run.result.get("best_step")]
    if best:  # the row at which these weights were kept states it, too
        figures[f"val loss of step {run.result['best_step']}"] = best[0]
        again[f"val loss of step {run.result['best_step']}"] = again["held_out_loss"]
    compare_figures(report, "the kept adapter on the held-out rows", figures, again, TOLERANCE[cfg.dtype])
    report.open("how the adapter was trained was not replayed: lora/train_lora.py with the same settings does that")


def config_of(run, data):
    """The recorded settings as a TrainConfig, paths as they are here."""
    known = {f.name for f in fields(TrainConfig)}
    settings = {k: v for k, v in run.settings.items() if k in known} | {"run_dir": str(run.run_dir)}
    if settings.get("data_file"):
        settings["data_file"] = str(locate_input(settings["data_file"], data))
    if (ROOT / settings["base"]).is_dir() and not Path(settings["base"]).is_dir():
        settings["base"] = str(ROOT / settings["base"])
    return TrainConfig(**settings)


def check_inputs(run, report, cfg):
    """The sums that the run recorded of its base and its rows, and the versions behind them -> whether they hold."""
    inputs, sweep = run.settings.get("inputs"), run.run_dir.parent.parent / "sweep.json"
    if not inputs and sweep.exists():  # an adapter that a sweep trained with others
        inputs = read_json(sweep).get("inputs")
    if not isinstance(inputs, dict):
        report.reasons.append("no sums of base and rows are recorded")
        return True
    now, failed = fingerprint(cfg), report.failed
    for name, value in inputs.items():
        if now.get(name) == value:
            continue
        if name.endswith("sha256"):
            what = cfg.base if name.startswith("base") else cfg.data_file
            report.fail(f"{what} is not what the run read: its sum is not the recorded {name}")
        else:
            report.reasons.append(f"{name} {value} then, {now.get(name)} here")
    if report.failed == failed:
        report.ok("base and rows are those of the run")
    return report.failed == failed


def loss_of(cfg, run):
    """Mean loss per learned token of base and adapter on the run's held-out rows."""
    import torch
    from peft import PeftModel

    quiet_libraries()
    folder = adapter_folder(run.run_dir)
    threads = torch.get_num_threads()
    torch.set_num_threads(run.env.get("threads") or threads)
    try:
        tokenizer, device = load_tokenizer(cfg.base), pick_device(cfg.device)
        model = load_base(cfg.base, cfg.dtype, device, cfg.load_in_4bit)
        task = load_task(
            cfg.task, tokenizer, block_size(model.config), data_file=cfg.data_file, mode=cfg.mode,
            max_length=cfg.max_length, held_out=cfg.held_out, max_rows=cfg.max_rows,
        )  # fmt: skip
        model = PeftModel.from_pretrained(model, folder).to(device)
        return held_out_loss(model, task.held_out[: cfg.eval_rows or None], pad_id(tokenizer))
    finally:
        torch.set_num_threads(threads)
