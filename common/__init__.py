"""What all stations share: usage errors (usage.py), files (files.py), devices (devices.py).

checkpoints.py, for those who train, is imported by its own name.
"""
# ruff: noqa: F401

from common.devices import (
    available_cores,
    free_memory,
    half_type,
    has_hidden_gpu,
    keep_freed_memory,
    peak_flops,
    peak_memory_mb,
    pick_device,
    synchronize,
)
from common.files import (
    ROOT,
    atomic_folder,
    atomic_open,
    file_sha256,
    is_held_out,
    is_locked,
    locked,
    open_text,
    plain,
    portable,
    read_documents,
    read_json,
    read_jsonl,
    read_parquet,
    read_texts,
    valid,
    write_json,
)
from common.usage import LIMIT, UsageError, cli, from_hub, parse_shard, validate
