"""The join of store and upstream: a read-through cache with one download per blob in flight."""
