"""What both evaluators want: conversations in, answers out, at one count of visual tokens."""

from collections.abc import Sequence
from os import PathLike
from typing import Any

from ...errors import UserError
from ...infer import Count, Generator, check_auto, parse_num_visual_tokens

MAX_NEW_TOKENS = 1024


class Asker:
    """An exported model that is asked batches of conversations, every image at one count.

    Args:
        num_visual_tokens: a number, or text such as `144` or `8x12`; none is the model's largest trained count.
        device: where it runs; by default the first GPU, where there is one.

    Raises:
        UserError: no exported model, or a count that is none.
    """

    def __init__(self, folder: str | PathLike, num_visual_tokens: int | str | None = None, device: str = ""):
        self.num_visual_tokens = check_count(folder, num_visual_tokens)
        self.generator = Generator(folder)
        if device:
            self.generator.model.to(device)

    def answers(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        top_p: float | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """One answer per conversation, cut before the first text of `stop`; temperature 0 is the likeliest.

        Raises:
            UserError: a conversation that the model does not take.
        """
        model, processor = self.generator.model, self.generator.processor
        try:
            inputs = processor.apply_chat_template(
                list(conversations),
                tokenize=True,
                add_generation_prompt=True,
                num_visual_tokens=None if self.num_visual_tokens == "auto" else self.num_visual_tokens,
            ).to(model.device)
            # "auto" is the model's to choose, and no prompt tells a rectangle's sides
            if self.num_visual_tokens is not None:
                inputs["num_visual_tokens"] = self.num_visual_tokens
        except ValueError as error:
            raise UserError(f"evaluation: {error}") from None
        drawn = {"temperature": temperature, "top_p": top_p or 1.0} if temperature else {}
        output = model.generate(**inputs, **drawn, do_sample=bool(drawn), max_new_tokens=max_new_tokens)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [_before(text.strip(), stop) for text in texts]


def check_count(folder: str | PathLike, value: int | str | None) -> Count | None:
    """The one count that was asked for, before a model's weights are loaded.

    Raises:
        UserError: none, several, or "auto" where the model has no router.
    """
    if value is None or value == "":
        return None
    counts = parse_num_visual_tokens(str(value))
    if isinstance(counts, list):
        raise UserError(f"num_visual_tokens={value}: an evaluation has one count for all images; run it once per count")
    if counts == "auto":
        check_auto(folder)
    return counts


def _before(text: str, stop: Sequence[str]) -> str:
    return text[: min((place for place in map(text.find, stop) if place >= 0), default=None)].rstrip()
