"""What a request may cost, and the refusal of one that is wrong or would cost more."""

from dataclasses import dataclass
from typing import Any

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """What one request may bring and take."""

    max_body_bytes: int = 32 * 2**20
    """Bytes of a request, its images and videos in base64 among them; also of one that is fetched."""
    max_images: int = 16
    """Images and videos of a conversation."""
    max_image_pixels: int = 50_000_000
    """Pixels of one image, by its header."""
    max_frames: int = 32
    """Frames of all videos of a conversation; the model's own `max_frames` is of each."""
    max_frame_pixels: int = 10_000_000
    """Pixels of a frame of a video, by its header: smaller than an image, since all frames are in memory at once."""
    max_decode_seconds: float = 10.0
    """Seconds of decoding all videos of a conversation."""
    max_prompt_tokens: int = 16_384
    """Tokens of a prompt, visual ones included."""
    max_new_tokens: int = 1024
    """Tokens of an answer."""
    max_seconds: float = 120.0
    """From a request's arrival to its last token, waiting included."""
    max_waiting: int = 32
    """Requests that wait for their turn beside the one that is answered."""
    max_cache_bytes: int = 2**30
    """Of key-value caches that are kept for the next turn of their conversations."""


class RequestRefused(UserError):
    """A request that is not answered: one line for whoever sent it, as OpenAI's error object.

    Args:
        message: where, what came, what was wanted.
        status: of HTTP.
        param: the field of the request that is wrong.
        code: for programs.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(_short(" ".join(message.split()), 500))
        self.http_status, self.param, self.code = status, param and _short(param, 100), code

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = "invalid_request_error" if self.http_status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _short(text: str, longest: int) -> str:
    """A text that may repeat what came, however long that was."""
    return text if len(text) <= longest else text[: longest - 3] + "..."
