"""Makes the container image from the files of a Debian in which our package is installed."""
