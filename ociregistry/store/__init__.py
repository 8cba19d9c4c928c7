"""Knows the disk, never the network: records, blobs and partials."""
