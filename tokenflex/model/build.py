"""From the configuration's model section to a model and its processor: pretrained parts, parts from scratch, or both."""

import contextlib
import difflib
import functools
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import UserError
from .adapters import MODULES, add_adapters
from .attention import PACKED, register_packed_attention
from .configuration_tokenflex import TokenFlexConfig
from .generation import generation_settings
from .grow import grow_vocabulary
from .hub import hub_options
from .image_processing_tokenflex import TokenFlexImageProcessor
from .int8 import hold_in_int8
from .liger import apply_liger
from .modeling_tokenflex import TokenFlexForConditionalGeneration
from .pooling import sides_of
from .processing_tokenflex import TokenFlexProcessor, default_template, missing_tokens
from .template import check_template
from .vision import patch_grid

if (
    TYPE_CHECKING
):  # recipes need pydantic; exported code, and the GPU tests on a bare machine, read this package without
    from ..config import BudgetConfig, ModelConfig

HOUSEKEEPING = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
"""What a configuration file holds beside the model's own settings."""
MIN_TOKENS = 16
"""No tokenizer has fewer."""
TOWER_KEYS = {"internvl_vision": {r"^(model\.)?vision_tower\.": ""}}
"""Of an encoder that lies in whole vision-language models: type -> what its weights' names there become."""
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, StrictDataclassError)


def build_processor(model: "ModelConfig", budget: "BudgetConfig") -> TokenFlexProcessor:
    """Tokenizer and image processor of a run.

    Args:
        model, budget: the configuration's sections.

    Raises:
        UserError: no tokenizer, or one without chat template or image tokens; or counts that `resize` cannot pool to.
    """
    source = model.tokenizer or model.init_from or (model.text if isinstance(model.text, str) else "")
    if not source:
        raise UserError(
            "model.tokenizer: empty, and the language model is built from scratch; name a tokenizer's folder or hub id"
        )
    tokenizer = _load(
        "model.tokenizer",
        source,
        lambda **hub: AutoTokenizer.from_pretrained(source, trust_remote_code=model.trust_remote_code, **hub),
    )
    template = _template(model.chat_template, tokenizer, source)
    _check_image_tokens(model.image_tokens, tokenizer)
    _add_image_tokens(model, tokenizer, source)
    grid = _grid(vision_config(model), model.image_size)
    check_counts(budget.num_visual_tokens, grid, model.pooling_mode, "budget.num_visual_tokens")
    _check_share(model, budget)
    start, token, end = model.image_tokens
    processor = TokenFlexProcessor(
        _image_processor(model, budget.sides),
        tokenizer,
        chat_template=template,
        chat_template_options=model.chat_template_options,
        num_visual_tokens=max(budget.num_visual_tokens),
        trained_num_visual_tokens=sorted(budget.num_visual_tokens),
        total_visual_tokens=budget.total,
        share=budget.share,
        patch_grid=grid,
        image_start_token=start,
        image_token=token,
        image_end_token=end,
        frames_per_second=model.frames_per_second,
        max_frames=model.max_frames,
    )
    check_template(processor)
    if processor.turn_end_id() in tokenizer.convert_tokens_to_ids(list(model.image_tokens)):
        raise UserError(
            f"model.image_tokens {list(model.image_tokens)}: one of them ends a turn in the template; name others"
        )
    return processor


def _add_image_tokens(model, tokenizer, source):
    missing = missing_tokens(tokenizer, model.image_tokens)
    if missing and not model.add_image_tokens:
        raise UserError(
            f"model.tokenizer {source}: lacks the image tokens {missing}; name three special tokens it has in model.image_tokens, "
            "or set model.add_image_tokens=true"
        )
    if missing:
        tokenizer.add_special_tokens({"additional_special_tokens": missing})


def _check_share(model, budget):
    if budget.share == "size" and model.max_tiles > 1:
        raise UserError(
            f"budget.share=size with model.max_tiles={model.max_tiles}: a larger image has more tiles already; set share to even, or max_tiles to 1"
        )


def _image_processor(model, sides):
    height, width = model.image_size
    return TokenFlexImageProcessor(
        height,
        width,
        model.image_mean,
        model.image_std,
        max_tiles=model.max_tiles,
        thumbnail=model.thumbnail,
        sides=sides,
    )


