"""Split text into the chunks that merges never cross.

A pattern is `"none"` (the whole text is one chunk), `"gpt2"`, `"gpt4"`, or a regular expression in the syntax of the
`regex` module. The two named ones are those that OpenAI published with GPT-2 and with cl100k_base.

The well-known patterns are split without a regular expression, some twenty times as fast: each character has a kind
(letter, number, whitespace, …), a chunk starts where the kind changes, and the exceptions are numpy masks over the
whole text. `chunk_starts` handles the cases of a pattern in the order of the rows:

    row                   gpt2         gpt4, cl100k    Llama 3      Qwen         o200k
    whitespace            all: the last one of a run is left to what follows it
    newlines in it        -            all but gpt2: those right after punctuation join that; a run with others is cut
                                       after its last one
    at the end of text    one chunk    cl100k: one chunk, newlines or not; others: as everywhere
    space before          any run      punctuation     punctuation  punctuation  punctuation
    contractions ('ll)    lower case   any case        any case     any case     any case, joined to the word before
    before letters        -            one character that is no newline, letter or number joins them
    numbers               whole runs   by three        by three     one by one   by three
    case                  -            -               -            -            cut before capitals

The kinds of characters are those of Unicode 16.0, as in the regular expressions of tiktoken 0.14, so that the same
vocabulary gives the same ids there; `regex`, which splits by all other patterns, may use a later version.
"""

import re
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex

from bpe.chunk_table import PADDING, ChunkTable
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
LLAMA3_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT_PATTERN = LLAMA3_SPLIT_PATTERN.replace("{1,3}", "")
O200K_SPLIT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Rules(NamedTuple):
    """The differences between the well-known patterns; see the table above."""

    letters_join: bool = True  # and newlines join punctuation
    trailing: bool = False  # whitespace at the end of the text is one chunk, newlines or not
    digits: int = 3  # of a chunk at most; 0: any number
    case: bool = False


RULES = {
    GPT2_SPLIT_PATTERN: Rules(letters_join=False, digits=0),
    GPT4_SPLIT_PATTERN: Rules(),
    CL100K_SPLIT_PATTERN: Rules(trailing=True),
    LLAMA3_SPLIT_PATTERN: Rules(),
    QWEN_SPLIT_PATTERN: Rules(digits=1),
    O200K_SPLIT_PATTERN: Rules(case=True),
}

# Kinds of characters, in groups of four: kind >> 2 is the group. END stands after each text.
NEWLINE, BLANK, SPACE, OTHER, APOSTROPHE, SLASH, MARK, NUMBER, LOWER, CASELESS, UPPER, END = (
    0, 1, 2, 4, 5, 6, 7, 8, 12, 13, 14, 16,
)  # fmt: skip
WHITE, PUNCTUATION, NUMBERS, LETTERS = 0, 1, 2, 3  # the groups, without END's
END_CHARACTER = "\ud800"  # a surrogate is in no valid text; in ASCII text and UTF-8 the byte 0xFF takes its place

PADDED_END = b"\xff" + bytes(PADDING)
BLOCK = 1 << 18  # characters that are split at a time; few enough that the arrays stay in the CPU's cache
TASK = 1 << 22  # characters that a worker process is given at a time
# Characters of the most common scripts that all versions of Unicode classify alike, so that `regex` may split them.
STABLE = re.compile(
    r"[\0-\u024f\u0400-\u0481\u2010-\u2027\u3000-\u3003\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uff01-\uff5e]*"
)
# Where a text may be cut: no chunk of these patterns extends from a visible character to a space, and none looks back.
_CUT = re.compile(r"\S(?= )")


def check_pattern(pattern):
    """UsageError for a pattern that looks like a name ("GPT4", "cl100k_base"): as a regex it would match that word."""
    if not isinstance(pattern, str):
        raise UsageError(f"a pattern is a str, not {pattern!r}")
    if pattern in ("none", *PATTERNS):
        return
    if re.fullmatch(r"[A-Za-z][\w-]+", pattern):
        raise UsageError(f"there is no pattern named {pattern}; use none, gpt2, gpt4 or a regular expression")
    # `lossless_pattern` repeats it, which a comment of (?x) would swallow, and where groups have other numbers
    if _compile(pattern).flags & regex.VERBOSE or re.search(r"\\[1-9]", pattern):
        raise UsageError(f"write the pattern {pattern!r} without (?x) and without backreferences")


