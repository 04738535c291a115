"""Every kind of part that transformers has, built tiny: language models and vision encoders, by their own classes.

Nothing is picked: the types come from transformers' own mappings. A type's default configuration is shrunk by the names of its
sizes; what one kind needs beside that stands in `TEXT` and `VISION`, with the reason.
"""

import inspect

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_MAPPING, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from tokenflex.errors import UserError
from tokenflex.model import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.model.attention import PACKED, register_packed_attention
from tokenflex.model.probe import PART_ERRORS, critical_lengths, probe
from tokenflex.model.vision import is_hierarchical

WINDOW = 8

SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "d_embed", "word_embed_proj_dim", "attention_hidden_size", "lru_width", "d_inner", "kv_channels"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "decoder_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "qk_nope_head_dim", "v_head_dim", "dim_head", "d_kv", "global_head_dim", "index_head_dim"), 16),
    "qk_head_dim": 24, **dict.fromkeys(("rotary_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "feedforward_size", "dim_ff", "dff", "mlp_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size", "shared_intermediate_size", "dense_intermediate_size", "intermediate_size_mlp", "ffn_intermediate_size", "hidden_size_per_layer_input"), 96),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts", "num_moe_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_selected_experts", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "first_k_dense_replace": 1, "num_dense_layers": 1, "vocab_size": 300, "vocab_size_per_layer_input": 300, "max_position_embeddings": 256,
    "max_seq_len": 256, "n_positions": 256, "max_target_positions": 256,
    "depth": 2, "out_hidden_size": 64, "sliding_window": WINDOW, "use_sliding_window": True, "attention_chunk_size": WINDOW, "max_window_layers": 0,
    "attn_logit_softcapping": 2.0, "attention_window_size": WINDOW, "index_topk": 4,
    "mamba_d_state": 16, "state_size": 16, "ssm_state_size": 16, "mamba_expand": 2, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "n_mamba_heads": 2, "mamba_n_groups": 1, "n_groups": 1, "mamba_dt_rank": 8, "mamba_chunk_size": 8, "chunk_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "is_decoder": True, "attention_dropout": 0.0,
}  # fmt: skip
"""Names of sizes over all configurations of transformers, and what they are here; windows that samples exceed."""

IMAGE = {"image_size": 128, "patch_size": 8, "num_channels": 3, "in_channels": 3, "in_chans": 3, "num_patches": 256}

TEXT = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "falcon_h1": {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xlm": {"emb_dim": 64, "n_words": 300},
    "xmod": {"default_language": "en_XX"},
    "longcat_flash": {"head_dim": 8, "num_layers": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 1, "index_local_blocks": 1},
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2, "altup_num_inputs": 2, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4},
    "git": {"vision_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 48, "patch_size": 8}},
}  # fmt: skip
VISION = {}

PLAIN_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 48,
    "patch_size": 8,
}
PLAIN_TEXT = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 300,
}
"""What the other part is while one is tried."""

MAX_PARAMETERS = 60_000_000


def shrunk(config_class, sizes, extra=()):
    """The class's default configuration with every size it has from `sizes`."""
    known = set(inspect.signature(config_class.__init__).parameters) | set(getattr(config_class, "__annotations__", ()))
    for base in config_class.__mro__[1:]:
        known |= set(getattr(base, "__annotations__", ()))
    default = config_class()
    names = {name for name in sizes if name in known and _global(default, name) is not None}
    if isinstance(_global(default, "depths"), (list, tuple)):  # widths and heads grow from stage to stage
        names -= {"embed_dim", "hidden_size", "embedding_size"}
    names -= {name for name in names if isinstance(_global(default, name), (list, tuple)) and name != "image_size"}
    names |= {name for name in ("sliding_window", "head_dim", "num_key_value_heads") if name in known & set(sizes)}
    options = {name: sizes[name] for name in names}
    if (
        "qk_rope_head_dim" in known
    ):  # latent attention: the rotated part has a width of its own, and every head its own keys
        options.pop("head_dim", None)
        options["num_key_value_heads"] = sizes["num_attention_heads"]
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if name in known:
            options[name] = 0
    options.update(_layer_kinds(default, known))
    options.update(extra)
    if isinstance(_global(default, "image_size"), (list, tuple)) and "image_size" in options:
        options["image_size"] = [options["image_size"]] * 2
        if isinstance(_global(default, "patch_size"), (list, tuple)):
            options["patch_size"] = [sizes["patch_size"]] * 2
    return config_class(**options)


