"""tiktoken's own tests, from its source distribution, run on our Tokenizer with the published vocabularies.

Needs requirements-vocabularies.txt, whose llama-index-core ships cl100k and o200k, and a package index.
"""

import shutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest

from bench.bench_vocabularies import published

NOT_OURS = {  # what of it tests tiktoken's module and its Rust class, not a tokenizer
    "test_encode_bytes": "the private _encode_bytes: here a document is str",
    "test_hyp_encode_bytes": "the same",
    "test_pickle": "constructs tiktoken.Encoding",
    "test_encoding_for_model": "names of OpenAI's models",
    "test_optional_blobfile_dependency": "which modules tiktoken imports",
}
ADAPTER = '''
import sys
import types

from bpe import Tokenizer

NAMES = ["gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base"]


class Encoding:
    """A Tokenizer under the names of tiktoken.Encoding's methods."""

    def __init__(self, tok):
        self.tok = tok
        self._special_tokens = tok.special_tokens
        self._mergeable_ranks = {data: token for token, data in tok.vocab.items()}
        self.max_token_value = tok.n_vocab - 1
        self.decode_single_token_bytes = tok.vocab.__getitem__

    def __getattr__(self, name):
        return getattr(self.tok, name)

    def encode_single_token(self, token):
        return self._mergeable_ranks[token if isinstance(token, bytes) else token.encode()]

    def encode_ordinary_batch(self, texts):
        return self.tok.encode_batch(texts, disallowed_special=())

    def decode_batch(self, batch):
        return [self.tok.decode(ids) for ids in batch]


made = {name: Encoding(Tokenizer.from_tiktoken(name)) for name in NAMES}  # before tiktoken's name is taken
module = types.ModuleType("tiktoken")
module.get_encoding, module.list_encoding_names, module.Encoding = made.__getitem__, lambda: NAMES, Encoding
sys.modules["tiktoken"] = module
'''


@pytest.mark.slow
def test_tiktokens_own_tests_pass(tmp_path, monkeypatch):
    if not find_spec("llama_index"):
        pytest.skip("pip install --no-deps -r requirements-vocabularies.txt")
    source = f"tiktoken=={version('tiktoken')}"
    pip = [sys.executable, "-m", "pip", "download", source, "--no-deps", "--no-binary", "tiktoken", "-d", tmp_path]
    if subprocess.run(pip, capture_output=True).returncode:
        pytest.skip(f"the source distribution of {source} cannot be had here")
    shutil.unpack_archive(next(tmp_path.glob("tiktoken-*.tar.gz")), tmp_path)
    tests = next(tmp_path.glob("tiktoken-*/tests")).rename(tmp_path / "suite")  # away from its own package
    (tests / "conftest.py").write_text(ADAPTER, encoding="utf-8")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    next(published(tmp_path))  # puts the vocabularies there
    command = [sys.executable, "-m", "pytest", "-q", tests, "-k", " and ".join(f"not {name}" for name in NOT_OURS)]
    done = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "25 passed, 8 deselected" in done.stdout, done.stdout[-300:]