def _check_image_tokens(tokens, tokenizer):
    """That the image tokens are three, and mean nothing else.

    Raises:
        UserError: one is empty, twice there, or what begins, ends or fills a text.
    """
    used = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    for token in tokens:
        other = next((name for name, value in used.items() if value == token), None)
        if not token.strip() or tokens.count(token) > 1 or other:
            what = f"is the tokenizer's {other}" if other else "is empty" if not token.strip() else "is there twice"
            raise UserError(
                f"model.image_tokens: {token!r} {what}; name three tokens of their own, for begin, place and end"
            )


def _template(name, tokenizer, source):
    """The text of the chat template: the tokenizer's only one, its default, the one of this name, or that of a file.

    Raises:
        UserError: there is none, or none of this name.
    """
    named = tokenizer.chat_template
    if not name:
        if not named:
            raise UserError(
                f"model.tokenizer {source}: has no chat template; name an instruction-tuned model's tokenizer"
            )
        try:
            return default_template(named)
        except ValueError as error:
            raise UserError(f"model.tokenizer {source}: {error} with model.chat_template") from None
    if isinstance(named, dict) and name in named:
        return named[name]
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        known = (
            f"its templates are {', '.join(sorted(named))}" if isinstance(named, dict) else "it has one template only"
        )
        raise UserError(
            f"model.chat_template {name}: neither a file nor a template of the tokenizer {source}; {known}: leave it empty for its own"
        ) from None


def build_model(
    model: "ModelConfig",
    budget: "BudgetConfig",
    processor: ProcessorMixin,
    dtype: torch.dtype,
    loading: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    gathered: Callable[[Iterable[torch.nn.Parameter]], AbstractContextManager] = contextlib.nullcontext,
) -> TokenFlexForConditionalGeneration:
    """The model of a run, in training mode with packed attention.

    Pretrained parts are loaded within `loading()`, which may shard them as they come; within `gathered(parameters)` they are
    whole again. Every weight must be found in the checkpoint. Parts from scratch are built whole: their start must be the same
    on any number of ranks. `num_added_tokens` of what is returned says how many rows its embedding has grown by.

    Raises:
        UserError: a part that cannot be loaded, or that lacks weights; `model.liger=on` where it cannot be.
    """
    register_packed_attention()
    if model.init_from:
        built = _load("model.init_from", model.init_from, lambda **hub: _initialised_from(model, dtype, loading, hub))
    else:
        built = _composed(model, budget, processor, dtype, loading)
    built.projector.backend = model.projector_backend
    built.config.trained_num_visual_tokens = sorted(budget.num_visual_tokens)
    built.config.default_num_visual_tokens = max(budget.num_visual_tokens)
    built.config.sides = budget.sides
    built.config.share = budget.share
    built.generation_config = generation_settings(model, processor)
    try:
        built.num_added_tokens = grow_vocabulary(built.language_model, len(processor.tokenizer), gathered)
    except ValueError as error:
        raise UserError(f"model.text: {error}") from None
    built.config.text_config.vocab_size = built.get_input_embeddings().num_embeddings
    built.language_model.set_attn_implementation(PACKED)
    apply_liger(built.language_model, model.liger)
    add_adapters(built, model)
    _hold_in_int8(built, model)
    if model.gradient_checkpointing:
        recompute_activations(built)
    return built


def recompute_activations(model: PreTrainedModel) -> None:
    """Let each layer of a model hold its inputs alone and run again in the backward pass.

    transformers would besides let the outputs of all embeddings ask for gradients, which only reentrant checkpointing needs: a frozen
    encoder would then have a backward pass, for nothing.
    """
    # its name up to transformers 5.22 is deprecated since
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.disable_input_require_grads()


def vision_config(model: "ModelConfig") -> PretrainedConfig:
    """The vision encoder's configuration object, without its pooling head."""
    if model.init_from:
        return _load(
            "model.init_from", model.init_from, lambda **hub: TokenFlexConfig.from_pretrained(model.init_from, **hub)
        ).vision_config
    config = _part_config("model.vision", model.vision, model.trust_remote_code)
    config = getattr(config, "vision_config", config)  # a dual encoder such as SigLIP or CLIP
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    return config


