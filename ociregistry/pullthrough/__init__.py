"""The read-through cache, which joins store and upstream, with one download in flight per blob."""
