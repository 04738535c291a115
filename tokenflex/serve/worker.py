"""The thread that holds the model: requests one after another, in the order of their arrival, told in events."""

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from ..errors import UserError
from ..infer import Generator
from .clips import with_frames
from .limits import RequestRefused, ServeLimits
from .pieces import TextPieces
from .requests import ChatRequest
from .seen import SeenImage, seen_images


@dataclass(frozen=True)
class Started:
    """The prompt has been built, in `seconds` (the vision encoder's share included, where the features were not kept);
    num_image_tokens of its tokens are visual ones, of `images`, frames of videos among them."""

    num_prompt_tokens: int
    num_image_tokens: int
    images: tuple[SeenImage, ...]
    seconds: float


@dataclass(frozen=True)
class Piece:
    """More of the answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """No more comes. reason: `stop`, or `length` where the answer was cut. seconds: from the prompt's tokens to the last new one.
    num_cached_tokens of the prompt were not run again, as an earlier one began with them."""

    reason: str
    num_new_tokens: int
    num_cached_tokens: int
    seconds: float


@dataclass(frozen=True)
class Failed:
    """No answer, or no more of it, and why."""

    error: RequestRefused


Event: TypeAlias = Started | Piece | Finished | Failed


class Job:
    """A request on its way: whom to tell, until when, and whether anybody still listens."""

    def __init__(self, request: ChatRequest, tell: Callable[[Event], None], max_seconds: float):
        self.request, self.tell = request, tell
        self.deadline = time.monotonic() + max_seconds
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Nobody listens any more: it ends with its next token, or never begins."""
        self._cancelled.set()

    @property
    def is_over(self) -> bool:
        return self._cancelled.is_set() or time.monotonic() > self.deadline


class Worker:
    """Answers requests in one thread of its own, so that whoever takes them is never held up."""

    def __init__(self, generator: Generator, limits: ServeLimits):
        self._generator, self._limits = generator, limits
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._waiting = threading.BoundedSemaphore(limits.max_waiting + 1)
        self._jobs: set[Job] = set()

    def submit(self, request: ChatRequest, tell: Callable[[Event], None]) -> Job:
        """Answer a request when its turn comes; `tell` is called from the worker's thread with each event.

        Raises:
            RequestRefused: too many wait already.
        """
        if not self._waiting.acquire(blocking=False):
            raise RequestRefused(
                f"{self._limits.max_waiting} requests wait already; try again later", 503, None, "busy"
            )
        job = Job(request, tell, self._limits.max_seconds)
        self._jobs.add(job)
        self._pool.submit(self._answer, job).add_done_callback(lambda done: self._end(job, done))
        return job

    def close(self) -> None:
        """Answer no more: what waits is dropped, what is being answered ends with its next token."""
        for job in list(self._jobs):
            job.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _end(self, job: Job, done: "Future[None]") -> None:
        self._waiting.release()
        self._jobs.discard(job)
        error = None if done.cancelled() else done.exception()
        if isinstance(error, RequestRefused):
            job.tell(Failed(error))
        elif error is not None:  # one request must not end the server, and whoever runs it must hear of it
            traceback.print_exception(error)
            job.tell(Failed(RequestRefused("the model failed on this request; see the server's log", 500)))
        elif done.cancelled():
            job.tell(Failed(RequestRefused("the server ends", 503)))

    def _answer(self, job: Job) -> None:
        if job.is_over:
            raise out_of_time(self._limits)
        model, begin = self._generator.model, time.monotonic()
        request = with_frames(job.request, self._generator.processor, self._limits, lambda: job.is_over)
        if job.is_over:
            raise out_of_time(self._limits)
        try:
            inputs = self._generator.inputs(
                request.messages, request.num_visual_tokens, request.effort, request.total_visual_tokens
            )
        except UserError as error:
            raise RequestRefused(str(error).removeprefix("--num-visual-tokens").removeprefix(":").lstrip()) from None
        ids = inputs["input_ids"]
        num_new = self._room(ids.shape[1], request.max_new_tokens)
        images = seen_images(self._generator, request.messages, inputs)
        asked = time.monotonic()
        num_visual = int((ids == model.config.image_token_id).sum())
        job.tell(Started(ids.shape[1], num_visual, images, asked - begin))
        if request.seed is not None:
            torch.manual_seed(request.seed)
        options = {"temperature": request.temperature, "top_p": request.top_p} if request.temperature else {}
        writer = _Writer(job, self._generator)
        _, num_cached = self._generator.generate(
            inputs,
            **options,
            do_sample=request.temperature > 0,
            max_new_tokens=num_new,
            streamer=writer,
            stopping_criteria=StoppingCriteriaList([_Over(job, writer.pieces)]),
        )
        if job.is_over:
            raise out_of_time(self._limits)
        reason = writer.reason(model.generation_config.eos_token_id)
        job.tell(Finished(reason, len(writer.pieces.ids), num_cached, time.monotonic() - asked))

    def _room(self, num_prompt: int, num_new: int) -> int:
        """Tokens that may be written.

        Raises:
            RequestRefused: the prompt leaves no room.
        """
        context = self._generator.context
        most = min(self._limits.max_prompt_tokens, context - 1)
        if num_prompt > most:
            raise RequestRefused(
                f"the prompt has {num_prompt} tokens and at most {most} are taken; give fewer num_visual_tokens, or less text",
                param="messages",
                code="context_length_exceeded",
            )
        return min(num_new, context - num_prompt)


def out_of_time(limits: ServeLimits) -> RequestRefused:
    """The refusal of a request that was not answered in time."""
    return RequestRefused(
        f"no whole answer within {limits.max_seconds:g} s; ask for fewer tokens, or when fewer ask",
        504,
        None,
        "timeout",
    )


class _Writer(BaseStreamer):
    """Takes the tokens of one answer from `generate` and tells their text."""

    def __init__(self, job: Job, generator: Generator):
        tokenizer = generator.processor.tokenizer
        self.pieces = TextPieces(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), job.request.stop)
        self._job, self._is_prompt = job, True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:  # comes first
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self._tell(self.pieces.push(token))

    def end(self) -> None:
        if not self._job.is_over:
            self._tell(self.pieces.finish())

    def reason(self, ends: int | list[int] | None) -> str:
        """Why the answer ended."""
        known = ends if isinstance(ends, list) else [ends]
        is_ended = self.pieces.is_stopped or self.pieces.ids[-1:] == [] or self.pieces.ids[-1] in known
        return "stop" if is_ended else "length"

    def _tell(self, text: str) -> None:
        if text:
            self._job.tell(Piece(text))


class _Over(StoppingCriteria):
    """Ends generation when nobody listens, when time is up, and at a stop text."""

    def __init__(self, job: Job, pieces: TextPieces):
        self._job, self._pieces = job, pieces

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        is_done = self._job.is_over or self._pieces.is_stopped
        return torch.full((input_ids.shape[0],), is_done, dtype=torch.bool, device=input_ids.device)