def shaped_model(model: "ModelConfig", budget: "BudgetConfig", dtype: torch.dtype) -> TokenFlexForConditionalGeneration:
    """The model of a run on the meta device: every shape and no weight, from the parts' configurations alone.

    As `build_model` leaves it, but for Liger's kernels and the fused projector, which change no shape. Where the tokenizer is not
    at hand, the embedding has the rows of the language model's configuration.

    Raises:
        UserError: a part whose configuration is not at hand or cannot be read.
    """
    register_packed_attention()
    if model.init_from:
        config = _load(
            "model.init_from", model.init_from, lambda **hub: TokenFlexConfig.from_pretrained(model.init_from, **hub)
        )
        config.router = None
        _check_same_model(model, config)
        num_tokens = tokenizer_size(model)
    else:
        for key, part in (("model.vision", model.vision), ("model.text", model.text)):
            _check_at_hand(key, part, model.trust_remote_code)
        num_tokens = tokenizer_size(model)
        config = _composed_config(model, budget, num_tokens, dtype)
    with torch.device("meta"):
        built = _made("model", config.text_config.model_type, lambda: TokenFlexForConditionalGeneration(config))
    built.projector.backend = "reference"
    try:
        grow_vocabulary(built.language_model, num_tokens)
    except ValueError as error:
        raise UserError(f"model.text: {error}") from None
    built.language_model.set_attn_implementation(PACKED)
    with torch.device("meta"):
        add_adapters(built, model)
    built.to(dtype)
    _hold_in_int8(built, model)
    return built


def _hold_in_int8(built, model):
    """Hold the frozen parts that a recipe says so of in 8 bit; their adapters are there, and stay as they are."""
    for part, module in MODULES.items():
        if getattr(model, f"{part}_frozen_dtype") == "int8":
            hold_in_int8(getattr(built, module), f"model.{part}_frozen_dtype")


def _check_at_hand(key, part, trust_remote_code):
    """That the configuration of a part can be read, before anything else is asked for.

    Raises:
        UserError: it cannot; the message says what is missing.
    """
    try:
        _part_config(key, part, trust_remote_code)
    except UserError as error:
        if not isinstance(part, str) or Path(part).exists():
            raise
        raise UserError(
            f"{key} {part}: its config.json is neither in the cache nor to be had from the hub; put that file into a folder and name "
            f"the folder in its place ({key}=FOLDER)"
        ) from error


def tokenizer_size(model: "ModelConfig") -> int:
    """How many tokens the tokenizer of a run has with its image tokens; 0 where it is not at hand."""
    source = model.tokenizer or model.init_from or (model.text if isinstance(model.text, str) else "")
    try:
        hub = hub_options("model.tokenizer", source) if source else {}
        load = functools.partial(AutoTokenizer.from_pretrained, trust_remote_code=model.trust_remote_code)
        tokenizer = load(source, **hub) if source else []
    except (*LOADING_ERRORS, UserError):
        return 0
    if len(tokenizer) < MIN_TOKENS:  # transformers makes an empty one of a folder without its files
        return 0
    missing = missing_tokens(tokenizer, model.image_tokens) if model.add_image_tokens else []
    return len(tokenizer) + len(missing)


def _composed_config(model, budget, num_tokens, dtype, **token_ids):
    """The configuration of a model of two parts; a language model from scratch has a row for each of `num_tokens`."""
    vision, text = vision_config(model), _part_config("model.text", model.text, model.trust_remote_code)
    text = getattr(text, "text_config", text)
    if isinstance(model.text, dict) and type(text) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"model.text: {text.model_type} is no causal language model of transformers; choose another")
    if isinstance(model.text, dict):
        text.vocab_size = max(model.text.get("vocab_size", 0), num_tokens) or text.vocab_size
    height, width = model.image_size
    return TokenFlexConfig(
        vision,
        text,
        image_height=height,
        image_width=width,
        pooling_mode=model.pooling_mode,
        pooling_detail=model.pooling_detail,
        projector_multiplier=model.projector_multiplier,
        vision_position_embedding=model.vision_position_embedding,
        vision_feature_layer=model.vision_feature_layer,
        trained_num_visual_tokens=budget.num_visual_tokens,
        sides=budget.sides,
        share=budget.share,
        dtype=dtype,
        **token_ids,
    )


