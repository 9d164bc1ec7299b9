"""Byte-level BPE: from text to merges, from text to ids and back."""
