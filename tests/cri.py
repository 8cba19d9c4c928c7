"""Calls of containerd's CRI, by gRPC: Debian has no crictl, but a curl with HTTP/2.

The numbers of fields are those of k8s.io/cri-api, runtime/v1/api.proto.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

_STATUS = re.compile(r"^grpc-status: ([0-9]+)\s*$", re.MULTILINE)
_MESSAGE = re.compile(r"^grpc-message: (.*?)\s*$", re.MULTILINE)

Message = Mapping[int, "str | int | Message | list[str]"]
"""A message of protobuf by the numbers of its fields."""


def framed(message: Message) -> bytes:
    """Return a message as gRPC sends it: behind a byte for "not compressed", and its length."""
    encoded = _encoded(message)
    return b"\0" + len(encoded).to_bytes(4, "big") + encoded


def unframed(answer: bytes) -> dict[int, list[bytes | int]]:
    """Return the fields of an answer, which has numbers and texts only."""
    return decoded(answer[5:])


def curl(method: str, socket: str, request: str, answer: str) -> list[str]:
    """Return the command line that sends the file `request` to a method, and prints the headers of the answer.

    `method` is such as `ImageService/PullImage`; the answer goes to the file of that name.
    """
    return [
        *("curl", "--silent", "--show-error", "--max-time", "100", "--http2-prior-knowledge"),
        *("--unix-socket", socket, "--header", "Content-Type: application/grpc", "--header", "TE: trailers"),
        *("--data-binary", f"@{request}", "--dump-header", "-", "--output", answer),
        f"http://localhost/runtime.v1.{method}",
    ]


def failure(headers: str) -> str:
    """Return the error in what curl printed; empty for a success."""
    status = _STATUS.search(headers)
    if status is not None and status[1] == "0":
        return ""
    why = _MESSAGE.search(headers)
    return unquote(why[1]) if why and why[1] else f"no answer: {headers}"


def _encoded(message: Message) -> bytes:
    """Encode a message of protobuf."""
    encoded = b""
    for number, value in message.items():
        if isinstance(value, int):
            encoded += _varint(number << 3) + _varint(value)
            continue
        for each in value if isinstance(value, list) else [value]:
            content = each.encode() if isinstance(each, str) else _encoded(each)
            encoded += _varint(number << 3 | 2) + _varint(len(content)) + content
    return encoded


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def decoded(message: bytes) -> dict[int, list[bytes | int]]:
    """Return the fields of a message of protobuf, which has numbers and texts only."""
    fields: dict[int, list[bytes | int]] = {}
    octets = iter(message)
    for octet in octets:
        key = _number(octets, octet)
        value: bytes | int = _number(octets, next(octets))
        if key & 7 == 2:
            assert isinstance(value, int)
            value = bytes(next(octets) for _ in range(value))
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _number(octets: Iterator[int], octet: int) -> int:
    value, shift = octet & 127, 7
    while octet & 128:
        octet = next(octets)
        value |= (octet & 127) << shift
        shift += 7
    return value
