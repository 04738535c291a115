"""transformers' own model mixin over the exported classes at tiny size; `make test-transformers` fetches and runs it."""

import sys
import unittest
from pathlib import Path

import torch

BUILD = Path(__file__).parents[2] / "build"
sys.path[:0] = [str(BUILD / "transformers_tests"), str(BUILD / "test_packages")]

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from tokenflex.model import TokenFlexConfig, TokenFlexForConditionalGeneration, TokenFlexModel  # noqa: E402

# what their tests look classes up in
modeling_auto.MODEL_MAPPING_NAMES["tokenflex"] = "TokenFlexModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["tokenflex"] = "TokenFlexForConditionalGeneration"

SKIPPED = {
    "test_correct_missing_keys": "the base model holds the output layer too, so nothing is missing from its weights",
}
"""Tests of the mixin that do not fit, and why; docs/models.md has the same table."""


class Tester:
    """Builds what the mixin asks for: a tiny configuration and a batch of two prompts with one image each."""

    is_training = True
    batch_size, seq_length, num_visual_tokens = 2, 9, 4

    def __init__(self, parent):
        self.parent = parent
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads, self.vocab_size = 32, 2, 4, 99

    def get_config(self):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        vision = {
            "model_type": "siglip_vision_model",
            **sizes,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        }
        text = {
            "model_type": "qwen2",
            **sizes,
            "num_key_value_heads": 2,
            "vocab_size": 99,
            "max_position_embeddings": 64,
        }
        text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = TokenFlexConfig(
            vision,
            text,
            image_height=32,
            image_width=32,
            image_start_token_id=3,
            image_token_id=4,
            image_end_token_id=5,
            trained_num_visual_tokens=(4,),
        )
        config.use_cache = True  # one of their tests looks for it here, the others in the text configuration
        return config

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        ids = ids_tensor([self.batch_size, self.seq_length], 90) % 90 + 8
        ids[:, 1], ids[:, 2:6], ids[:, 6] = 3, 4, 5
        mask = torch.ones_like(ids)
        ids[0, 0], mask[0, 0] = config.text_config.pad_token_id, 0
        pixels = floats_tensor([self.batch_size, 3, 32, 32])
        return config, {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask}


class TokenFlexModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (TokenFlexModel, TokenFlexForConditionalGeneration)
    pipeline_model_mapping = {}
    test_resize_embeddings = True
    test_can_init_all_missing_weights_before_2023 = True  # theirs goes by the year in the head of the file
    _is_composite = True

    def setUp(self):
        if self._testMethodName in SKIPPED:
            self.skipTest(f"own: `{self._testMethodName}`: {SKIPPED[self._testMethodName]}")
        self.model_tester = Tester(self)
        if "training" in self._testMethodName:  # the base model has no loss
            self.all_model_classes = (TokenFlexForConditionalGeneration,)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        return {**inputs, "labels": inputs["input_ids"]} if return_labels else inputs


del ModelTesterMixin, GenerationTesterMixin
