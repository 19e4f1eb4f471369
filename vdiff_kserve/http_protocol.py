"""HTTP as uvicorn reads it, with heads of bounded length."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 2**16
"""Longest request line with its headers, or trailers behind a body; as long as h11 allows."""


class BoundedHeads(HttpToolsProtocol):
    """Ends a connection whose request never gets past its headers.

    The parser keeps them in memory until they are whole, before anyone has asked for a key.
    """

    _unparsed = 0

    def data_received(self, data: bytes) -> None:
        """Read on, unless too much came that is neither a whole head nor a body."""
        self._unparsed += len(data)
        super().data_received(data)
        if self._unparsed > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"Headers must have at most {MAX_HEAD_BYTES} bytes.")

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._unparsed = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """What guards count."""
        self._unparsed = 0
        super().on_body(body)
