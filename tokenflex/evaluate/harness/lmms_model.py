"""The model as lmms-eval wants it; imported by lmms-eval alone, which is there then."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from accelerate import Accelerator
from lmms_eval.api.model import lmms

from ...errors import UserError
from .asking import MAX_NEW_TOKENS, Asker


class TokenFlexLmms(lmms):
    """`--model tokenflex --model_args pretrained=DIR,num_visual_tokens=144`; under `accelerate launch` on several GPUs.

    Raises:
        UserError: no exported model, a count that is none, or an argument that is not known.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        num_visual_tokens: int | str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **others: Any,
    ):
        super().__init__()
        unknown = sorted(name for name, value in others.items() if value not in (None, "", False))
        unknown = [name for name in unknown if name != "max_batch_size"]
        if unknown:
            raise UserError(
                f"--model_args {unknown[0]}: not known; known are pretrained, num_visual_tokens, batch_size"
            )
        if not str(batch_size).isdigit():
            raise UserError(f"--batch_size {batch_size}: wanted a number")
        self.batch_size = int(batch_size)
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self.asker = Asker(pretrained, num_visual_tokens, device=str(accelerator.device))

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer per request, in their order; those of equal settings are asked together, `batch_size` at a time."""
        answers = []
        for settings, batch in self._batches(requests):
            conversations = [self._conversation(request) for request in batch]
            told = self.asker.answers(conversations, **_options(settings))
            for request, answer in zip(batch, told):
                self.cache_hook.add_partial("generate_until", (request.args[0], settings), answer)
            answers += told
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError("lmms-eval: tasks of several rounds are not asked")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise UserError("lmms-eval: tasks that score given answers are not asked; take the task's generating form")

    def _conversation(self, request: Any) -> list[dict[str, Any]]:
        """A document of a task as the processor takes it."""
        _, to_messages, _, number, task, split = request.args
        messages = to_messages(self.task_dict[task][split][number])
        return [{"role": message["role"], "content": list(map(_item, message["content"]))} for message in messages]

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[dict[str, Any], list[Any]]]:
        for _, group in groupby(requests, key=lambda request: repr(request.args[2])):
            some = list(group)
            for begin in range(0, len(some), self.batch_size):
                yield some[begin].args[2], some[begin : begin + self.batch_size]


def _item(item: dict[str, Any]) -> dict[str, Any]:
    if item["type"] == "text":
        return {"type": "text", "text": item["text"]}
    if item["type"] == "image":
        return {"type": "image", "image": item["url"]}
    raise UserError(
        f"lmms-eval: a document holds {item['type']}, which this model does not take; text and images it does"
    )


def _options(settings: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as `Asker.answers` takes them."""
    until = settings.get("until") or []
    return {
        "max_new_tokens": settings.get("max_new_tokens") or MAX_NEW_TOKENS,
        "temperature": float(settings.get("temperature") or 0) if settings.get("do_sample", True) else 0.0,
        "top_p": settings.get("top_p"),
        "stop": [until] if isinstance(until, str) else list(until),
    }
