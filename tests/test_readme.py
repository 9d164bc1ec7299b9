"""README.md against the repository: its commands parse, its laptop-size ones run, its figures are the records'."""

import argparse
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from functools import wraps

import pytest
import torch
import tyro
from conftest import ROOT, SHARED
from figures import paths, table_rows, wrong_figures

from data import prepare, shards
from runlog import read_run

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = ROOT / "README.zh.md"
OF_THE_SYSTEM = {"python3", "py", ".", ".venv\\Scripts\\Activate.ps1", "pip", "pytest"}  # commands that are not ours


def blocks(text):
    """Every fenced block -> (the line before it, its language, its lines)."""
    found, before, language, inside = [], "", None, []
    for line in text.splitlines():
        if language is None and line.startswith("```"):
            language, inside = line[3:].strip(), []
        elif line == "```":
            found.append((before, language, inside))
            language = None
        elif language is not None:
            inside.append(line)
        elif line.strip():
            before = line
    return found


def commands(text):
    """The commands of the blocks without a language -> [(whether at full size, command without its comment)]."""
    return [
        ("full size" in before.lower() or "full-size" in before.lower(), re.sub(r"\s+#.*", "", line).strip())
        for before, language, lines in blocks(text)
        if not language
        for line in lines
        if not line.startswith("#") and re.match(r"(python|torchrun|sbatch|make|pip|\.|py\b|pytest)", line)
    ]


COMMANDS = commands(README)
REPORTED = commands((ROOT / "report.md").read_text(encoding="utf-8"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(DEVICE)", "auto")
QUICKSTART = re.findall(r"^\t(python .*)", MAKEFILE.split("\npydocs:")[1].split("\n\t@echo")[0], re.M)
RECIPES = [line.strip() for line in MAKEFILE.splitlines() if line.startswith("\tpython ") and "-m pytest" not in line]


# ---------------------------------------------------------------------------------------------------------------------
# every command exists and parses


class Parsed(Exception):
    """The flags were understood; the script goes no further."""


@pytest.fixture
def parse(monkeypatch, capsys):
    """parse(script, arguments): let a script read its flags, and stop there."""

    def stop_after(function):
        def wrapped(*args, **kwargs):
            function(*args, **kwargs)
            raise Parsed

        return wrapped

    for module, name in ((prepare, "merge"), (prepare, "adopt"), (prepare, "download"), (shards, "verify")):
        command = wraps(getattr(module, name))(lambda *args, **kwargs: None)
        monkeypatch.setattr(module, name, command)  # tyro calls it when its flags are read
    monkeypatch.setattr(tyro, "cli", stop_after(tyro.cli))
    for name in ("overridable_config_cli", "subcommand_cli_from_dict"):
        monkeypatch.setattr(tyro.extras, name, stop_after(getattr(tyro.extras, name)))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))

    def run(script, arguments):
        if "cuda" in arguments:  # as on a machine with a GPU
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA H100 80GB HBM3")
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *args: (80 * 10**9, 80 * 10**9))
            monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **kwargs: True)
        name = "runlog.__main__" if script == "runlog" else script.removesuffix(".py").replace("/", ".")
        if importlib.util.find_spec(name.split(".")[0]):
            module = importlib.import_module(name)
        else:  # a script that lies in no package
            spec = importlib.util.spec_from_file_location(name.replace(".", "_"), ROOT / script)
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, spec.name, module)
            spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        try:
            module.main()
        except Parsed:
            return
        except SystemExit as e:
            out, err = capsys.readouterr()
            raise AssertionError(f"{script} {shlex.join(arguments)} ends with {e.code}:\n{out}{err}") from None
        raise AssertionError(f"{script} {shlex.join(arguments)} read no flags")

    return run


