"""What an exported model generates by: the language model's own settings, and every token that ends a turn."""

import copy
from typing import TYPE_CHECKING

from transformers import AutoConfig, GenerationConfig

from .hub import hub_options
from .processing_tokenflex import TokenFlexProcessor

if TYPE_CHECKING:
    from ..config import ModelConfig


def greedy(settings: GenerationConfig) -> GenerationConfig:
    """`settings` for the likeliest answer: its end tokens, and nothing that samples or punishes repetition."""
    plain = copy.deepcopy(settings)
    plain.update(do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
    plain.update(repetition_penalty=None)
    return plain


def generation_settings(model: "ModelConfig", processor: TokenFlexProcessor) -> GenerationConfig:
    """The `GenerationConfig` of a run's model.

    Sampling settings and end tokens are the language model's own (of `model.init_from` or `model.text`, where these are
    pretrained); what ends a turn in training, and the tokenizer's end token, end generation too.

    Args:
        model: the configuration's section.
        processor: of the run; its chat template says what ends a turn.
    """
    source = model.init_from or (model.text if isinstance(model.text, str) else "")
    settings = _of_pretrained(source, model.trust_remote_code) if source else GenerationConfig()
    own = settings.eos_token_id
    ends = [*(own if isinstance(own, list) else [own]), processor.turn_end_id(), processor.tokenizer.eos_token_id]
    ends = list(dict.fromkeys(int(token) for token in ends if token is not None))
    pad = processor.tokenizer.pad_token_id
    settings.update(
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=pad if pad is not None else next(iter(ends), None),
        bos_token_id=processor.tokenizer.bos_token_id,
    )
    return settings


def _of_pretrained(source, trust_remote_code):
    """A folder's or hub id's own settings; those of its configuration where it has no generation_config.json.

    Sampling settings of a model that does not sample have no effect, and transformers refuses to write them: they go.
    """
    hub = hub_options("model.init_from or model.text", source)
    try:
        settings = GenerationConfig.from_pretrained(source, **hub)
    except OSError:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **hub)
        settings = GenerationConfig(eos_token_id=config.get_text_config().eos_token_id)
    if not settings.do_sample:
        settings.update(temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
    return settings