def _composed(model, budget, processor, dtype, loading):
    ids = {name: getattr(processor, name) for name in ("image_start_token_id", "image_token_id", "image_end_token_id")}
    config = _composed_config(model, budget, len(processor.tokenizer), dtype, **ids)
    vision, text = config.vision_config, config.text_config
    text.bos_token_id, text.eos_token_id = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    text.pad_token_id = processor.tokenizer.pad_token_id
    tower = language = None
    if isinstance(model.vision, str):
        tower = _pretrained("model.vision", AutoModel, vision, dtype, model, loading)
    if isinstance(model.text, str):
        language = _pretrained("model.text", AutoModelForCausalLM, text, dtype, model, loading)
    try:
        return TokenFlexForConditionalGeneration(config, vision_tower=tower, language_model=language).to(dtype)
    except (
        *LOADING_ERRORS,
        ArithmeticError,
        RuntimeError,
        AssertionError,
    ) as error:  # sizes that no class checks by itself
        parts = " and ".join(f"model.{part}" for part in ("vision", "text") if isinstance(getattr(model, part), dict))
        raise UserError(
            f"{parts or 'model'}: cannot be built with these values ({type(error).__name__}: {_brief(error)})"
        ) from error


def _initialised_from(model, dtype, loading, hub):
    with loading():
        built, info = TokenFlexForConditionalGeneration.from_pretrained(
            model.init_from, dtype=dtype, output_loading_info=True, router=None, **hub
        )  # a router knows the losses of the model as it was: one is trained anew when this one is
    _check_complete("model.init_from", model.init_from, info)
    _check_same_model(model, built.config)
    return built


def _check_same_model(model, config):
    """That a recipe says of a model that it goes on from what the model is; the processor is made of the recipe.

    Raises:
        UserError: it says something else; the key and both values are named.
    """
    has = {
        "image_size": (config.image_height, config.image_width),
        "pooling_mode": config.pooling_mode,
        "pooling_detail": config.pooling_detail,
        "projector_multiplier": config.projector_multiplier,
        "vision_position_embedding": config.vision_position_embedding,
        "vision_feature_layer": config.vision_feature_layer,
    }
    for key, value in has.items():
        if getattr(model, key) != value:
            shown = list(value) if isinstance(value, tuple) else value
            raise UserError(
                f"model.{key}={getattr(model, key)}: the model of model.init_from={model.init_from} has {shown}; set model.{key}={shown}, "
                "or build the model of its parts (model.vision, model.text)"
            )


def _pretrained(key, auto_class, config, dtype, model, loading):
    source = getattr(model, key.removeprefix("model."))
    options = {
        "config": config,
        "dtype": dtype,
        "trust_remote_code": model.trust_remote_code,
        **hub_options(key, source),
    }
    if config.model_type in TOWER_KEYS:
        options["key_mapping"] = TOWER_KEYS[config.model_type]
    load = functools.partial(auto_class.from_pretrained, source, output_loading_info=True, **options)
    try:
        with loading():
            part, info = load()
    except TypeError:
        # A constructor that calls `torch.Tensor(values)`, as BiT's does, cannot run where DeepSpeed has replaced that
        # constructor in order to shard parameters as they come: such a part is loaded whole and sharded afterwards.
        part, info = _made(key, source, load)
    except LOADING_ERRORS as error:
        raise _loading_error(key, source, error) from error
    _check_complete(key, source, info)
    return part


def _check_complete(key, source, info):
    """A weight that the checkpoint lacks would silently keep its random start.

    Raises:
        UserError: weights are missing or have another shape.
    """
    missing = sorted(info["missing_keys"]) + sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"{key} {source}: {len(missing)} weights are missing or of another shape, first {missing[0]}; is it the right checkpoint?"
        )


_SHARE = re.compile(r"drop|_prob$")
_SIZE = re.compile(r"(_size|_dim|_layers|_heads|_channels|_embd|_layer|_head|_inner|_eps|_epsilon)$")
_SCALES = ("initializer_range", "rope_theta")


def _part_config(key, part, trust_remote_code):
    if isinstance(part, str):
        return _load(
            key, part, lambda **hub: AutoConfig.from_pretrained(part, trust_remote_code=trust_remote_code, **hub)
        )
    values = dict(part)
    model_type = values.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{key}: model_type is {model_type!r}; wanted a model type of transformers, for example siglip_vision_model or qwen3"
        )
    make = CONFIG_MAPPING[model_type]
    config = _made(key, model_type, lambda: make(**values))
    default = make()
    known = {*default.to_dict(), *_signature(config), *getattr(config, "attribute_map", {}), *HOUSEKEEPING}
    for name in values:
        if isinstance(vars(config).get(name), PretrainedConfig):
            _check_inner(f"{key}.{name}", vars(config)[name], vars(default).get(name))
        elif name not in known:
            # older names of a setting change another one; a name that is not known is kept, and nobody would read it
            others = {other: value for other, value in values.items() if other != name}
            without = _made(key, model_type, lambda: make(**others))  # noqa: B023
            if _without(name, config.to_dict(), without.to_dict()) == without.to_dict():
                raise _unknown_name(key, name, config)
    _check_values(key, values, default.to_dict())
    return config


