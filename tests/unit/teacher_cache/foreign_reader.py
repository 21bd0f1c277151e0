"""Another program's reader, written from docs/teacher-cache.md with pyarrow and numpy alone: nothing of the package."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa


def description(folder: Path) -> dict[str, Any]:
    """`cache.json`."""
    return json.loads((folder / "cache.json").read_text(encoding="utf-8"))


def verify_files(folder: Path) -> None:
    """Sizes and SHA-256 of all parts."""
    for table in description(folder)["tables"].values():
        for part in table["parts"]:
            data = (folder / part["name"]).read_bytes()
            assert len(data) == part["bytes"] and hashlib.sha256(data).hexdigest() == part["sha256"]


def find(folder: Path, table: str, sample_id: str) -> tuple[str, int]:
    """File and row of a sample, by the table's index."""
    batch = pa.ipc.open_file(pa.memory_map(str(folder / table / "index.arrow"))).get_batch(0)
    salt = int(batch.schema.metadata[b"salt"]).to_bytes(8, "little")
    digest = hashlib.blake2b(sample_id.encode("utf-8"), digest_size=8, salt=salt).digest()
    key = np.uint64(int.from_bytes(digest, "little"))
    hashes, parts, rows = (batch.column(name).to_numpy() for name in ("hash", "part", "row"))
    place = int(np.searchsorted(hashes, key))
    assert hashes[place] == key, "no such sample"
    return description(folder)["tables"][table]["parts"][int(parts[place])]["name"], int(rows[place])


def row_of(folder: Path, table: str, sample_id: str) -> dict[str, Any]:
    """Keys and payload of a sample's row; the payload as numpy arrays, `[R]` or `[R, width]`, checked."""
    name, number = find(folder, table, sample_id)
    batch = pa.ipc.open_file(pa.memory_map(str(folder / name))).get_batch(0)
    about = json.loads(batch.schema.metadata[b"megatron_erpd.cache.part"])
    assert about["format_version"] == description(folder)["format_version"] and about["table"] == table
    row: dict[str, Any] = {key: batch.column(key)[number].as_py() for key in batch.schema.names[:4]}
    assert row["sample_id"] == sample_id
    crc, size = 0, row["num_tokens"]
    for column in batch.schema.names[4:]:
        values = batch.column(column)[number].values.to_numpy(zero_copy_only=True)
        crc = zlib.crc32(values.tobytes(), crc)
        row[column] = values if len(values) == size else values.reshape(size, -1)
    assert crc == row["payload_crc"], "damaged"
    return row


def target(folder: Path, sample_id: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vocabulary ids `[R, K]`, their log-probs `[R, K]` and the log of the rest's mass `[R]`."""
    about, row = description(folder), row_of(folder, "topk", sample_id)
    k, size = about["k"], row["num_tokens"]
    ids = row["topk_ids_low"].reshape(size, k).astype(np.int64)
    if about["vocab_size"] > 2**16:
        high = row["topk_ids_high"].reshape(size, -1).astype(np.int64)
        base, digits = -(-about["vocab_size"] // 2**16), 1
        while base ** (digits + 1) <= 256:
            digits += 1
        entry = np.arange(k)
        ids |= high[:, entry // digits] // base ** (entry % digits) % base << 16
    scores = row["topk_scores"].reshape(size, k).astype(np.float32)
    return ids, scores - row["log_normalizer"][:, None], row["tail_log_prob"]


def hidden(folder: Path, policy: str, sample_id: str) -> np.ndarray:
    """Final hidden states as float32, `[R, h]`."""
    about, row = description(folder), row_of(folder, f"hidden.{policy}", sample_id)
    values = row["hidden"].reshape(row["num_tokens"], about["hidden_size"])
    if about["hidden_dtype"] == "bfloat16":  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def token_crc(prompt: np.ndarray, response: np.ndarray) -> int:
    """What a rollout's `crc` must be."""
    return zlib.crc32(np.concatenate([prompt, response]).astype("<i4").tobytes())
