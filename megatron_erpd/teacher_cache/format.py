"""What a teacher cache is on disk: what policies say about fixed rollouts, keyed by rollout. docs/teacher-cache.md is
the specification for other programs; this module is its implementation.

A cache is a folder of tables, one per kind of fact, each with one row per rollout, in no order:

    cache.json                              written last, by rename; a folder without it is unfinished and refused
    log_probs.POLICY/part-WWWWW-PPPPP.arrow     log-probs of the response tokens under a policy
    topk/part-WWWWW-PPPPP.arrow                 the target distribution q: top-k entries and one tail mass per token
    hidden.POLICY/part-WWWWW-PPPPP.arrow        a policy's final hidden states
    TABLE/index.arrow                           where a table has which rollout

Nothing in a row depends on how it was computed or will be read, so a cache serves any parallel layout, batch size,
order and packing. Every table carries what its own rows depend on and no more (`CacheMeta.of_table`).
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_erpd.errors import CacheError
from megatron_erpd.teacher_cache.packing import MAX_VOCAB_SIZE, high_bytes

FORMAT_VERSION = 3
CACHE_FILE = "cache.json"
INDEX_FILE = "index.arrow"
PART_KEY = b"megatron_erpd.cache.part"
"""Schema metadata of a part: JSON with `format_version`, `table`, `meta` and `facts`."""
TOKEN = "token"
TOPK = "topk"
KINDS = (TOKEN, TOPK)
LOG_PROB_TYPES: dict[str, pa.DataType] = {"float32": pa.float32(), "float16": pa.float16()}
HIDDEN_TYPES: dict[str, pa.DataType] = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "bfloat16": pa.uint16(),  # Arrow has no bfloat16: its bits
}
REMEDY = "put back a copy of the file, or delete the cache's folder and precompute again"
"""For a damaged file of a finished cache."""
KEYS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("crc", pa.uint32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("payload_crc", pa.uint32(), nullable=False),
    ]
)
"""The columns that every table begins with."""


@dataclass(frozen=True)
class Column:
    """A payload column: rows `[R]`, or `[R, width]`."""

    type: pa.DataType
    width: int | None = None

    @property
    def size(self) -> int:
        """Elements per response token."""
        return 1 if self.width is None else self.width

    @property
    def bytes_per_token(self) -> int:
        return self.size * self.type.bit_width // 8


@dataclass(frozen=True)
class CacheMeta:
    """What a cache was made from; a row is only as good as these.

    Attributes:
        kind: 'token' (log-probs of the response tokens, per policy) or 'topk' (these and the projected target q).
        policies: names of the policies that were scored, such as 'base', 'teacher', 'unlearned'.
        fingerprints: policy name -> digest of the checkpoint it was read from; exactly the `policies`.
        vocab_size: true (unpadded) vocabulary size.
        temperature: of all log-probs.
        precision: of the forward passes, 'fp32' or 'bf16'.
        tokenizer_digest: of the rollouts' tokenizer, where known.
        chat_template_digest: of the base policy's chat template, where it has one.
        signal: for 'topk', the signal's expression, such as 'strong' or '0.7*teacher/base + 0.3*base/unlearned'; for
            'token' only where it was chosen when the cache was made.
        signal_requested: 'auto' where the signal was chosen by the teacher's selection.
        projection: for 'topk', the projection's settings (mode, delta, eta_max, ...), JSON-serialisable.
        k: for 'topk', entries kept per token.
        topk_dtype: 'float16' or 'float32', of the top-k log-probs.
        hidden_size, hidden_dtype: width and type of hidden states, where they are kept.
        rollouts_digest: `Rollouts.digest()` of what was scored, for the record; readers check row by row.
    """

    kind: str
    policies: tuple[str, ...]
    fingerprints: Mapping[str, str]
    vocab_size: int
    temperature: float = 1.0
    precision: str = "fp32"
    tokenizer_digest: str | None = None
    chat_template_digest: str | None = None
    signal: str | None = None
    signal_requested: str | None = None
    projection: Mapping[str, Any] | None = None
    k: int | None = None
    topk_dtype: str = "float16"
    hidden_size: int | None = None
    hidden_dtype: str | None = None
    rollouts_digest: str | None = None

    def __post_init__(self) -> None:
        # As JSON would give them back, so that a meta equals itself after a round trip.
        object.__setattr__(self, "policies", tuple(self.policies))
        object.__setattr__(self, "fingerprints", dict(self.fingerprints))
        if self.projection is not None:
            object.__setattr__(self, "projection", json.loads(json.dumps(dict(self.projection))))
        if self.kind not in KINDS:
            raise CacheError(f"kind: {self.kind!r} isn't one of {', '.join(KINDS)}")
        if not self.policies or len(set(self.policies)) != len(self.policies):
            raise CacheError(f"policies: {self.policies} must be different names, at least one")
        if set(self.fingerprints) != set(self.policies):
            detail = f"{sorted(self.fingerprints)} must be given for exactly the policies {sorted(self.policies)}"
            raise CacheError(f"fingerprints: {detail}")
        if not 1 <= self.vocab_size <= MAX_VOCAB_SIZE:
            raise CacheError(f"vocab_size: {self.vocab_size} must be between 1 and {MAX_VOCAB_SIZE}")
        if not self.temperature > 0:
            raise CacheError(f"temperature: {self.temperature} must be above 0")
        if self.topk_dtype not in LOG_PROB_TYPES:
            raise CacheError(f"topk_dtype: {self.topk_dtype!r} isn't one of {', '.join(LOG_PROB_TYPES)}")
        if self.kind == TOPK and (self.k is None or not 1 <= self.k <= self.vocab_size):
            raise CacheError(f"k: {self.k} must be between 1 and the vocabulary size {self.vocab_size} for kind 'topk'")
        if self.kind == TOKEN and self.k is not None:
            raise CacheError("k: only kind 'topk' has one")
        if (self.hidden_size is None) != (self.hidden_dtype is None):
            raise CacheError("hidden_size and hidden_dtype go together")
        if self.hidden_dtype is not None and self.hidden_dtype not in HIDDEN_TYPES:
            raise CacheError(f"hidden_dtype: {self.hidden_dtype!r} isn't one of {', '.join(HIDDEN_TYPES)}")

    @property
    def tables(self) -> tuple[str, ...]:
        """Names of the cache's tables."""
        names = [log_probs_table(policy) for policy in self.policies]
        names += [TOPK] if self.kind == TOPK else []
        return (*names, *(hidden_table(policy) for policy in self.policies if self.hidden_size is not None))

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON-serialisable mapping."""
        return asdict(self) | {"policies": list(self.policies), "fingerprints": dict(self.fingerprints)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CacheMeta":
        """The inverse of `to_json`; other keys are left alone."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def of_table(self, table: str) -> dict[str, Any]:
        """What the rows of a table depend on. Equal exactly where rows may stand in one table."""
        common = ("vocab_size", "temperature", "precision", "tokenizer_digest", "chat_template_digest")
        found: dict[str, Any] = {name: getattr(self, name) for name in common}
        if table == TOPK:
            names = ("signal", "projection", "k", "topk_dtype", "hidden_dtype")
            return found | {"fingerprints": dict(self.fingerprints)} | {name: getattr(self, name) for name in names}
        kind, _, policy = table.partition(".")
        found["fingerprints"] = {policy: self.fingerprints[policy]}
        if kind == "hidden":
            found |= {"hidden_size": self.hidden_size, "hidden_dtype": self.hidden_dtype}
        return found

    def columns(self, table: str) -> dict[str, Column]:
        """A table's payload."""
        if table == TOPK:
            assert self.k is not None
            high = high_bytes(self.k, self.vocab_size)
            return {
                "topk_scores": Column(LOG_PROB_TYPES[self.topk_dtype], self.k),
                "topk_ids_low": Column(pa.uint16(), self.k),
                **({"topk_ids_high": Column(pa.uint8(), high)} if high else {}),
                "log_normalizer": Column(pa.float32()),
                "tail_log_prob": Column(pa.float32()),
            }
        if table.startswith("hidden."):
            assert self.hidden_size is not None and self.hidden_dtype is not None
            return {"hidden": Column(HIDDEN_TYPES[self.hidden_dtype], self.hidden_size)}
        return {"log_probs": Column(pa.float32())}

    def schema(self, table: str, facts: Mapping[str, Any] | None = None) -> pa.Schema:
        """The Arrow schema of a part; `facts` are of this part's rows (`statistics`) or the table (`output_layer`)."""
        payload = [pa.field(n, pa.list_(c.type), nullable=False) for n, c in self.columns(table).items()]
        about = {"format_version": FORMAT_VERSION, "table": table, "meta": self.of_table(table), "facts": facts or {}}
        return pa.schema([*KEYS, *payload], {PART_KEY: json.dumps(about, sort_keys=True).encode()})


