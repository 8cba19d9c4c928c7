"""For the operator: what the daemon does, as one value, and as metrics for Prometheus."""
