"""transformers' own mixins for processors and image processors over ours; `make test-transformers` fetches and runs them.

What is skipped, and why, stands in `SKIPPED`.
"""

import sys
import types
import unittest
from pathlib import Path
from unittest.mock import patch

from PIL import Image

BUILD = Path(__file__).parents[2] / "build"
PICTURE = BUILD / "picture.png"
sys.path[:0] = [str(BUILD / "transformers_tests"), str(BUILD / "test_packages")]
Image.effect_noise((64, 48), 90).convert("RGB").save(PICTURE)
addresses = types.ModuleType("fetch_hub_objects_for_ci")  # of their repository: the address of a test file -> a path
addresses.url_to_local_path = lambda url: str(PICTURE)
sys.modules.setdefault("fetch_hub_objects_for_ci", addresses)

from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin  # noqa: E402
from tests.test_processing_common import ProcessorTesterMixin  # noqa: E402

from tokenflex.corpus.tokenizer import build_tokenizer  # noqa: E402
from tokenflex.model import TokenFlexImageProcessor, TokenFlexProcessor  # noqa: E402

SKIPPED = {
    "test_call_arguments_not_in_attributes": "num_visual_tokens is an argument of the call and of the processor: the count per "
    "call over a default is what this model is for",
    "test_apply_chat_template_assistant_mask": "the mask is what training learns, from the end of the generation prompt to the "
    "token that ends the turn, whatever {% generation %} marks (tests/model/test_processing.py)",
    "test_chat_template_message_objects": "an image is its tokens wherever a template writes it, and never its address; objects are read "
    "as dictionaries are (tests/model/test_processing.py)",
    "test_call_numpy_4_channels": "alpha is laid on white, as in training, whatever mean and deviation are given",
}
"""Their tests that ours does not pass, and why."""


def without_skipped(tests):
    """The class of tests without those that are listed with a reason."""
    for name in SKIPPED:
        if hasattr(tests, name):
            setattr(tests, name, unittest.skip(f"own: `{name}`: {SKIPPED[name]}")(getattr(tests, name)))
    return tests


@without_skipped
class TestProcessor(ProcessorTesterMixin, unittest.TestCase):
    processor_class = TokenFlexProcessor

    @classmethod
    def _setup_image_processor(cls):
        return TokenFlexImageProcessor(8, 12)

    @classmethod
    def _setup_tokenizer(cls):
        return build_tokenizer()

    @staticmethod
    def prepare_processor_dict():
        return {"num_visual_tokens": 6, "patch_grid": [2, 3]}

    def _test_apply_chat_template(self, *arguments):
        """As theirs, but for `return_dict`, which is True by default here, as in their tokenizers."""
        ours = TokenFlexProcessor.apply_chat_template
        theirs = lambda self, *args, return_dict=False, **more: ours(self, *args, return_dict=return_dict, **more)  # noqa: E731
        with patch.object(TokenFlexProcessor, "apply_chat_template", theirs):
            super()._test_apply_chat_template(*arguments)


class Tester(ImageProcessingTester):
    __test__ = False

    def __init__(self, parent):
        super().__init__(parent, batch_size=3, min_resolution=20, max_resolution=60, height=8, width=12, max_tiles=1)
        self.size = {"height": 8, "width": 12}

    def _get_image_processing_classes(self):
        return {"torchvision": TokenFlexImageProcessor}

    def prepare_image_processor_dict(self):
        return {"height": 8, "width": 12, "max_tiles": 1}


@without_skipped
class TestImageProcessor(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = Tester