class Splitter:
    """Texts -> chunks; the chunks of a text, joined, are the text."""

    def __init__(self, pattern="none"):
        self.pattern, self.regex = pattern, lossless_pattern(pattern)
        self._rules = RULES.get(self.regex)
        self._compiled = _compile(self.regex)

    def __call__(self, text):
        """Text -> list of chunks, in order."""
        data, starts = self.split([text])
        return [data[i:j].tobytes().decode("utf-8") for i, j in pairwise(starts.tolist())]

    def split(self, texts):
        """List of str -> (data, starts): the texts in UTF-8, each followed by a byte 0xFF, and where chunks start.

        That byte is a chunk of its own. PADDING zeros, which belong to no chunk, follow the last one.
        """
        data = np.frombuffer(b"\xff".join([text.encode("utf-8") for text in texts]) + PADDED_END, np.uint8)
        if self._rules is None:
            lengths = [len(chunk.encode("utf-8")) for text in texts for chunk in (*self.findall(text), "\0")]
            return data, np.cumsum([0, *lengths[:-1]])
        used = data[: len(data) - PADDING]
        if all(map(str.isascii, texts)):
            code, kind = used, np.frombuffer(used.tobytes().translate(_kinds_of_bytes()), np.uint8)
        else:
            code = np.frombuffer(END_CHARACTER.join([*texts, ""]).encode("utf-32-le", "surrogatepass"), np.uint32)
            kind = kinds().take(code)
        start, odd = chunk_starts(code, kind, self._rules)
        if len(odd):
            self._split_again(END_CHARACTER.join([*texts, ""]), kind, start, odd)
        starts = np.flatnonzero(start)
        return data, starts if code is used else np.flatnonzero((used & 0xC0) != 0x80)[starts]

    def findall(self, text):
        """One text -> list of its chunks, by the regular expression alone."""
        if self._compiled.groups:  # findall would return the groups instead of the whole match
            chunks = [m.group() for m in self._compiled.finditer(text)]
        else:
            chunks = self._compiled.findall(text)
        if sum(map(len, chunks)) != len(text):
            raise UsageError(f"the pattern {self.pattern!r} matches empty text and thereby loses characters")
        return chunks

    def _split_again(self, text, kind, start, odd):
        """Split around each odd position, from one cut of the text to the next, by the regular expression."""
        cut = (kind[1:] == SPACE) & (kind[:-1] >= OTHER) | (kind[1:] == END) | (kind[:-1] == END)
        cuts, done = np.flatnonzero(cut) + 1, 0
        for i in odd.tolist():
            if i >= done:
                at = int(cuts.searchsorted(i, side="right"))
                begin, done = int(cuts[at - 1]) if at else 0, int(cuts[at])
                start[begin:done] = False
                start[[m.start() for m in self._compiled.finditer(text, begin, done)]] = True

    def blocks(self, texts, limit):
        """Texts -> lists of (number of the text, piece of it) of about `limit` characters; no chunk is cut."""
        block, size = [], 0
        for number, text in enumerate(texts):
            start = 0
            while start < len(text) or not text:
                cut = self._rules and _CUT.search(text, start + limit - size)
                end = cut.end() if cut else len(text)
                block.append((number, text[start:end]))
                size += end - start
                if size >= limit:
                    yield block
                    block, size = [], 0
                if end == len(text):
                    break
                start = end
        if block:
            yield block

    def count(self, texts):
        """Iterable of str -> {chunk in UTF-8: how often it occurs}, in order of first appearance."""
        table, chunks, counts = ChunkTable(), [], np.zeros(0, np.int64)

        def number(starts, lengths):
            chunks.extend(data[i : i + n].tobytes() for i, n in zip(starts.tolist(), lengths.tolist()))
            return np.arange(len(chunks) - len(starts), len(chunks))

        for block in self.blocks(texts, BLOCK):
            data, starts = self.split([piece for _, piece in block])
            numbers = table.values(data, starts, number)
            counts = np.append(counts, np.zeros(len(chunks) - len(counts), np.int64))
            counts += np.bincount(numbers, minlength=len(chunks))
        found = dict(zip(chunks, counts.tolist()))
        found.pop(b"\xff", None)
        return found