@pytest.mark.parametrize("command", dict.fromkeys([command for _, command in COMMANDS + REPORTED] + RECIPES))
def test_every_command_exists_and_its_flags_parse(command, parse):
    program, *rest = shlex.split(command, posix=not command.startswith(".venv\\"))
    if program == "make":
        assert re.search(rf"^{rest[0]}:", MAKEFILE, re.M), f"the Makefile has no {rest[0]}"
    elif program in ("python", "torchrun"):
        if rest[:2] == ["-m", "runlog"]:
            return parse("runlog", rest[2:])
        script = next(word for word in rest if word.endswith(".py"))
        assert (ROOT / script).is_file(), f"{script} does not exist"
        parse(script, rest[rest.index(script) + 1 :])
    elif program == "sbatch":
        assert any((ROOT / word).is_file() for word in rest if word.endswith(".sbatch")), command
    else:
        assert program in OF_THE_SYSTEM, f"{command} is not looked at by any test"
    for word in rest:
        if re.match(r"(lora/sweeps|slurm|notebooks|tests)/|requirements", word):
            assert list(ROOT.glob(word)), f"{word} does not exist"


def test_a_command_that_does_not_exist_is_noticed(parse):
    with pytest.raises(AssertionError, match="no-such-flag"):
        parse("gpt2/train_gpt2.py", ["quickstart", "--no-such-flag", "1"])
    with pytest.raises(AssertionError, match="ends with 2"):
        parse("runlog", ["compere", "runs/a"])


# ---------------------------------------------------------------------------------------------------------------------
# the laptop-size ones run


def test_the_python_snippets_run(tmp_path, monkeypatch):
    snippets = ["\n".join(lines) for _, language, lines in blocks(README) if language == "python"]
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


@pytest.mark.slow
def test_the_laptop_size_commands_run_in_their_order(tmp_path):
    """In a fresh clone, after the quickstart's own commands with fewer steps; make, pip and what needs a hub aside."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    items = SHARED / "hellaswag_val.jsonl.gz"
    # The clone's modules come before those of the editable installation; threads as a person has them.
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env |= {"PYTHONPATH": str(clone), "PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"}
    prelude = [re.sub(r"(train_gpt2.py quickstart)", r"\1 --max-steps 20", command) for command in QUICKSTART]
    laptop = [c for full, c in COMMANDS if not full and c.startswith(("python ", "torchrun "))]
    laptop = [f"{c} --input {items}" if "hellaswag.py" in c else c for c in laptop]
    for command in prelude + [c for c in laptop if "hellaswag.py" not in c or items.exists()]:
        done = subprocess.run(command, shell=True, cwd=clone, env=env, capture_output=True, text=True, timeout=900)
        failed = done.returncode not in ((0, 1) if "doctor.py" in command else (0,))  # the doctor finds no hub here
        assert not failed, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


# ---------------------------------------------------------------------------------------------------------------------
# figures


def test_the_figures_of_the_quickstart_are_its_records():
    record = read_run(ROOT / "records/quickstart")
    result, log = record.result, record.log_lines()
    shown = next(lines for _, _, lines in blocks(README) if lines[0].startswith("  val "))
    assert all(line in log for line in shown)
    assert f"validation loss {result['val_loss']:.4f}" in "\n".join(shown)
    assert result["val_loss"] < result["unigram_entropy"] - 1.5


def test_figures_in_tables_that_cite_a_record_are_the_records():
    wrong = {row.line: bad for row in table_rows(README) if row.cited and (bad := wrong_figures(row))}
    assert not wrong, f"lines and figures of README.md that no cited record has: {wrong}"


def test_everything_named_exists():
    """Links lead somewhere; a run that is cited is a record, or what a command of the README makes."""
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert [name for name in links if not (ROOT / name).exists()] == []
    made = " ".join([command for _, command in COMMANDS] + RECIPES) + "runs/NAME"
    assert [p for p in paths(README) if not p.exists() and f"runs/{p.name}" not in made] == []


@pytest.mark.skipif(not CHINESE.exists(), reason="no README.zh.md")
def test_the_chinese_readme_has_the_same_commands_and_figures():
    text = CHINESE.read_text(encoding="utf-8")
    assert [command for _, command in commands(text)] == [command for _, command in COMMANDS]
    outputs, same = ([(kind, lines) for _, kind, lines in blocks(t) if kind == "text"] for t in (text, README))
    assert outputs == same
    assert numbers_in_prose(text) == numbers_in_prose(README)


def numbers_in_prose(text):
    """How often each number stands outside the blocks."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)
    return Counter(re.findall(r"\d+(?:[.,]\d+)*(?:e-?\d+)?", prose))
