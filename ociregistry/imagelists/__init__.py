"""Image lists: plain ones, and those in Kubernetes objects as YAML or JSON."""