class SplitterSequence(Splitter):
    """Splitters applied one after the other, each to the chunks of the one before."""

    def __init__(self, patterns):
        self.pattern, self._rules, self._splitters = patterns, None, list(map(Splitter, patterns))

    def findall(self, text):
        chunks = [text] if text else []
        for splitter in self._splitters:
            data, starts = splitter.split(chunks)
            parts = (data[i:j].tobytes() for i, j in pairwise(starts.tolist()))
            chunks = [part.decode("utf-8") for part in parts if part != b"\xff"]
        return chunks


def chunk_starts(code, kind, rules):
    """Where chunks start in texts that end with END: code points and kinds, (n,) each -> (mask (n,), odd positions).

    Around the odd positions, which are rare, the mask may be wrong: they depend on more than their neighbours.
    """
    group = kind >> 2
    odd = np.zeros(0, np.int64)
    if rules.case:
        kind = kind.copy()
        odd_mark = (kind[1:] == MARK) & (group[:-1] != LETTERS) & (kind[:-1] != MARK)
        odd = np.flatnonzero(odd_mark | (kind[1:] == SLASH) & (kind[:-1] == NEWLINE)) + 1
        group[kind == MARK] = LETTERS  # marks are part of words; one that does not follow a letter is odd
    start = np.ones(len(kind), bool)
    np.not_equal(group[1:], group[:-1], out=start[1:])  # \p{L}+, \p{N}+, [^\s\p{L}\p{N}]+, \s+
    start |= kind == END  # two of them around an empty text
    white = group == WHITE
    last = white[:-1] & ~white[1:]  # the last one of each run of whitespace
    if rules.letters_join:
        _newlines(kind, group, start, np.flatnonzero(last), rules)
    last &= kind[1:] != END
    start[:-1] |= last & (kind[:-1] != NEWLINE) if rules.letters_join else last  # \s+(?!\S)
    before = (kind[:-1] == SPACE) & last
    start[1:] &= ~(before & (group[1:] == PUNCTUATION) if rules.letters_join else before)  # " ?", before letters: below
    odd = np.append(odd, _contractions(code, kind, group, start, rules))
    if rules.letters_join:  # [^\r\n\p{L}\p{N}]?: kinds from BLANK to MARK; below BLANK, NEWLINE - 1 wraps around
        start[1:] &= ~(start[:-1] & (kind[:-1] - BLANK < NUMBER - BLANK) & (group[1:] == LETTERS))
    if rules.digits == 1:  # \p{N}
        start |= group == NUMBERS
    elif rules.digits:  # \p{N}{1,3}
        first, final = _runs(group == NUMBERS)
        first, length = first[final - first >= rules.digits], (final - first + 1)[final - first >= rules.digits]
        offset = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        start[(np.repeat(first, length) + offset)[offset % rules.digits == 0]] = True
    if rules.case:
        _capitals(kind, group, start)
    return start, np.sort(odd)


def _runs(mask):
    """The first and the last position of each run in a mask, the last entry of which is False."""
    return np.flatnonzero(mask & ~np.roll(mask, 1)), np.flatnonzero(mask & ~np.roll(mask, -1))


def _newlines(kind, group, start, white_ends, rules):
    r"""Mark the starts that [^\s\p{L}\p{N}]+[\r\n]* and \s*[\r\n]+ make and remove."""
    first, final = _runs(kind == NEWLINE)
    taken = group[first - 1] == PUNCTUATION
    start[first[taken]] = False
    run = white_ends.searchsorted(final)  # the number of the run of whitespace
    ends_it = np.append(run[1:] != run[:-1], True)[: len(run)]  # no other newline comes in that run
    if rules.trailing:  # \s++$
        ends_it &= kind[white_ends[run] + 1] != END
    start[final[taken | ends_it] + 1] = True


