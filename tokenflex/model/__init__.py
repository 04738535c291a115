"""The model: configuration, modeling and processing in Hugging Face's conventions; they travel with every export."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .build import build_model, build_processor, check_counts
from .configuration_tokenflex import TokenFlexConfig
from .image_processing_tokenflex import TokenFlexImageProcessor
from .modeling_tokenflex import TokenFlexForConditionalGeneration, TokenFlexModel
from .processing_tokenflex import TokenFlexProcessor
from .template import check_template

# Importing this package makes the Auto classes know TokenFLEX; exported models bring the same code with them.
AutoConfig.register("tokenflex", TokenFlexConfig, exist_ok=True)
AutoModelForImageTextToText.register(TokenFlexConfig, TokenFlexForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(TokenFlexConfig, TokenFlexForConditionalGeneration, exist_ok=True)
AutoModel.register(TokenFlexConfig, TokenFlexModel, exist_ok=True)
AutoImageProcessor.register(TokenFlexConfig, slow_image_processor_class=TokenFlexImageProcessor, exist_ok=True)
AutoProcessor.register(TokenFlexConfig, TokenFlexProcessor, exist_ok=True)
for _class, _auto in (
    (TokenFlexConfig, "AutoConfig"),
    (TokenFlexForConditionalGeneration, "AutoModelForImageTextToText"),
    (TokenFlexModel, "AutoModel"),
    (TokenFlexImageProcessor, "AutoImageProcessor"),
    (TokenFlexProcessor, "AutoProcessor"),
):
    _class.register_for_auto_class(_auto)

__all__ = [
    "TokenFlexConfig",
    "TokenFlexForConditionalGeneration",
    "TokenFlexImageProcessor",
    "TokenFlexModel",
    "TokenFlexProcessor",
    "build_model",
    "build_processor",
    "check_counts",
    "check_template",
]
