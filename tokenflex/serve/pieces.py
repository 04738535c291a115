"""Tokens in, text out: the pieces of an answer that is sent while it is written."""

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what a part of a character decodes to


class TextPieces:
    """Pieces that join to the whole answer: stripped, and cut before the first text of `stop`.

    A token may be part of a character, and a text that may become one of `stop` cannot be taken back: both are held until it
    is clear. Only the last few tokens are decoded with each new one, so that a long answer costs no more per token.

    Args:
        decode: token ids -> text without special tokens.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self.is_stopped = False
        self.ids: list[int] = []
        self._decode, self._stop = decode, tuple(stop)
        self._begin = self._done = 0  # tokens from `begin` are decoded together; those before `done` are in the text
        self._text = self._sent = ""

    def push(self, token: int) -> str:
        """What may be sent now that `token` has come; often nothing."""
        self.ids.append(token)
        known, now = self._decode(self.ids[self._begin : self._done]), self._decode(self.ids[self._begin :])
        if len(now) > len(known) and not now.endswith(UNFINISHED):
            self._text += now[len(known) :]
            self._begin, self._done = self._done, len(self.ids)
        return self._send(self._text, is_end=False)

    def finish(self) -> str:
        """The rest, once the last token has come."""
        whole = self._decode(self.ids)
        return self._send(whole if whole.lstrip().startswith(self._sent) else self._text, is_end=True)

    @property
    def text(self) -> str:
        """All that was sent."""
        return self._sent

    def _send(self, text: str, is_end: bool) -> str:
        text = text.lstrip()
        ends = [place for place in map(text.find, self._stop) if place >= 0]
        self.is_stopped = self.is_stopped or bool(ends)
        if ends:
            text = text[: min(ends)]
        elif not is_end:
            text = text[: len(text) - self._num_held(text)]
        piece = text.rstrip()[len(self._sent) :]
        self._sent += piece
        return piece

    def _num_held(self, text: str) -> int:
        """Characters at the end that may be the begin of a stop text."""
        lengths = (length for stop in self._stop for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return max(lengths, default=0)
