"""Transformers' own tests of processors and image processors, held against ours.

They lie in the source distribution of the installed release, under build/transformers-tests; `make test-transformers` puts it
there. Without it there is nothing to run. What is skipped, and why, stands in `SKIPPED`.
"""

import sys
import types
import unittest
from unittest.mock import patch

import pytest
from conftest import ROOT
from PIL import Image

FOLDER = ROOT / "build" / "transformers-tests"
if not (FOLDER / "tests" / "test_processing_common.py").exists():
    pytest.skip("no build/transformers-tests: run make test-transformers", allow_module_level=True)

sys.path += [str(FOLDER / "tests"), str(FOLDER / "packages")]
fetched = types.ModuleType("fetch_hub_objects_for_ci")
"""Stands in for the module of their repository that turns addresses of test files into paths."""
PICTURE = ROOT / "build" / "coco_sample.png"
if not PICTURE.exists():
    Image.effect_noise((64, 48), 90).convert("RGB").save(PICTURE)
fetched.url_to_local_path = lambda url: str(PICTURE)
sys.modules.setdefault("fetch_hub_objects_for_ci", fetched)

from test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin  # noqa: E402
from test_processing_common import ProcessorTesterMixin  # noqa: E402

from tokenflex.corpus.tokenizer import build_tokenizer  # noqa: E402
from tokenflex.model import TokenFlexImageProcessor, TokenFlexProcessor  # noqa: E402

SKIPPED = {
    "test_call_arguments_not_in_attributes": "num_visual_tokens is an argument of the call and of the processor: the count per "
    "call over a default is what this model is for",
    "test_apply_chat_template_assistant_mask": "the mask is what training learns, from the end of the generation prompt to the "
    "token that ends the turn, whatever {% generation %} marks (tests/model/test_processing.py)",
    "test_call_numpy_4_channels": "alpha is laid on white, as in training, whatever mean and deviation are given",
}
"""Their tests that ours does not pass, and why."""


def without_skipped(tests):
    """The class of tests without those that are listed with a reason."""
    for name in SKIPPED:
        if hasattr(tests, name):
            setattr(tests, name, unittest.skip(SKIPPED[name])(getattr(tests, name)))
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
