"""The Helm chart without a cluster: `make test-chart`."""
