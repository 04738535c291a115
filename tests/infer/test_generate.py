"""What is asked of an exported model reaches it."""

import torch
from PIL import Image

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
