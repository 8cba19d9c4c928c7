"""Generators of files that are made from the code when it is packaged."""
