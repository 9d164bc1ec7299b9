"""Cut text into the chunks that merges never cross.

A pattern is `"none"` (the whole text is one chunk), `"gpt2"`, `"gpt4"`, or a regular expression in the syntax of the
`regex` module. The two named ones are those that OpenAI published with GPT-2 and with cl100k_base.
"""

import re
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import regex

from common import UsageError

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

# In these patterns no chunk reaches from a visible character to a space, and nothing looks back:
# there a text may be cut.
_CUT = re.compile(r"\S(?= )")
# Non-ASCII characters, and ASCII in between if it is short.
_ISLAND = re.compile(r"[^\x00-\x7f](?:[\x00-\x7f]{0,63}+[^\x00-\x7f])*+")
BLOCK = 1 << 13  # characters that are split at a time; so few that the chunks stay in the CPU's cache


def check_pattern(pattern):
    """UsageError for a pattern that is meant as a name ("GPT4", "cl100k_base"): as a regex it would match that word."""
    if pattern not in ("none", *PATTERNS) and re.fullmatch(r"[A-Za-z][\w-]+", pattern):
        raise UsageError(f"there is no pattern named {pattern}; use none, gpt2, gpt4 or a regular expression")


class Splitter:
    """text -> list of chunks, whose concatenation is the text."""

    def __init__(self, pattern="none"):
        self.pattern, self._ascii = pattern, None
        if pattern == "none":
            return
        source = PATTERNS.get(pattern, pattern)
        self.regex = lossless_pattern(source)
        if source in _WELL_KNOWN:
            self._ascii = re.compile(ascii_twin(source))
        compiled = _compile(self.regex)
        self._findall = compiled.findall
        if compiled.groups:  # then findall would return the groups instead of the whole match
            self._findall = lambda text: [m.group() for m in compiled.finditer(text)]

    def __reduce__(self):  # compiled again in another process
        return Splitter, (self.pattern,)

    def __call__(self, text):
        """Text -> list of chunks, in order; joined they are the text."""
        chunks = []
        for block in self.blocks(text):
            chunks += self.split_block(block)
        return chunks

    def split_block(self, block):
        """One of `blocks` -> its chunks: by the standard `re` where the block is ASCII, else by `regex`."""
        if self.pattern == "none":
            return [block] if block else []
        if self._ascii is not None:
            if block.isascii():
                return self._ascii.findall(block)
            chunks = []
            for piece in _pieces(block):
                chunks += (self._ascii.findall if piece.isascii() else self._findall)(piece)
            return chunks
        chunks = self._findall(block)
        if sum(map(len, chunks)) != len(block):
            raise UsageError(f"the pattern {self.pattern!r} matches empty text and thereby loses characters")
        return chunks

    def blocks(self, text, size=BLOCK):
        """Cut a long text where no chunk is cut; one block if the pattern is not known to allow it."""
        if self.pattern == "none" or self._ascii is None:
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
        for text in texts:
            for block in self.blocks(text):
                counter.update(self.split_block(block))
        return counter


def _pieces(text):
    """Cut a text at safe places into pieces, most of them ASCII, so that one "’" does not slow the rest down."""
    start = 0
    for island in _ISLAND.finditer(text):
        if island.end() <= start:
            continue
        cut = text.rfind(" ", start, island.start())
        while cut > start and text[cut - 1].isspace():
            cut = text.rfind(" ", start, cut)
        if cut > start:
            yield text[start:cut]
            start = cut
        end = _CUT.search(text, island.end() - 1)
        end = end.end() if end else len(text)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


@cache
def _compile(pattern):
    try:
        return regex.compile(pattern)
    except regex.error as e:
        raise UsageError(f"pattern {pattern!r} is neither none, gpt2, gpt4 nor a valid regular expression: {e}") from None


def lossless_pattern(source):
    """Extend a pattern by an alternative for what it passes over, so that no character is lost.

    "none" becomes a pattern that takes everything.
    """
    if source == "none":
        return r"[\s\S]+"
    if source in _WELL_KNOWN:
        return source
    _compile(source)
    return rf"{source}|(?:(?!{source})[\s\S])+"


def ascii_twin(source):
    """Rewrite a pattern for the standard `re` on ASCII text, where it is three times faster than `regex`.

    Whitespace is spelled out, because `re` counts \\x1c-\\x1f to it, `regex` and Rust do not.
    """
    sets = {r"\p{L}": "A-Za-z", r"\p{N}": "0-9", r"\s": r" \t\n\x0b\x0c\r"}
    twin, in_set = "", False
    for part in re.findall(r"\\p\{.\}|\\.|[\s\S]", source):
        in_set = part == "[" or (in_set and part != "]")
        if part in sets:
            part = sets[part] if in_set else f"[{sets[part]}]"
        elif part == r"\S":
            part = f"[^{sets[chr(92) + 's']}]"
        elif part == "$":
            part = r"\Z"
        twin += part
    return twin


def utf8(text):
    """str -> UTF-8. Lone surrogates, which UTF-8 cannot hold, become U+FFFD, as in tiktoken."""
    return valid(text).encode("utf-8")


def valid(text):
    """The text with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


# ----------------------------------------------------------------------------------------------------------------------
# counting chunks, over several processes


def count_chunks(splitter, documents, num_workers, advance):
    """Iterable of str -> {chunk in UTF-8: how often}, in order of first appearance.

    num_workers: processes that split the text. advance: called with the number of characters handed out.
    """
    groups, total = _groups(splitter, documents, advance), Counter()
    if num_workers <= 1:
        for group in groups:
            total.update(splitter.count(group))
    else:
        with ProcessPoolExecutor(num_workers) as pool:
            for counter in _in_order(pool, splitter.count, groups, ahead=2 * num_workers):
                total.update(counter)
    return {utf8(chunk): n for chunk, n in total.items()}


def _groups(splitter, documents, advance, size=1 << 20):
    """Documents -> lists of blocks of about `size` characters together."""
    group, waiting = [], 0
    for document in documents:
        if not isinstance(document, str):
            raise UsageError(f"the text to train on is a str or an iterable of str, not of {type(document).__name__}")
        for block in splitter.blocks(valid(document), size):
            group.append(block)
            waiting += len(block)
            advance(len(block))
            if waiting >= size:
                yield group
                group, waiting = [], 0
    yield group


def _in_order(pool, function, items, ahead):
    """`pool.map` that reads only `ahead` items ahead, so that memory is bounded for any iterable."""
    running = deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()