def _without(name, values, others):
    """`values` less `name`, wherever `others` has none: a configuration may hand what it does not know to those within it."""
    return {
        key: _without(name, value, others[key])
        if isinstance(value, dict) and isinstance(others.get(key), dict)
        else value
        for key, value in values.items()
        if key != name or key in others
    }


def _check_values(key, values, defaults):
    """Whether the numbers that a part is given can be what their names say; transformers looks at their types alone.

    Raises:
        UserError: one cannot.
    """
    for name, value in values.items():
        default = defaults.get(name)
        if isinstance(value, Mapping):
            _check_values(f"{key}.{name}", value, default if isinstance(default, Mapping) else {})
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            has_number = isinstance(default, (int, float))
            if not math.isfinite(value):
                wanted = "a finite number"
            elif _SHARE.search(str(name)) and not (has_number and default > 1):
                wanted = "" if 0 <= value < 1 else "a share from 0 up to, but not, 1"
            elif (_SIZE.search(str(name)) or name in _SCALES) and not (has_number and default <= 0):
                wanted = "" if value > 0 else "a number above 0"
            else:
                is_count = isinstance(default, int) and default > 0 and not str(name).endswith("_token_id")
                wanted = "" if value >= 0 or not is_count else "no number below 0"
            if wanted:
                raise UserError(f"{key}.{name} is {value}; wanted {wanted}")


def _check_inner(key, config, default):
    """Whether a configuration within a part's knows every name that it is given.

    Raises:
        UserError: it does not; the nearest is named.
    """
    known = {*type(config)().to_dict(), *_signature(config), *HOUSEKEEPING, *(default.to_dict() if default else ())}
    unknown = next((name for name in config.to_diff_dict() if name not in known), None)
    if unknown is not None:
        raise _unknown_name(key, unknown, config)


def _signature(config):
    return inspect.signature(type(config).__init__).parameters.keys() - {"self", "kwargs"}


def _unknown_name(key, name, config):
    near = difflib.get_close_matches(name, [*type(config)().to_dict(), *_signature(config)], n=1, cutoff=0.4)
    hint = f"did you mean {key}.{near[0]}?" if near else "see transformers' documentation of that class"
    return UserError(f"unknown key {key}.{name}: {type(config).__name__} does not know it; {hint}")


def _load(key, source, load):
    """Run a loader of transformers for a folder or hub id, with what the hub's state asks for.

    Raises:
        UserError: the source does not exist or cannot be used.
    """
    hub = hub_options(key, source)
    return _made(key, source, lambda: load(**hub))


def _made(key, source, make):
    """`make()`; what transformers raises for a bad source becomes one line.

    Raises:
        UserError: the source cannot be used.
    """
    try:
        return make()
    except LOADING_ERRORS as error:
        raise _loading_error(key, source, error) from error


def _loading_error(key, source, error):
    kind = "folder" if Path(source).exists() else "hub id or folder"
    return UserError(f"{key}: {kind} {source} cannot be loaded: {_brief(error)}")


def _brief(error):
    return " ".join(str(error).split())[:300]


def check_counts(counts: Iterable[int], grid: Sequence[int], pooling_mode: str, key: str) -> None:
    """See that pooling gives each of `counts` tokens of its own.

    `resize` averages a grid that was stretched: above the patches there are, tokens would be made up between them.

    Args:
        grid: (rows, columns) of patches. key: of the recipe, that the counts come from.

    Raises:
        UserError: a count above the grid with `resize`.
    """
    for count in counts if pooling_mode == "resize" else ():
        sides = sides_of(count, grid)
        if sides[0] > grid[0] or sides[1] > grid[1]:
            raise UserError(
                f"{key}: {count} visual tokens are {sides[0]} x {sides[1]}, the image has {grid[0]} x {grid[1]} patches, and "
                "model.pooling_mode=resize gives no more; leave the count out, raise model.image_size, or pool adaptive"
            )


def _grid(config, image_size):
    try:
        return patch_grid(config, *image_size)
    except ValueError as error:
        raise UserError(f"model.image_size: {error}") from None
