"""The configuration file: YAML to frozen values, or an error that says where it is."""
