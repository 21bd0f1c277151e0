"""What teachers say about fixed rollouts, computed once, keyed by rollout, valid under any layout."""

from megatron_erpd.teacher_cache.format import CacheIndex, CacheMeta
from megatron_erpd.teacher_cache.reader import CacheReader, TopKRow
from megatron_erpd.teacher_cache.writer import CacheWriter, finalize, prepare_cache

__all__ = ["CacheIndex", "CacheMeta", "CacheReader", "CacheWriter", "TopKRow", "finalize", "prepare_cache"]