@dataclass(frozen=True)
class TableIndex:
    """A table as `cache.json` lists it.

    Attributes:
        parts: per part `name` (its path in the cache's folder), `num_rows`, `num_tokens`, `bytes`, `sha256`.
        num_rows, num_tokens: rollouts and response tokens in all parts.
        facts: what all parts say: for hidden states `output_layer`, the digest of the layer that they belong to.
    """

    parts: list[dict[str, Any]]
    num_rows: int
    num_tokens: int
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheIndex:
    """`cache.json` as a whole.

    Attributes:
        meta: what the cache was made from.
        tables: by name.
        statistics: for 'topk', `eta` and `target_kl` -> token `mean`, `min`, `max`.
    """

    meta: CacheMeta
    tables: dict[str, TableIndex]
    statistics: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        return next(iter(self.tables.values())).num_rows

    @property
    def num_tokens(self) -> int:
        return next(iter(self.tables.values())).num_tokens

    def to_json(self) -> dict[str, Any]:
        """The content of `cache.json`."""
        tables = {name: asdict(table) for name, table in self.tables.items()}
        counts = {"num_rows": self.num_rows, "num_tokens": self.num_tokens}
        meta = self.meta.to_json()
        return {"format_version": FORMAT_VERSION, **meta, **counts, "statistics": self.statistics, "tables": tables}


