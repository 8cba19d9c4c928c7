"""Knows the network, never the disk: one Registry for each upstream."""
