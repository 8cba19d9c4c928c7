"""The HTTP server: turns client requests below /v2/ and /health into responses."""