def _contractions(code, kind, group, start, rules):
    """'(?:[sdmt]|ll|ve|re) -> where one follows another in a pattern that joins them to the word before them."""
    at = np.flatnonzero((kind == APOSTROPHE) & (np.roll(group, 1) == LETTERS if rules.case else start))
    one, two = (code.take(at + k, mode="clip").astype(np.int64) for k in (1, 2))
    ignored = 0x20 if rules.letters_join else 0  # the bit between a capital and a small letter
    short = np.isin(one | ignored, [*map(ord, "sdmt")])
    if rules.letters_join:
        short |= one == ord("ſ")  # an s where case is ignored
    pairs = [ord(a) << 32 | ord(b) for a, b in ("ll", "ve", "re")]
    length = np.where(short, 2, np.where(np.isin((one | ignored) << 32 | two | ignored, pairs), 3, 0))
    at, length = at[length > 0], length[length > 0]
    start[at + 1] = False
    start[at + length] = True
    if rules.case:
        start[at] = False
        kind[at + length - 1] = LOWER  # no word begins at the second letter of 'lL
    return at[1:][at[1:] == (at + length)[:-1]] if rules.case else at[:0]


def _capitals(kind, group, start):
    r"""[\p{Lu}…]*[\p{Ll}…]+ and [\p{Lu}…]+[\p{Ll}…]*, where … stands for letters without case and marks.

    A run of capitals within a word starts a chunk after a lower-case letter, with or without caseless letters between
    them; and at the end of the word after caseless letters, which then match the [\p{Ll}…]+ of the first form.
    """
    capital = kind == UPPER
    first, final = _runs(capital)
    within = group[first - 1] == LETTERS
    first, final = first[within], final[within]
    cased = np.flatnonzero((kind != CASELESS) & (kind != MARK))
    before = cased[cased.searchsorted(first) - 1]
    after_small = (kind[before] == LOWER) & ~np.roll(start, -1)[before]
    at_end = (kind[first - 1] != LOWER) & (group[final + 1] != LETTERS)
    start[first[after_small | at_end]] = True


@cache
def kinds():
    """The kind of each code point, (0x110000,) uint8.

    unicode16.txt has a line `code point in hex, kind` wherever another kind begins; tests/test_pretokenizer.py
    compares it with tiktoken's regular expressions.
    """
    lines = [line.split() for line in Path(__file__).with_name("unicode16.txt").read_text("ascii").splitlines()]
    begins = np.array([int(code, 16) for code, _ in lines])
    table = np.repeat(np.array([int(kind) for _, kind in lines], np.uint8), np.diff(begins, append=0x110000))
    table[[*map(ord, "\n\r '/" + END_CHARACTER)]] = NEWLINE, NEWLINE, SPACE, APOSTROPHE, SLASH, END
    return table


@cache
def _kinds_of_bytes():
    """The same for ASCII and the byte 0xFF, as bytes.translate takes it."""
    return kinds()[:255].tobytes() + bytes([END])


@cache
def _compile(pattern):
    try:
        return regex.compile(pattern)
    except regex.error as e:
        raise UsageError(f"{pattern!r} is neither a pattern's name nor a valid regular expression: {e}") from None


def lossless_pattern(pattern):
    """The regular expression of a pattern, with an alternative for what it does not match: no character is lost."""
    if pattern == "none":
        return r"[\s\S]+"
    source = PATTERNS.get(pattern, pattern)
    if source in RULES:
        return source
    _compile(source)
    return rf"{source}|(?:(?!{source})[\s\S])+"


def count_chunks(splitter, documents, num_workers, advance):
    """Iterable of str -> {chunk in UTF-8: how often}, in order of first appearance.

    num_workers: processes that split the text. advance: called with the number of characters handed out.
    """
    total, running = Counter(), deque()
    with ProcessPoolExecutor(num_workers) if num_workers > 1 else nullcontext() as pool:
        for block in splitter.blocks(map(valid, documents), TASK):
            pieces = [piece for _, piece in block]
            advance(sum(map(len, pieces)))
            if pool is None:
                total.update(splitter.count(pieces))
            else:
                running.append(pool.submit(splitter.count, pieces))
            if len(running) > 2 * num_workers:  # few enough that memory is bounded for any iterable
                total.update(running.popleft().result())
        for counter in running:
            total.update(counter.result())
    return total