def log_probs_table(policy: str) -> str:
    """The table with a policy's log-probs of the response tokens."""
    return f"log_probs.{policy}"


def hidden_table(policy: str) -> str:
    """The table with a policy's final hidden states."""
    return f"hidden.{policy}"


def read_index(folder: str | Path) -> CacheIndex:
    """Reads `cache.json`. Raises `CacheError` for a missing or unfinished cache or another format version."""
    root, path = Path(folder), Path(folder) / CACHE_FILE
    if not path.is_file():
        begun = any(root.glob("*/part-*.arrow")) or any(root.glob("slice-*"))
        what = "is unfinished (no cache.json)" if begun else "isn't a teacher cache (no cache.json)"
        raise CacheError(f"{folder}: {what}; run the precompute stage, which resumes where it stopped")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
        index = _parse(values) if version == FORMAT_VERSION else None
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError, OSError) as error:
        what = str(error) if isinstance(error, ValueError) else repr(error)
        raise CacheError(f"{path}: is damaged ({what}); {REMEDY}") from error
    check_version(version, path)
    assert index is not None
    return index


def _parse(values: Mapping[str, Any]) -> CacheIndex:
    tables = {name: TableIndex(**table) for name, table in values["tables"].items()}
    index = CacheIndex(CacheMeta.from_json(values), tables, values["statistics"])
    if set(tables) != set(index.meta.tables):
        raise ValueError(f"it lists the tables {sorted(tables)}, its kind has {sorted(index.meta.tables)}")
    for name, table in tables.items():
        _check_table(name, table)
    for name, figures in index.statistics.items():
        if {type(figures[key]) for key in ("mean", "min", "max")} - {int, float}:
            raise ValueError(f"the statistics of {name} aren't numbers")
    return index


def _check_table(name: str, table: TableIndex) -> None:
    """Raises `ValueError` or `TypeError` for an entry that no program of this format has written."""
    numbers = [table.num_rows, table.num_tokens]
    names = set()
    for part in table.parts:
        path, digest, *counts = (part[key] for key in ("name", "sha256", "num_rows", "num_tokens", "bytes"))
        if not re.fullmatch(rf"(slice-\d{{4}}-of-\d{{4}}/)?{re.escape(name)}/part-\d{{5}}-\d{{5}}\.arrow", path):
            raise ValueError(f"{path!r} is no part of {name}")
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"the sha256 of {path} is {digest!r}")
        numbers += counts
        names.add(path)
    if len(names) != len(table.parts) or not names:
        raise ValueError(f"{name} lists a part twice, or none")
    if any(type(number) is not int or number < 1 for number in numbers):
        raise ValueError(f"{name} has a count that isn't a whole number from 1")
    if not isinstance(table.facts, dict):
        raise TypeError(f"the facts of {name} aren't a mapping")


def check_version(version: Any, path: Path) -> None:
    """Raises `CacheError` for a format that this program doesn't read."""
    if version == FORMAT_VERSION:
        return
    newer = isinstance(version, int) and version > FORMAT_VERSION
    what = "read it with the program that wrote it or a newer one" if newer else "precompute again"
    raise CacheError(f"{path}: format_version {version}, this program reads {FORMAT_VERSION}; {what}")


def part_name(writer: int, part: int) -> str:
    """File name of part `part` of a writer."""
    return f"part-{writer:05d}-{part:05d}.arrow"


def parts_in(folder: str | Path) -> list[Path]:
    """The complete parts in a table's folder, in name order (unfinished ones have other names)."""
    return sorted(Path(folder).glob("part-?????-?????.arrow"))
