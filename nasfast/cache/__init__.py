"""Features of a frozen encoder, computed once and shared by all processes through memory maps."""

from nasfast.cache.feature_cache import (
    CacheConfig,
    FeatureCache,
    default_directory,
    tensors_fingerprint,
)

__all__ = ["CacheConfig", "FeatureCache", "default_directory", "tensors_fingerprint"]
