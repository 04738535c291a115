"""VLMEvalKit, which has no entry points: a wrapper that registers an export and then runs its own run.py.

    python -m tokenflex.evaluate.harness.vlmevalkit VLMEvalKit/run.py --pretrained DIR --num-visual-tokens 64,144 -- --data MMStar

Every count is a model of its own there, named `tokenflex-144`.
"""

import argparse
import functools
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...export import is_exported
from .asking import MAX_NEW_TOKENS, Asker, check_count


def model_class() -> type:
    """The class that VLMEvalKit asks, over its own base class."""
    from vlmeval.vlm.base import BaseModel

    class TokenFlexVLM(BaseModel):
        """An export at one count; messages may have texts and images in any order."""

        INSTALL_REQ = False
        INTERLEAVE = True
        allowed_types = ["text", "image"]  # a film is refused; by frames it is images

        def __init__(
            self,
            model_path: str,
            num_visual_tokens: int | str | None = None,
            max_new_tokens: int = MAX_NEW_TOKENS,
            **others: Any,
        ):
            super().__init__()
            self.asker = Asker(model_path, num_visual_tokens)
            self.max_new_tokens = max_new_tokens

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            """The answer to one message: items of type text, or image with the path of a file."""
            content: list[dict[str, Any]] = []
            for item in message:
                if item["type"] == "image":
                    content.append({"type": "image", "image": Path(item["value"])})
                else:
                    content.append({"type": "text", "text": item["value"]})
            (answer,) = self.asker.answers([[{"role": "user", "content": content}]], self.max_new_tokens)
            return answer

    return TokenFlexVLM


def register(folder: str | os.PathLike, counts: Sequence[str], max_new_tokens: int) -> list[str]:
    """Enter an export into VLMEvalKit's models, once per count; returns their names there.

    What is wrong is told here: its program would log it once per benchmark, go on and end as if all were well.

    Raises:
        UserError: no exported model, or a count that is none or that the model cannot be asked at.
    """
    if not is_exported(folder):
        raise UserError(
            f"--pretrained {folder}: no exported model there (no config.json); give the folder that training wrote, runs/NAME/model"
        )
    for count in counts:
        check_count(folder, count)
    from vlmeval.config import supported_VLM

    kind, names = model_class(), []
    for count in counts:
        names.append(f"tokenflex-{count}")
        supported_VLM[names[-1]] = functools.partial(
            kind, model_path=str(folder), num_visual_tokens=count, max_new_tokens=max_new_tokens
        )
    return names


def main(argv: Sequence[str] | None = None) -> None:
    """Register, then run VLMEvalKit's program with the rest of the arguments and the names of our models."""
    parser = argparse.ArgumentParser(
        description="Run VLMEvalKit on an exported model.",
        epilog="Behind -- come arguments of run.py: -- --data MMStar",
    )
    parser.add_argument("program", metavar="RUN.PY", help="run.py of VLMEvalKit")
    parser.add_argument("--pretrained", required=True, metavar="DIR", help="folder that training exported")
    parser.add_argument("--num-visual-tokens", required=True, metavar="N,N", help="counts: 64,144 or 8x12")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS, metavar="N", help="of an answer")
    given = list(sys.argv[1:] if argv is None else argv)
    end = given.index("--") if "--" in given else len(given)
    arguments = parser.parse_args(given[:end])
    if not Path(arguments.program).is_file():
        raise SystemExit(f"error: {arguments.program}: no such file; give the run.py of VLMEvalKit")
    try:
        names = register(arguments.pretrained, arguments.num_visual_tokens.split(","), arguments.max_new_tokens)
    except ModuleNotFoundError as error:
        mend = "install VLMEvalKit from its repository"
        if error.name != "vlmeval":
            mend = "VLMEvalKit imports it, and its requirements do not name all that it imports"
        raise SystemExit(f"error: {error.name} is not installed; {mend}") from None
    sys.argv = [arguments.program, "--model", *names, *given[end + 1 :]]
    runpy.run_path(arguments.program, run_name="__main__")


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        raise SystemExit(f"error: {problem}") from None
