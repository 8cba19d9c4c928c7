"""The subcommands: one thin file for each."""
