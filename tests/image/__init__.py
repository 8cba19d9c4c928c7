"""The container image that `make image` builds, and its programs in real runtimes."""
