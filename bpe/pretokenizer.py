"""Cut text into the chunks that merges never cross.

A pattern is `"none"` (the whole text is one chunk), `"gpt2"`, `"gpt4"`, or a regular expression in the syntax of the
`regex` module. The two named ones are those that OpenAI published with GPT-2 and with cl100k_base.
"""

import re
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import cache
from itertools import chain

import regex

from common import UsageError, valid

GPT2_SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT4_SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
PATTERNS = {"gpt2": GPT2_SPLIT_PATTERN, "gpt4": GPT4_SPLIT_PATTERN}

# What tiktoken uses for cl100k_base today: it keeps trailing whitespace together, newlines or not.
CL100K_SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_WELL_KNOWN = {GPT2_SPLIT_PATTERN, GPT4_SPLIT_PATTERN, CL100K_SPLIT_PATTERN}

# Where a text may be cut: no chunk of these patterns reaches from a visible character to a space, and none looks back.
_CUT = re.compile(r"\S(?= )")
BLOCK = 1 << 13  # characters that are split at a time; so few that the chunks stay in the CPU's cache
PIECE = 128  # the same where not all is ASCII: one "’" should not slow the rest of its block down


def check_pattern(pattern):
    """UsageError for a pattern that is meant as a name ("GPT4", "cl100k_base"): as a regex it would match that word."""
    if pattern not in ("none", *PATTERNS) and re.fullmatch(r"[A-Za-z][\w-]+", pattern):
        raise UsageError(f"there is no pattern named {pattern}; use none, gpt2, gpt4 or a regular expression")


class Splitter:
    """text -> list of chunks, whose concatenation is the text."""

    def __init__(self, pattern="none"):
        self.pattern, self.regex = pattern, lossless_pattern(pattern)
        self._ascii = re.compile(ascii_twin(self.regex)) if self.regex in _WELL_KNOWN else None
        compiled = _compile(self.regex)
        self._findall = compiled.findall
        if compiled.groups:  # then findall would return the groups instead of the whole match
            self._findall = lambda text: [m.group() for m in compiled.finditer(text)]

    def __reduce__(self):  # compiled again in another process
        return Splitter, (self.pattern,)

    def __call__(self, text):
        """Text -> list of chunks, in order; joined they are the text."""
        return list(chain.from_iterable(map(self.split_block, self.blocks(text))))

    def split_block(self, block):
        """One of `blocks` -> its chunks: by the standard `re` where the block is ASCII, else by `regex`."""
        if self.pattern == "none":
            return [block] if block else []
        if self._ascii is not None:
            if block.isascii():
                return self._ascii.findall(block)
            chunks = []
            for piece in self.blocks(block, PIECE):
                chunks += (self._ascii.findall if piece.isascii() else self._findall)(piece)
            return chunks
        chunks = self._findall(block)
        if sum(map(len, chunks)) != len(block):
            raise UsageError(f"the pattern {self.pattern!r} matches empty text and thereby loses characters")
        return chunks

    def blocks(self, text, size=BLOCK):
        """Cut a long text where no chunk is cut; one block if the pattern is not known to allow it."""
        if self._ascii is None:
            return [text]
        blocks, start = [], 0
        while len(text) - start > size:
            cut = _CUT.search(text, start + size)
            if cut is None:
                break
            blocks.append(text[start : cut.end()])
            start = cut.end()
        blocks.append(text[start:])
        return blocks

    def count(self, texts):
        """Count the chunks of an iterable of texts -> Counter in order of first appearance."""
        counter = Counter()
        for block in chain.from_iterable(map(self.blocks, texts)):
            counter.update(self.split_block(block))
        return counter


@cache
def _compile(pattern):
    try:
        return regex.compile(pattern)
    except regex.error as e:
        raise UsageError(f"{pattern!r} is neither a pattern's name nor a valid regular expression: {e}") from None


def lossless_pattern(pattern):
    """Its regular expression, with an alternative for what it does not match, so that no character is lost."""
    if pattern == "none":
        return r"[\s\S]+"
    source = PATTERNS.get(pattern, pattern)
    if source in _WELL_KNOWN:
        return source
    _compile(source)
    return rf"{source}|(?:(?!{source})[\s\S])+"


def ascii_twin(source):
    """Rewrite a well-known pattern for the standard `re` on ASCII text, where it is three times faster than `regex`.

    Whitespace is spelled out, because `re` counts \\x1c-\\x1f to it, `regex` and Rust do not.
    """
    space = r" \t\n\x0b\x0c\r"
    for theirs, ours in (
        (r"[^\s\p{L}\p{N}]", f"[^{space}A-Za-z0-9]"), (r"[^\r\n\p{L}\p{N}]", r"[^\r\nA-Za-z0-9]"),
        (r"\p{L}", "[A-Za-z]"), (r"\p{N}", "[0-9]"), (r"\s", f"[{space}]"), (r"\S", f"[^{space}]"), ("$", r"\Z"),
    ):  # fmt: skip
        source = source.replace(theirs, ours)
    return source


def count_chunks(splitter, documents, num_workers, advance):
    """Iterable of str -> {chunk in UTF-8: how often}, in order of first appearance.

    num_workers: processes that split the text. advance: called with the number of characters handed out.
    """
    total, running = Counter(), deque()
    with ProcessPoolExecutor(num_workers) if num_workers > 1 else nullcontext() as pool:
        for group in _groups(splitter, documents, advance):
            if pool is None:
                total.update(splitter.count(group))
            else:
                running.append(pool.submit(splitter.count, group))
            if len(running) > 2 * num_workers:  # so few at a time that memory is bounded for any iterable
                total.update(running.popleft().result())
        for counter in running:
            total.update(counter.result())
    return {chunk.encode("utf-8"): n for chunk, n in total.items()}


def _groups(splitter, documents, advance, size=1 << 20):
    """Documents -> lists of blocks of about `size` characters together."""
    group, waiting = [], 0
    for document in documents:
        for block in splitter.blocks(valid(document), size):
            group.append(block)
            waiting += len(block)
            advance(len(block))
            if waiting >= size:
                yield group
                group, waiting = [], 0
    yield group
