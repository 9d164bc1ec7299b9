"""README.md against the repository: its commands are the Makefile's, its flags exist, its figures are the record's."""

import json
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.S | re.M)
COMMANDS = [
    line.split("#")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if re.match(r"(python|torchrun) .*\w+/\w+\.py", line)
]


def test_the_quickstart_commands_are_those_of_the_makefile():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nquickstart:")[1].split("\t@echo")[0]
    commands = [line.strip() for line in recipe.splitlines()[1:]]
    assert len(commands) == 7
    assert "\n".join(commands) in README


@pytest.mark.parametrize("command", COMMANDS)
def test_every_script_and_flag_exists(command):
    script = re.search(r"\w+/\w+\.py", command)[0]
    source = (ROOT / script).read_text(encoding="utf-8")
    if script == "gpt2/train_gpt2.py":
        source = (ROOT / "gpt2/config.py").read_text(encoding="utf-8")
    for flag in re.findall(r" --([\w-]+)", command.split(script)[1]):
        field = flag.replace("-", "_")
        assert re.search(rf"\b{field}\b", source), f"{script} has no --{flag}"


def test_the_figures_of_the_quickstart_are_its_records():
    record = ROOT / "runs/quickstart-record"
    result = json.loads((record / "result.json").read_text(encoding="utf-8"))
    log = (record / "log.txt").read_text(encoding="utf-8").splitlines()
    shown = next(block for block in BLOCKS if block.startswith("unigram entropy"))
    assert all(line in log for line in shown.splitlines())
    assert f"validation loss {result['val_loss']}" in shown
    assert result["val_loss"] < result["unigram_entropy"] - 1.5
