"""What a teacher cache is on disk: what the teachers say about fixed rollouts, keyed by rollout.

A cache is a folder:

    cache.json                  written last, by rename; a folder without it is unfinished and refused
    part-RRRRR-PPPPP.arrow      part P of writer R, an Arrow IPC *file* (magic "ARROW1"), uncompressed, memory-mappable

`cache.json` is one JSON object: `format_version`, every field of `CacheMeta`, `num_rows`, `num_tokens`, `statistics`
(for 'topk': token mean, minimum and maximum of eta and of the target's KL) and `parts` (`name`, `num_rows`, `bytes`
each). Every part carries the `CacheMeta` it was written under as JSON with sorted keys in its schema metadata
(`megatron_erpd.cache.meta`), so parts of two different caches can't be mixed.

A row is one rollout; rows have no order. Columns of both kinds, little-endian as Arrow prescribes:

    sample_id     utf8      the rollout's name
    crc           uint32    CRC-32 (zlib's) of its prompt's then its response's token ids, each as int32
    num_tokens    int32     R, the number of response tokens

Payload of both kinds, for each policy P in `policies`:

    log_probs.P       list<float32>[R]      log P(y_t | prompt, y_<t) of the response tokens, nats

Payload of kind 'topk' besides, the target distribution q of every response token:

    topk_indices      list<int32>[R*K]      vocabulary ids, row-major [R, K]
    topk_log_probs    list<float32 or float16>[R*K]     log q of those entries, in the same order
    tail_log_prob     list<float32>[R]      log of the mass of all other entries; -inf when there is none
    eta               list<float32>[R]      the projection's strength eta_t
    target_kl         list<float32>[R]      KL(q || pi_0) of the token's full distribution, nats

float16 halves the log-probs (from 8 to 6 bytes an entry) and rounds them by up to 0.4% of the probability at
log-probs around -8; the tail stays float32 and exact.

Log-probs are taken at `temperature` over the true vocabulary of `vocab_size` entries. Nothing in a row depends on how
it was computed or will be read, so a cache serves any parallel layout, batch size, order and packing.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_erpd.errors import CacheError

FORMAT_VERSION = 1
CACHE_FILE = "cache.json"
META_KEY = b"megatron_erpd.cache.meta"
TOKEN = "token"
TOPK = "topk"
KINDS = (TOKEN, TOPK)
LOG_PROB_TYPES: dict[str, pa.DataType] = {"float32": pa.float32(), "float16": pa.float16()}


@dataclass(frozen=True)
class CacheMeta:
    """What a cache was made from; a row is only as good as these.

    Attributes:
        kind: 'token' (log-probs of the response tokens, per policy) or 'topk' (these and the projected target q).
        policies: names of the policies that were scored, such as 'base', 'teacher', 'unlearned'.
        fingerprints: policy name -> digest of the checkpoint it was read from; exactly the `policies`.
        vocab_size: true (unpadded) vocabulary size.
        temperature: of all log-probs.
        tokenizer_digest: of the rollouts' tokenizer, where known.
        signal: for 'topk', the signal's expression, such as 'strong' or '0.7*teacher/base + 0.3*base/unlearned'; for
            'token' only where it was chosen when the cache was made.
        signal_requested: 'auto' where the signal was chosen by the teacher's selection.
        projection: for 'topk', the projection's settings (mode, delta, eta_max, ...), JSON-serialisable.
        k: for 'topk', entries kept per token.
        topk_dtype: 'float32' or 'float16', of the top-k log-probs.
        rollouts_digest: `Rollouts.digest()` of what was scored, for the record; readers check row by row.
    """

    kind: str
    policies: tuple[str, ...]
    fingerprints: Mapping[str, str]
    vocab_size: int
    temperature: float = 1.0
    tokenizer_digest: str | None = None
    signal: str | None = None
    signal_requested: str | None = None
    projection: Mapping[str, Any] | None = None
    k: int | None = None
    topk_dtype: str = "float32"
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
        if self.vocab_size < 1:
            raise CacheError(f"vocab_size: {self.vocab_size} must be at least 1")
        if not self.temperature > 0:
            raise CacheError(f"temperature: {self.temperature} must be above 0")
        if self.topk_dtype not in LOG_PROB_TYPES:
            raise CacheError(f"topk_dtype: {self.topk_dtype!r} isn't one of {', '.join(LOG_PROB_TYPES)}")
        if self.kind == TOPK and (self.k is None or not 1 <= self.k <= self.vocab_size):
            raise CacheError(f"k: {self.k} must be between 1 and the vocabulary size {self.vocab_size} for kind 'topk'")
        if self.kind == TOKEN and self.k is not None:
            raise CacheError("k: only kind 'topk' has one")

    def canonical(self) -> bytes:
        """JSON with sorted keys: equal exactly for equal metas."""
        return json.dumps(self.to_json(), sort_keys=True).encode()

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON-serialisable mapping."""
        return asdict(self) | {"policies": list(self.policies), "fingerprints": dict(self.fingerprints)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "CacheMeta":
        """The inverse of `to_json`; other keys are left alone."""
        known = {item.name for item in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def payload(self) -> dict[str, pa.DataType]:
        """Payload column -> its element type."""
        token_rows: dict[str, pa.DataType] = {log_probs_column(policy): pa.float32() for policy in self.policies}
        if self.kind == TOKEN:
            return token_rows
        return token_rows | {
            "topk_indices": pa.int32(),
            "topk_log_probs": LOG_PROB_TYPES[self.topk_dtype],
            "tail_log_prob": pa.float32(),
            "eta": pa.float32(),
            "target_kl": pa.float32(),
        }

    def schema(self) -> pa.Schema:
        """The Arrow schema of a part."""
        keys = [("sample_id", pa.string()), ("crc", pa.uint32()), ("num_tokens", pa.int32())]
        columns = keys + [(name, pa.list_(element)) for name, element in self.payload().items()]
        return pa.schema([pa.field(n, t, nullable=False) for n, t in columns], {META_KEY: self.canonical()})


@dataclass(frozen=True)
class CacheIndex:
    """`cache.json` as a whole.

    Attributes:
        meta: what the cache was made from.
        parts: per part `name`, `num_rows`, `bytes`.
        num_rows, num_tokens: rollouts and response tokens in all parts.
        statistics: for 'topk', `eta` and `target_kl` -> token `mean`, `min`, `max`.
    """

    meta: CacheMeta
    parts: list[dict[str, Any]]
    num_rows: int
    num_tokens: int
    statistics: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of `cache.json`."""
        rest = {name: getattr(self, name) for name in ("num_rows", "num_tokens", "statistics", "parts")}
        return {"format_version": FORMAT_VERSION} | self.meta.to_json() | rest


def log_probs_column(policy: str) -> str:
    """The column that holds a policy's log-probs of the response tokens."""
    return f"log_probs.{policy}"


def read_index(folder: str | Path) -> CacheIndex:
    """Reads `cache.json`. Raises `CacheError` for a missing or unfinished cache or another format version."""
    path = Path(folder) / CACHE_FILE
    if not path.is_file():
        what = "is unfinished (no cache.json)" if parts_in(folder) else "isn't a teacher cache (no cache.json)"
        raise CacheError(f"{folder}: {what}; run the precompute stage, which resumes where it stopped")
    try:
        values = json.loads(path.read_text())
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise CacheError(f"{path}: format_version {version}, this program reads {FORMAT_VERSION}; precompute again")
        return CacheIndex(
            meta=CacheMeta.from_json(values),
            parts=values["parts"],
            num_rows=values["num_rows"],
            num_tokens=values["num_tokens"],
            statistics=values["statistics"],
        )
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CacheError(f"{path}: is damaged ({error!r}); precompute the cache again") from error


def part_meta(table: pa.Table, path: Path) -> CacheMeta:
    """The meta a part was written under. Raises `CacheError` when there is none."""
    text = (table.schema.metadata or {}).get(META_KEY)
    if text is None:
        raise CacheError(f"{path}: isn't a part of a teacher cache; remove it from the folder")
    return CacheMeta.from_json(json.loads(text))


def part_name(writer_rank: int, part: int) -> str:
    """File name of part `part` of writer `writer_rank`."""
    return f"part-{writer_rank:05d}-{part:05d}.arrow"


def parts_in(folder: str | Path) -> list[Path]:
    """The complete parts in a folder, in name order (unfinished ones have other names)."""
    return sorted(Path(folder).glob("part-?????-?????.arrow"))


def open_part(path: Path) -> pa.Table:
    """One part as a memory-mapped table. Raises `CacheError` when it isn't a whole Arrow file."""
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise CacheError(f"{path}: can't be read ({error}); delete the cache's folder and precompute again") from error
