"""What policies say about fixed rollouts, computed once, keyed by rollout, valid under any layout."""

from megatron_erpd.teacher_cache.finalize import finalize
from megatron_erpd.teacher_cache.format import CacheIndex, CacheMeta
from megatron_erpd.teacher_cache.reader import CacheReader, TopKRow
from megatron_erpd.teacher_cache.writer import CacheWriter, exclusive, prepare_cache

__all__ = ["CacheIndex", "CacheMeta", "CacheReader", "CacheWriter", "TopKRow", "exclusive", "finalize", "prepare_cache"]