def _global(config, name):
    """A configuration's value, also where single layers may have another one."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return getattr(config.per_layer_config[0], name, None)


def _layer_kinds(default, known):
    """One layer of every kind that the default configuration has."""
    options = {}
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        kinds = getattr(default, name, None)
        if name in known and kinds:
            options[name] = sorted(set(kinds))
    number = max([2, *(len(kinds) for kinds in options.values())])
    for name, kinds in options.items():
        options[name] = (kinds * number)[:number]
    if options:
        options["num_hidden_layers"] = number
    return options


def text_types():
    """Every type that transformers builds as a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def vision_types():
    """Every type that transformers builds as a model of images alone."""
    types = []
    for model_type in sorted(MODEL_MAPPING_NAMES):
        try:
            model_class = MODEL_MAPPING[CONFIG_MAPPING[model_type]]
            model_class = model_class[0] if isinstance(model_class, tuple) else model_class
            arguments = set(inspect.signature(model_class.forward).parameters)
        except (ImportError, ValueError, KeyError):  # needs a package for sound, or has no such model
            continue
        sees = model_class.main_input_name == "pixel_values" or "pixel_values" in arguments or "grid_thw" in arguments
        if sees and not arguments & {"input_ids", "inference_session", "input_features"}:
            types.append(model_type)
    return types


def text_config(model_type, window=WINDOW):
    sizes = {name: window if size == WINDOW and "window" in name else size for name, size in SIZES.items()}
    return shrunk(CONFIG_MAPPING[model_type], {**sizes, "attention_chunk_size": window}, TEXT.get(model_type, {}))


def vision_config(model_type):
    """Built for images of 128 x 128, or of 256 x 256 where a map that shrinks needs room to tell places apart."""
    sizes, extra = {**SIZES, **IMAGE}, VISION.get(model_type, {})
    config = shrunk(CONFIG_MAPPING[model_type], sizes, extra)
    return shrunk(type(config), {**sizes, "image_size": 256}, extra) if is_hierarchical(config) else config


def build(vision, text, size, part):
    """A tiny model of two configurations (dicts with `model_type` are made into one), with weights that show what is wrong.

    Raises:
        ValueError: `part` ("vision" or "text") stays too large to try.
    """
    register_packed_attention()
    config = TokenFlexConfig(vision, text, image_height=size[0], image_width=size[1], trained_num_visual_tokens=(4, 12))
    auto, own = (AutoModel, config.vision_config) if part == "vision" else (AutoModelForCausalLM, config.text_config)
    with torch.device("meta"):
        number = sum(parameter.numel() for parameter in auto.from_config(own).parameters())
    if number > MAX_PARAMETERS:
        raise ValueError(f"{number / 1e6:.0f} million parameters at the sizes known here")
    torch.manual_seed(0)
    model = sharpened(TokenFlexForConditionalGeneration(config))
    model.language_model.set_attn_implementation(PACKED)
    return model.train()


def try_text(model_type):
    """What becomes of a language model: `equal`, `refused: why`, or `not tried: why`."""
    try:
        config = text_config(model_type)
        inner = getattr(config, "text_config", None)
        if inner is not None:
            return f"its text part is: {inner.model_type}"
        model = build(PLAIN_VISION, config, (48, 64), "text")
    except (*PART_ERRORS, StrictDataclassError) as error:
        return f"not tried: {_short(error)}"
    result = _probed(model)
    if result == "equal" or not critical_lengths(config):
        return result
    wide = _probed(build(PLAIN_VISION, text_config(model_type, window=4096), (48, 64), "text"))
    return f"equal within its window, beyond it {result}" if wide == "equal" else wide


def try_vision(model_type):
    """What becomes of a vision encoder at its own size and at another: `equal`, `refused: why`, or `not tried: why`."""
    results = []
    try:
        side = (
            256 if is_hierarchical(vision_config(model_type)) else 128
        )  # a map that shrinks needs room to tell places apart
    except (*PART_ERRORS, StrictDataclassError) as error:
        return f"not tried: {_short(error)}"
    for size in ((side, side), (side, side * 3 // 2)):
        config = vision_config(model_type)
        try:
            model = build(config, PLAIN_TEXT, size, "vision")
        except (*PART_ERRORS, StrictDataclassError) as error:
            results.append(f"{'refused' if 'choose another' in str(error) else 'not tried'}: {_short(error)}")
        else:
            results.append(_probed(model))
    if results[0] == "equal" != results[1]:
        return f"equal at its own size, at another {results[1]}"
    return results[0]


def _probed(model):
    try:
        probe(model, model, torch.device("cpu"), pack_length=640)
    except UserError as error:
        return f"refused: {str(error).split('; docs/models.md')[0].split(': ', 1)[1]}"
    return "equal"


def _short(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"


def sharpened(model, seed=0):
    """`model` with weights large enough that attention is far from uniform, so that nothing wrong hides in small numbers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 * fan_in**-0.5)
            elif "sink" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model
