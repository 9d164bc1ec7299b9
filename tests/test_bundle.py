"""bundle.py: what is made in one folder sets up another clone, whole or not at all."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import bundle

ENDINGS = ["on it.", "in air.", "at five.", "the."]
ITEMS = [{"ind": i, "ctx": f"The cat number {i} sat", "endings": ENDINGS, "label": str(i % 4)} for i in range(6)]


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    """A small bundle: one wheel made here, the vocabulary, HellaSwag from a local file, shards, two base models."""
    folder = tmp_path_factory.mktemp("made")
    with gzip.open(folder / "hellaswag.jsonl.gz", "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(item) + "\n" for item in ITEMS)
    (folder / "tiny").mkdir()
    (folder / "tiny/config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    shutil.copytree(corpus, folder / "words")
    command = ["bundle.py", "make", folder / "bundle", "--no-wheels", "--hellaswag", folder / "hellaswag.jsonl.gz"]
    command += ["--corpus", folder / "words", "--base", f"someone/tiny={folder / 'tiny'}", "--base", folder / "tiny"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", list(map(str, command)))
        bundle.main()
    (folder / "bundle/wheels").mkdir()
    wheel = folder / "bundle/wheels/nothing-1.0-py3-none-any.whl"
    wheel.write_bytes(b"a wheel")
    manifest = json.loads((folder / "bundle/manifest.json").read_text(encoding="utf-8"))
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    manifest["wheels"] = {"python": python, "platform": [bundle.sysconfig.get_platform()]}
    manifest["files"][f"wheels/{wheel.name}"] = {"bytes": 7, "sha256": bundle.sha256(wheel)}
    bundle.write_json(folder / "bundle/manifest.json", manifest)
    return folder / "bundle"


@pytest.fixture
def clone(tmp_path):
    """A fresh clone as far as `load` is concerned: the script alone, and nothing installed."""
    (tmp_path / "clone").mkdir()
    shutil.copy(ROOT / "bundle.py", tmp_path / "clone/bundle.py")
    return tmp_path / "clone"


@pytest.fixture
def load(clone, tmp_path):
    """load(folder, *flags) -> (exit status, stdout, stderr) of the clone's script, without any installed package."""

    def run(folder, *flags):
        command = [sys.executable, "-I", "-S", clone / "bundle.py", "load", folder, *flags]
        env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": str(tmp_path / "hf/hub")}
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=env)
        return done.returncode, done.stdout, done.stderr

    return run


def test_load_puts_each_part_where_the_scripts_look(made, clone, load, tmp_path, corpus):
    code, out, err = load(made)
    assert code == 0, err
    assert (clone / "wheels/nothing-1.0-py3-none-any.whl").read_bytes() == b"a wheel"
    assert bundle.sha256(clone / "data/cache/gpt2/vocab.bpe").startswith("1ce1664773c5")  # the published file
    assert (clone / "data/cache/models/tiny/config.json").exists()
    from data.shards import read_meta, verify

    assert verify(clone / "data/corpora/words") == read_meta(corpus)
    assert f"{(clone / 'data/corpora/words').as_posix()}\n" in out
    again = load(made)[1]
    assert "0 files put in place" in again


