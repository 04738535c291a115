"""What is asked of an exported model reaches it."""

import pytest
import torch
from PIL import Image

from tokenflex.cli.main import main
from tokenflex.evaluate.harness.asking import Asker
from tokenflex.infer import Generator
from tokenflex.serve.seen import seen_images


def test_a_rectangle_reaches_the_model_with_its_sides(tiny_export, tmp_path):
    """A prompt tells how many visual tokens an image has, and nothing of their rows and columns."""
    Image.effect_noise((64, 48), 80).convert("RGB").save(tmp_path / "image.png")
    content = [{"type": "image", "image": (tmp_path / "image.png").read_bytes()}, {"type": "text", "text": "which?"}]
    talk = [{"role": "user", "content": content}]
    generator, told = Generator(tiny_export), []
    projector = generator.model.projector
    projector.register_forward_pre_hook(lambda module, args: told.append(args[2]))
    for asked, sides in (((2, 6), [(2, 6)]), ([(12, 1)], [(12, 1)]), (12, [(3, 4)])):
        generator("which?", [tmp_path / "image.png"], asked, max_new_tokens=1)
        inputs = generator.inputs(talk, asked)
        (seen,) = seen_images(generator, talk, inputs)
        assert told.pop() == sides == [(seen.rows, seen.columns)] and not told
    asker = Asker(tiny_export, "2x6")
    asker.generator.model.projector.register_forward_pre_hook(lambda module, args: told.append(args[2]))
    asker.answers([talk, talk], 1)
    assert told == [[(2, 6)] * 2]
    assert torch.equal(generator.inputs(talk, (2, 6))["input_ids"], generator.inputs(talk, 12)["input_ids"])


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ["--num-visual-tokens", "100000000"],
            "error: --num-visual-tokens: a prompt of 100000000 tokens, images included",
        ),
        (["--num-visual-tokens", "99999x99999"], "error: --num-visual-tokens: a prompt of 9999800001 tokens"),
        (["--prompt", "digit " * 33_000], "error: --prompt: a prompt of 33"),
        (["--max-new-tokens", "0"], "argument --max-new-tokens: invalid positive number"),
        (["--num-visual-tokens", "0"], "error: --num-visual-tokens 0: '0' is no count"),
        (["--total-visual-tokens", "3"], "error: --num-visual-tokens: total_visual_tokens=3: 1 images"),
    ],
)
def test_what_a_model_has_no_room_for_is_told_in_one_line(options, words, tiny_export, tmp_path, capsys):
    """And at once, whatever the count: no prompt of as many placeholders is made."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    arguments = [
        "generate",
        "--model",
        str(tiny_export),
        "--image",
        str(tmp_path / "a.png"),
        "--prompt",
        "a?",
        *options,
    ]
    try:
        assert main(arguments) == 2
    except SystemExit as end:
        assert end.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(said) == 1 and words in said[0], said


def test_an_answer_ends_where_the_context_does(tiny_export, tmp_path):
    generator = Generator(tiny_export)
    generator.model.config.text_config.max_position_embeddings = length = (
        len(generator.inputs([{"role": "user", "content": "a?"}])["input_ids"][0]) + 3
    )
    assert generator.context == length
    with_room = generator("a?", max_new_tokens=9)
    generator.model.config.text_config.max_position_embeddings = 32768
    assert with_room == generator("a?", max_new_tokens=3) != generator("a?", max_new_tokens=9)
