"""Faces the clients: /v2 requests become answers, answers become bytes on the wire."""