def test_the_hub_is_not_asked_for_what_was_loaded(made, load, tmp_path):
    """In a process that is offline, HellaSwag and a base model come under their names on the hub."""
    assert load(made)[0] == 0
    code = (
        "from gpt2.hellaswag import load_items\n"
        "from huggingface_hub import hf_hub_download\n"
        "items = load_items()\n"
        "print(len(items), items[5]['ctx'], items[5]['label'])\n"
        "print(open(hf_hub_download('someone/tiny', 'config.json')).read())\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stdout == '6 The cat number 5 sat 1\n{"model_type": "gpt2"}\n', done.stderr


def test_a_damaged_bundle_places_nothing(made, clone, load, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    shard = next((copy / "corpora/words").glob("*_train_*.bin"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    code, _, err = load(copy)
    assert code == 2 and f"{shard.name} is damaged or not whole" in err and err.count("\n") == 1
    shard.unlink()
    assert f"{shard.name} is missing" in load(copy)[2]
    (copy / "manifest.json").unlink()
    assert "not a whole bundle" in load(copy)[2]
    assert [p.name for p in clone.iterdir()] == ["bundle.py"]


def test_a_file_that_is_another_one_is_kept_unless_told_otherwise(made, clone, load):
    (clone / "data/cache/gpt2").mkdir(parents=True)
    (clone / "data/cache/gpt2/vocab.bpe").write_text("mine", encoding="utf-8")
    code, _, err = load(made)
    assert code == 2 and "is there and is another file; --overwrite replaces it" in err
    assert not (clone / "wheels").exists() and (clone / "data/cache/gpt2/vocab.bpe").read_text() == "mine"
    assert load(made, "--overwrite")[0] == 0
    assert bundle.sha256(clone / "data/cache/gpt2/vocab.bpe").startswith("1ce1664773c5")


def test_wheels_for_another_python_or_machine_are_refused(made, load, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    for wheels, says in [
        ({"python": "3.99", "platform": ["any"]}, "its wheels are for Python 3.99"),
        ({**manifest["wheels"], "platform": ["macosx_14_0_arm64x"]}, "its wheels are for macosx_14_0_arm64x"),
    ]:
        bundle.write_json(copy / "manifest.json", {**manifest, "wheels": wheels})
        code, _, err = load(copy)
        assert code == 2 and says in err
        assert load(copy, "--no-wheels", "--overwrite")[0] == 0


def test_a_manifest_that_points_elsewhere_is_refused(made, load, tmp_path):
    copy = shutil.copytree(made, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text(encoding="utf-8"))
    for name in ("cache/../../../outside", "/etc/outside", "home/outside"):
        files = {**manifest["files"], name: {"bytes": 1, "sha256": ""}}
        bundle.write_json(copy / "manifest.json", {**manifest, "files": files})
        assert "has no place here" in load(copy)[2]


def test_platforms():
    assert bundle.machine("manylinux_2_28_x86_64") == bundle.machine("linux-x86_64") == ("linux", "x86_64")
    assert bundle.machine("macosx-11.0-arm64") == bundle.machine("macosx_14_0_arm64") != bundle.machine("win-amd64")


def test_chosen_shards(corpus, tmp_path):
    from data.shards import read_meta

    bundle.gather_corpus(corpus, tmp_path / "one", 1)
    splits = [shard["split"] for shard in read_meta(tmp_path / "one")["shards"]]
    assert sorted(splits) == ["train", "val"]


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--preset", "gpt5"), "no preset gpt5; choose from"),
        (("--preset", "gpt2-124M"), "which is not there: make it first with data/prepare.py"),
        (("--corpus", "no/such"), "no/such does not exist"),
        (("--hellaswag", "no.jsonl"), "no.jsonl does not exist"),
        (("--base", "nobody/nothing"), "nobody/nothing cannot be had from the hub"),
    ],
)
def test_mistakes_of_make(in_process, tmp_path, flags, says):
    code, _, err = in_process(bundle.main, "make", tmp_path / "out", "--no-wheels", *flags)
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "out/manifest.json").exists()


def test_pip_gets_the_wheels(in_process, tmp_path):
    """One pin, from whichever index or folder pip is set up with; skipped where it reaches none."""
    code, _, err = in_process(bundle.main, "make", tmp_path / "out", "--only", "filelock")
    if code:
        pytest.skip(f"pip reaches no index here: {err.splitlines()[-1]}")
    names = [path.name for path in (tmp_path / "out/wheels").iterdir()]
    assert any(name.startswith("filelock-") for name in names) and any(n.startswith("setuptools-") for n in names)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text(encoding="utf-8"))
    assert manifest["wheels"]["platform"] == [bundle.sysconfig.get_platform()]
    assert {f"wheels/{name}" for name in names} < set(manifest["files"])
