"""Byte-level BPE: from text to merges, from text to ids and back."""

from bpe.reference import compute_bigram_statistics, render_token, replace_bigram, replace_control_character
from bpe.tokenizer import Tokenizer

__all__ = ["Tokenizer", "compute_bigram_statistics", "render_token", "replace_bigram", "replace_control_character"]
