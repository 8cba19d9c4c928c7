"""The configuration file: parses YAML into frozen values; errors tell file, line and key."""
