"""The TokenFLEX model: vision encoder -> pool to N tokens -> SwiGLU projector -> splice -> causal language model.

Travels with every exported model, so it imports nothing but torch, transformers and its siblings. Shape suffixes: B batch
rows, T tokens, V visual tokens, P patches, C vision width, D text width.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .configuration_tokenflex import TokenFlexConfig
from .pooling import tile_sides
from .projector import TokenAdaptiveProjector
from .router import (
    AUTO,
    CountRouter,
    asks_auto,
    check_effort,
    image_summary,
    question_mask,
    question_summary,
)
from .sharing import even_count
from .vision import patch_grid, patch_outputs, patch_width

logger = logging.get_logger(__name__)

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this release of transformers calls the key-value cache, in arguments and outputs; both names are taken."""

EFFORT_STEPS = 32
"""Efforts that are tried at most until a row's images fit a total."""
IMAGE_INPUTS = ("pixel_values", "num_tiles", "tile_sizes", "num_visual_tokens")
"""What says how images are seen; of use until they are in the cache."""


def _cache(past_key_values, cache):
    """The key-value cache under the name that this release knows, by whichever name it came."""
    if CACHE == "cache" and past_key_values is not None:
        warnings.warn("`past_key_values` is deprecated in transformers; use `cache`", FutureWarning, stacklevel=3)
    return {CACHE: past_key_values if cache is None else cache}


class _WithImageOutputs(ModelOutput):
    """Outputs that hold those of the images, which are a tuple too where the whole is one."""

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
class TokenFlexModelOutput(_WithImageOutputs, BaseModelOutputWithPast):
    """`BaseModelOutputWithPast`, with what `get_image_features` gives of the images as `image_outputs`; None while training."""

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class TokenFlexOutput(_WithImageOutputs, CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, with the router loss of a mixture of experts where `output_router_logits` asks for it, and with
    `image_outputs` as `TokenFlexModelOutput` has them."""

    aux_loss: torch.FloatTensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


class _TokenFlexBase(PreTrainedModel):
    """Vision encoder, projector and language model: what is the same up to the last hidden states and with logits."""

    config_class = TokenFlexConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _is_loading = False
    frozen_parts: Sequence[str] = ()

    def __init__(
        self,
        config: TokenFlexConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        """`vision_tower` and `language_model` may be given ready made (pretrained); else they are built from `config`."""
        super().__init__(config)
        # a choice must not hang on the number format
        self._keep_in_fp32_modules_strict = {"router"} if config.router else set()
        self.vision_tower = vision_tower or _built(AutoModel, config.vision_config)
        self.language_model = language_model or _built(AutoModelForCausalLM, config.text_config)
        self.projector = TokenAdaptiveProjector(
            patch_width(config.vision_config),
            config.text_config.hidden_size,
            multiplier=config.projector_multiplier,
            mode=config.pooling_mode,
            detail=config.pooling_detail,
        )
        self.router = self.new_router() if config.router else None
        self._can_compile_fullgraph = self.language_model._can_compile_fullgraph
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers would leave modules that only hold others, such as the projector, without a start."""
        return False

    def _init_weights(self, module):
        """The start of a projector whose weights a checkpoint lacks; one that is built has its start already."""
        if self._is_loading and isinstance(module, TokenAdaptiveProjector):
            module.reset_parameters()
        elif self._is_loading and isinstance(module, CountRouter):
            nn.init.constant_(module.prices, float("nan"))  # it then refuses to choose; where they came, they stay

    def train(self, mode: bool = True) -> "_TokenFlexBase":
        """As of any module, but the parts named in `frozen_parts` stay as at inference: no dropout, and batch normalisation by its
        stored statistics, which do not move. (Of layers that recompute themselves only what is within: they ask for this mode.)"""
        super().train(mode)
        for name in self.frozen_parts:
            for module in getattr(self, name).modules():
                module.training = mode and _recomputes(module)
        return self

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        self._is_loading = True
        # What was found has its start already, and under ZeRO-3 no shape that one could be drawn for.
        for module in self.modules():
            tensors = [*module.parameters(), *module.buffers(recurse=False)]
            if tensors and all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
                module._is_hf_initialized = True
        super()._initialize_missing_keys(*args, **kwargs)
        self._is_loading = False

    @property
    def patch_grid(self) -> tuple[int, int]:
        """(rows, columns) of patches per image."""
        return patch_grid(self.config.vision_config, self.config.image_height, self.config.image_width)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The language model without its output layer."""
        return self.language_model.get_decoder()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        num_visual_tokens: int | tuple[int, int] | list[int | tuple[int, int]] | None = None,
        num_tiles: torch.Tensor | Sequence[int] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        visual_sides: torch.Tensor | None = None,
        *,
        tile_sizes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Visual tokens of images as `pooler_output`: a list with one tensor [n, D] per image, all its tiles together.

        `last_hidden_state` has the encoder's features, [tiles, patches, C]; hidden states and attentions are the encoder's own.
        By default every image gets the largest count. `visual_sides` [tiles, 3] stands for both `num_visual_tokens` and
        `num_tiles`, with a row per tile, for servers that keep images apart: rows, columns, and which tile of its image it is.
        `tile_sizes` as in `forward`.
        """
        options = _asked_of_encoder(
            {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        )
        if visual_sides is not None:
            sides, num_tiles = _sides_of_rows(visual_sides.tolist())
            tiles = _tiles(num_tiles, pixel_values)
            self._warn_of_untrained(sides)
        else:
            tiles = _tiles(num_tiles, pixel_values)
            counts = self.config.default_num_visual_tokens if num_visual_tokens is None else num_visual_tokens
            sides = self._sides(counts, tiles, None, tile_sizes)
        features_PC, visual_VD, outputs = self._visual_tokens(pixel_values, sides, **options)
        return _image_outputs(features_PC.unflatten(0, (len(pixel_values), -1)), visual_VD, sides, tiles, outputs)

    def _visual_tokens(self, pixel_values, sides, pool_plan=None, tile_index=None, **options):
        """Patch features [P, C], visual tokens [V, D] and the encoder's output of tiles [B, 3, H, W], tile b pooled to `sides[b]`
        = (rows, columns); with a `tile_index` [N], tile `tile_index[i]` to `sides[i]`.

        A `pool_plan` says the same to the fused kernels; `sides` may then be None.
        """
        features_PC, grid, outputs = self._features(pixel_values, options)
        to_pool, num_pooled = features_PC, len(pixel_values)
        if tile_index is not None:
            to_pool, num_pooled = features_PC.unflatten(0, (num_pooled, -1))[tile_index].flatten(0, 1), len(tile_index)
        return features_PC, self.projector(to_pool, [grid] * num_pooled, sides, pool_plan), outputs

    def _features(self, pixel_values, options):
        """(patch features [P, C], the grid of a tile, the encoder's output) of pixel values, or of features that are there."""
        config = self.config
        if pixel_values.dim() == 3:
            rows, columns = self.patch_grid
            if pixel_values.shape[1:] != (rows * columns, self.projector.norm.normalized_shape[0]):
                raise ValueError(
                    f"features of {tuple(pixel_values.shape[1:])} came for images; wanted {rows * columns} patches of width "
                    f"{self.projector.norm.normalized_shape[0]}, as encode_images gives them"
                )
            return pixel_values.flatten(0, 1), (rows, columns), ModelOutput()
        layer, position = config.vision_feature_layer, config.vision_position_embedding
        features_PC, outputs = patch_outputs(self.vision_tower, pixel_values, layer, position, **options)
        return features_PC, patch_grid(config.vision_config, *pixel_values.shape[-2:]), outputs

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Patch features [tiles, patches, C] of tiles [tiles, 3, H, W], one pass of the vision encoder.

        They stand for `pixel_values` wherever this model takes those, and are pooled to any count there: several counts,
        questions or turns about an image need the encoder once.
        """
        features_PC, _, _ = self._features(pixel_values, {})
        return features_PC.unflatten(0, (len(pixel_values), -1))

    def new_router(self) -> CountRouter:
        """A router as `config.router` says, untrained."""
        settings, width = self.config.router, patch_width(self.config.vision_config)
        num_features = 2 * width + self.config.text_config.hidden_size
        return CountRouter(num_features, settings["num_visual_tokens"], settings["hidden_size"])

    @torch.no_grad()
    def choose_num_visual_tokens(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_tiles: torch.Tensor | Sequence[int] | None = None,
        effort: float | None = None,
        total_visual_tokens: int | None = None,
    ) -> list[int]:
        """The count that the router chooses for each image of prompts, whatever count the prompts were built with.

        Args:
            input_ids, attention_mask: [B, T], images as runs of placeholders.
            pixel_values: [tiles, 3, H, W], or features of `encode_images`, which are then not made again.
            effort: from 0 (the smallest count) to 1 (the largest); by default what training the router found enough.
            total_visual_tokens: of all images of a row together at most; the effort is then lowered, row by row, until they fit.

        Raises:
            ValueError: no router, one for other counts than the model's, an effort that is none, or a total that holds a row's images
                not even at the smallest count.
        """
        settings, trained = self.config.router, self.config.trained_num_visual_tokens
        if settings is None or self.router is None:
            raise ValueError(
                f"num_visual_tokens='auto' needs a router, and this model has none; train one (tokenflex train-router), or give a "
                f"count, such as {trained[-1]}"
            )
        if not set(settings["num_visual_tokens"]) <= set(trained):
            raise ValueError(
                f"the router chooses among {settings['num_visual_tokens']} visual tokens but the model was trained at {trained}; train a "
                "router for this model (tokenflex train-router)"
            )
        effort = settings["effort"] if effort is None else effort
        check_effort(effort)
        features = self.router_features(input_ids, pixel_values, attention_mask, num_tiles)
        if total_visual_tokens is None:
            return self.router.choose(features, effort)
        tiles = _tiles(num_tiles, pixel_values)
        chosen = [0] * len(tiles)
        rows = [row for row, _, _ in image_runs(input_ids, self.config.image_token_id)]
        for row in set(rows):
            images = [image for image, its in enumerate(rows) if its == row]
            own = self._chosen_within(features[images], [tiles[image] for image in images], effort, total_visual_tokens)
            for image, count in zip(images, own):
                chosen[image] = count
        return chosen

    def _chosen_within(self, features_NF, tiles, effort, total):
        """The router's counts of a row's images at the largest effort, up to `effort`, at which they fit the total."""
        even_count(min(self.router.counts), (), sum(tiles), total)  # or it says why they do not
        for step in range(EFFORT_STEPS, -1, -1):
            counts = self.router.choose(features_NF, effort * step / EFFORT_STEPS)
            if sum(count * number for count, number in zip(counts, tiles)) <= total:
                break
        return counts

    @torch.no_grad()
    def router_features(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        num_tiles: torch.Tensor | Sequence[int] | None = None,
    ) -> torch.Tensor:
        """What the router sees of each image of prompts, [images, F]; arguments as in `choose_num_visual_tokens`."""
        config, tiles = self.config, _tiles(num_tiles, pixel_values)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [row for row, _, _ in image_runs(input_ids, config.image_token_id)]
        if len(rows) != len(tiles):
            raise ValueError(
                f"{len(tiles)} images came with {len(rows)} runs of visual tokens; every image needs one run of its own"
            )
        features = pixel_values
        if features.dim() != 3:
            features = self.encode_images(pixel_values.to(self.vision_tower.dtype))
        is_asked = question_mask(input_ids, mask, _image_ids(config), config.router["turn_end_ids"])
        asked_BD = question_summary(self.get_input_embeddings()(input_ids), is_asked)
        return torch.cat([image_summary(features, tiles), asked_BD[rows]], dim=-1)

    def _embedded(
        self, input_ids, inputs_embeds, pixel_values, num_visual_tokens, num_tiles, visual_positions, is_dummy_image, pool_plan,
        tile_index=None, tile_sizes=None, options=None,
    ):  # fmt: skip
        """Embeddings [B, T, D] with images spliced in, and what `get_image_features` gives of the images, or None.

        See `TokenFlexForConditionalGeneration.forward`; of `options` the encoder gets those that it knows. While training there are
        no outputs of images: nobody reads them, and they would keep the features of a frozen encoder for the backward pass.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is None:
            return inputs_embeds, None
        if input_ids is None and visual_positions is None:
            input_ids = self._ids_of(inputs_embeds)
        tiles = _tiles(num_tiles, pixel_values if tile_index is None else tile_index)
        is_planned = pool_plan is not None and self.config.pooling_detail == "none"
        sides = None if is_planned else self._sides(num_visual_tokens, tiles, input_ids, tile_sizes)
        features_PC, visual_VD, encoded = self._visual_tokens(
            pixel_values.to(inputs_embeds.dtype), sides, pool_plan, tile_index, **_asked_of_encoder(options or {})
        )
        visual_VD = visual_VD.to(inputs_embeds.dtype)
        if is_dummy_image:
            return inputs_embeds + 0.0 * visual_VD.sum(), None
        if visual_positions is None:
            visual_positions = (input_ids.flatten() == self.config.image_token_id).nonzero().squeeze(1)
        spliced = splice(inputs_embeds, visual_VD, visual_positions, self.projector.kernels_for(visual_VD))
        if self.training or sides is None:
            return spliced, None
        features = features_PC.unflatten(0, (len(pixel_values), -1))
        return spliced, _image_outputs(features, visual_VD, sides, tiles, encoded)

    def _ids_of(self, inputs_embeds):
        """Ids in which only the placeholders are right, found by their embedding; whatever else there is becomes -1."""
        token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        is_image = (inputs_embeds == self.get_input_embeddings()(token).to(inputs_embeds.dtype)).all(-1)
        return torch.where(is_image, token, -1)

    def _sides(self, num_visual_tokens, tiles, input_ids, tile_sizes=None):
        """(rows, columns) per tile from whatever the caller gave; `tiles` has the number of them for each image."""
        if num_visual_tokens is None:
            if input_ids is None:
                raise ValueError("pixel_values came without input_ids; give num_visual_tokens, one count per image")
            runs = [length for _, _, length in image_runs(input_ids, self.config.image_token_id)]
            num_visual_tokens = _counts_of_runs(runs, tiles)
        elif isinstance(num_visual_tokens, (int, tuple)):
            num_visual_tokens = [num_visual_tokens] * len(tiles)
        if asks_auto(num_visual_tokens):
            raise ValueError(
                "num_visual_tokens='auto' is for generate; here give the counts that choose_num_visual_tokens answers with"
            )
        if len(num_visual_tokens) != len(tiles):
            raise ValueError(
                f"{len(tiles)} images came with {len(num_visual_tokens)} runs of visual tokens; every image needs one run of "
                "its own between <img> and </img>"
            )
        sizes = iter(self._tile_sizes(tile_sizes, num_visual_tokens, sum(tiles)))
        shaped = [
            tile_sides(count, [next(sizes) for _ in range(number)], self.patch_grid, self.config.sides)
            for count, number in zip(num_visual_tokens, tiles)
        ]
        sides = [side for some in shaped for side in some]
        self._warn_of_untrained(sides)
        return sides

    def _tile_sizes(self, tile_sizes, num_visual_tokens, num_tiles):
        """Height and width of what each tile shows, where sides look at them; (1, 1) where they do not."""
        if self.config.sides == "square" or all(isinstance(count, (tuple, list)) for count in num_visual_tokens):
            return [(1, 1)] * num_tiles
        if tile_sizes is None or len(tile_sizes) != num_tiles:
            came = "none" if tile_sizes is None else len(tile_sizes)
            raise ValueError(
                f"this model shapes visual tokens by the image (sides='aspect'), and of {num_tiles} tiles {came} came with a size; give "
                "the tile_sizes that the processor returned, or num_visual_tokens as (rows, columns)"
            )
        return tile_sizes.tolist()

    def _warn_of_untrained(self, sides):
        for rows, columns in sides:
            # by size, training has counts between the trained ones too
            if rows * columns not in self.config.trained_num_visual_tokens and self.config.share == "even":
                logger.warning_once(
                    f"num_visual_tokens={rows * columns} was not trained (trained: "
                    f"{self.config.trained_num_visual_tokens}); it works, but measure it on your task"
                )


class TokenFlexModel(_TokenFlexBase):
    """The model up to its last hidden states: what AutoModel loads from an export, by the same names.

    The output layer is held, since its weights are among an export's (and often the embedding's), and not run.
    """

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        num_visual_tokens: int | tuple[int, int] | list[int | tuple[int, int]] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_tiles: torch.Tensor | Sequence[int] | None = None,
        cache: Cache | None = None,
        tile_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenFlexModelOutput | tuple:
        """Hidden states [B, T, D] of text with images spliced in; arguments as in `TokenFlexForConditionalGeneration`."""
        embeds, image_outputs = self._embedded(
            input_ids,
            inputs_embeds,
            pixel_values,
            num_visual_tokens,
            num_tiles,
            None,
            False,
            None,
            tile_sizes=tile_sizes,
            options=kwargs,
        )
        outputs = self.language_model.base_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **_cache(past_key_values, cache),
            **kwargs,
        )
        return TokenFlexModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_outputs=image_outputs,
        )


class TokenFlexForConditionalGeneration(_TokenFlexBase, GenerationMixin):
    """Any Hugging Face vision encoder and causal language model, joined by the token-adaptive projector."""

    base_model_prefix = "model"

    @property
    def model(self) -> TokenFlexModel:
        """The same modules as `TokenFlexModel`, for tools that want hidden states and the output layer apart.

        It is a view, not a part: weights keep the one name that checkpoints and exports have for them. Parts, hooks and settings
        are the same objects; a `forward` that a tool has put over this model's is not the view's.
        """
        view = TokenFlexModel.__new__(TokenFlexModel)
        view.__dict__ = {name: value for name, value in self.__dict__.items() if name != "forward"}
        return view

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        num_visual_tokens: int | tuple[int, int] | list[int | tuple[int, int]] | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        visual_positions: torch.Tensor | None = None,
        is_dummy_image: bool = False,
        num_tiles: torch.Tensor | Sequence[int] | None = None,
        pool_plan: object | None = None,
        tile_index: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        shift_labels: torch.Tensor | None = None,
        cache: Cache | None = None,
        tile_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenFlexOutput | tuple:
        """Logits of text with images spliced in where `input_ids` holds `image_token_id`.

        Args:
            input_ids: [B, T]; each image is one run of its visual tokens' placeholders, tile after tile.
            inputs_embeds: [B, T, D] in place of it; placeholders are then found by their embedding.
            pixel_values: [tiles, 3, H, W], in the order of the runs, row by row; or their features, [tiles, patches, C], from
                `encode_images`.
            num_tiles: [images] tiles of each image; by default every image is one tile.
            num_visual_tokens: an int, or one int or (rows, columns) per image (with `num_tiles`) or tile (without); by default
                what the runs' lengths say.
            visual_positions: [V] places of the placeholders in the flattened `input_ids`; found from it by default.
            is_dummy_image: the images belong to no token; they only keep every rank of a ZeRO-3 job in step.
            pool_plan: what `projector.plan_maker` made of the tiles' counts; stands for `num_visual_tokens` and `num_tiles`.
            tile_index: [N] for tiles that come several times, at several counts: which of `pixel_values` each is; the encoder runs
                on each once. `num_visual_tokens` has then N entries.
            tile_sizes: [tiles, 2] height and width of what each tile shows of its image, from the processor, where `config.sides` is
                `aspect`; pairs (rows, columns) need none.
            labels: [B, T] with -100 where nothing is learned; the mean loss of the rest is returned, or with
                `num_items_in_batch` their sum over that number. `shift_labels` are labels that have been shifted already.

        Raises:
            ValueError: placeholders and visual tokens do not match; the message has both numbers.
        """
        embeds, image_outputs = self._embedded(
            input_ids, inputs_embeds, pixel_values, num_visual_tokens, num_tiles, visual_positions, is_dummy_image, pool_plan,
            tile_index, tile_sizes, kwargs,
        )  # fmt: skip
        outputs = self.language_model(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **_cache(past_key_values, cache),
            **kwargs,
        )
        loss, aux_loss = None, outputs.get("aux_loss")
        if labels is not None or shift_labels is not None:
            sums = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels}
            loss = self.loss_function(outputs.logits, labels, vocab_size=outputs.logits.shape[-1], **sums)
            if aux_loss is not None:
                loss = loss + self.config.text_config.router_aux_loss_coef * aux_loss.to(loss.device)
        return TokenFlexOutput(
            loss=loss,
            logits=outputs.logits,
            **{CACHE: outputs.get(CACHE)},  # models whose state is no key-value cache have none
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            aux_loss=aux_loss,
            image_outputs=image_outputs,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        num_visual_tokens: int | tuple[int, int] | str | list[int | tuple[int, int] | str] | None = None,
        effort: float | None = None,
        total_visual_tokens: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | ModelOutput:
        """`transformers` generation with any number of visual tokens.

        `num_visual_tokens` (an int, a pair (rows, columns), `"auto"`, or a list of them, one per image) overrides the counts
        that the prompt was built with. The answer starts with `input_ids` as given, so `output[:, input_ids.shape[1]:]` is
        always the new text. For `"auto"` the router chooses a count by the image and the row's question, at `effort` (see
        `choose_num_visual_tokens`), within `total_visual_tokens` for all images of a row; it becomes a number first, and the vision
        encoder runs once. Without the router the processor shares a total.
        """
        prompt_ids = kwargs.pop("input_ids", inputs)
        num_visual_tokens = self._numbers_for(num_visual_tokens, prompt_ids, kwargs, effort, total_visual_tokens)
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None or num_visual_tokens is None or prompt_ids is None:
            return super().generate(prompt_ids, generation_config, **kwargs)
        mask = kwargs.pop("attention_mask", None)
        mask = torch.ones_like(prompt_ids) if mask is None else mask
        tiles = _tiles(kwargs.get("num_tiles"), pixel_values)
        per_tile = iter(
            rows * columns
            for rows, columns in self._sides(num_visual_tokens, tiles, prompt_ids, kwargs.get("tile_sizes"))
        )
        counts = [sum(next(per_tile) for _ in range(number)) for number in tiles]
        pad = self.generation_config.pad_token_id or 0
        input_ids, mask = resize_image_runs(prompt_ids, mask, counts, self.config.image_token_id, pad)
        is_one = isinstance(num_visual_tokens, (int, tuple))
        per_image = [num_visual_tokens] * len(tiles) if is_one else list(num_visual_tokens)
        options = {"attention_mask": mask, "num_visual_tokens": per_image, **kwargs}
        output = super().generate(input_ids, generation_config, **options)
        sequences = output if torch.is_tensor(output) else output.sequences
        copies = sequences.shape[0] // prompt_ids.shape[0]  # beams or samples returned per prompt
        sequences = torch.cat([prompt_ids.repeat_interleave(copies, 0), sequences[:, input_ids.shape[1] :]], dim=1)
        if torch.is_tensor(output):
            return sequences
        output.sequences = sequences
        return output

    def _numbers_for(self, num_visual_tokens, prompt_ids, kwargs, effort, total):
        """What generation was asked for, with numbers for "auto"; `kwargs` then hold features, so that the encoder runs once."""
        if asks_auto(num_visual_tokens):
            pixels = kwargs.get("pixel_values")
            if pixels is not None and pixels.dim() != 3 and self.router is not None:
                kwargs["pixel_values"] = self.encode_images(pixels.to(self.vision_tower.dtype))
            seen = {name: kwargs.get(name) for name in ("pixel_values", "attention_mask", "num_tiles")}
            return self.resolve_auto(num_visual_tokens, prompt_ids, **seen, effort=effort, total_visual_tokens=total)
        asked = {"effort": effort, "total_visual_tokens": total}
        asked = {name: value for name, value in asked.items() if value is not None}
        if asked:
            named = " and ".join(f"{name}={value!r}" for name, value in asked.items())
            where = "" if total is None else ", or the total to the processor"
            raise ValueError(f"{named}: that is for the router; give num_visual_tokens='auto' with it{where}")
        return num_visual_tokens

    def resolve_auto(
        self,
        num_visual_tokens: str | Sequence[int | tuple[int, int] | str],
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_tiles: torch.Tensor | Sequence[int] | None = None,
        effort: float | None = None,
        *,
        total_visual_tokens: int | None = None,
    ) -> list[int | tuple[int, int]] | None:
        """A count per image, with what the router chooses in place of `"auto"`; None where there are no images.

        Arguments and errors as in `choose_num_visual_tokens`. ValueError also for not as many entries as images.
        """
        if pixel_values is None:
            return None
        if input_ids is None:
            raise ValueError("num_visual_tokens='auto' looks at the question; give input_ids, not inputs_embeds")
        if total_visual_tokens is not None and not isinstance(num_visual_tokens, str):
            raise ValueError(
                f"num_visual_tokens={num_visual_tokens!r} with total_visual_tokens={total_visual_tokens}: the router shares a total among "
                "all images; give 'auto' for all of them, or leave the total out"
            )
        chosen = self.choose_num_visual_tokens(
            input_ids, pixel_values, attention_mask, num_tiles, effort, total_visual_tokens
        )
        asked = [AUTO] * len(chosen) if isinstance(num_visual_tokens, str) else num_visual_tokens
        if len(asked) != len(chosen):
            raise ValueError(f"num_visual_tokens has {len(asked)} entries for {len(chosen)} images; give one per image")
        return [own if count == AUTO else count for count, own in zip(asked, chosen)]

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Images are spliced in with the prompt; what follows finds them in the cache, as does a prompt whose begin is there.

        Raises:
            ValueError: a cache that was handed in ends within an image.
        """
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        images = {name: inputs.pop(name) for name in IMAGE_INPUTS if name in inputs}
        if is_first_iteration or not kwargs.get("use_cache", True):
            ids = self._prompt_ids(input_ids, inputs_embeds)
            num_cached = 0 if next_sequence_length is None else ids.shape[1] - next_sequence_length
            inputs.update(_uncached(images, ids, num_cached, self.config.image_token_id) if num_cached else images)
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Each row `expand_size` times, and with it its own images, of which a row can have any number."""
        images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
        ids = self._prompt_ids(input_ids, kwargs.get("inputs_embeds"))
        runs = None if ids is None else image_runs(ids, self.config.image_token_id)
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if expand_size > 1 and images.get("pixel_values") is not None and runs:
            images = _repeated(images, [row for row, _, _ in runs], expand_size)
        return input_ids, {**kwargs, **images}

    def _prompt_ids(self, input_ids, inputs_embeds):
        """The ids of a prompt; where it came as embeddings, those that tell its images."""
        if (input_ids is None or not input_ids.shape[1]) and inputs_embeds is not None:
            return self._ids_of(inputs_embeds)
        return input_ids


def _repeated(images, rows, times):
    """Pixel values, tiles and counts of images, image i of row `rows[i]`, with each row `times` times."""
    order = [place for row in sorted(set(rows)) for _ in range(times) for place, its in enumerate(rows) if its == row]
    return _picked(images, order)


def _uncached(images, ids, num_cached, image_token_id):
    """Of a prompt's images those that lie behind its first `num_cached` tokens."""
    runs = image_runs(ids, image_token_id)
    if images.get("pixel_values") is None or len(_tiles(images.get("num_tiles"), images["pixel_values"])) != len(runs):
        return images  # none, the new ones alone, or too few, which the forward pass says
    for _, start, length in runs:
        if start < num_cached < start + length:
            raise ValueError(
                f"the cache ends after {num_cached} tokens, within an image of tokens {start} to {start + length - 1}; crop it to {start}"
            )
    return _picked(images, [place for place, (_, start, _) in enumerate(runs) if start >= num_cached])


def _picked(images, order):
    """Pixel values, tiles and counts of the images `order`, of which one may come several times; nothing of none."""
    if not order:
        return {}
    tiles = _tiles(images.get("num_tiles"), images["pixel_values"])
    starts = [sum(tiles[:place]) for place in range(len(tiles))]
    picked = dict(images)
    for name in ("pixel_values", "tile_sizes"):
        if images.get(name) is not None:
            own = [images[name][starts[place] : starts[place] + tiles[place]] for place in order]
            picked[name] = torch.cat(own)
    if images.get("num_tiles") is not None:
        device = images["pixel_values"].device
        picked["num_tiles"] = torch.tensor([tiles[place] for place in order], device=device)
    if isinstance(images.get("num_visual_tokens"), list):
        picked["num_visual_tokens"] = [images["num_visual_tokens"][place] for place in order]
    return picked


def _asked_of_encoder(options):
    """Those of a call's options that the vision encoder is asked for as well."""
    return {name: True for name in ("output_hidden_states", "output_attentions") if options.get(name)}


def _image_outputs(features_BPC, visual_VD, sides, tiles, encoded):
    """Features and visual tokens of images under transformers' names: `pooler_output` has one tensor [n, D] per image."""
    per_tile = iter(rows * columns for rows, columns in sides)
    lengths = [sum(next(per_tile) for _ in range(number)) for number in tiles]
    return BaseModelOutputWithPooling(
        last_hidden_state=features_BPC,
        pooler_output=list(visual_VD.split(lengths)),
        hidden_states=encoded.get("hidden_states"),
        attentions=encoded.get("attentions"),
    )


def _image_ids(config):
    """The tokens that stand for images."""
    return config.image_start_token_id, config.image_token_id, config.image_end_token_id


def _recomputes(module):
    """Whether a layer keeps no activations while it is in training mode."""
    return isinstance(module, GradientCheckpointingLayer) and getattr(module, "gradient_checkpointing", False)


def _built(auto_class, config):
    """A part from its configuration; an attention that was asked for goes to the parts that have it."""
    wanted = config._attn_implementation
    part_class = auto_class._model_mapping[type(config)]
    part_class = part_class[0] if isinstance(part_class, (tuple, list)) else part_class
    needs = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
    name = needs.get(wanted, "_supports_flash_attn" if wanted and wanted.startswith("flash") else None)
    if name and not getattr(part_class, name):
        config._attn_implementation = "eager"
    return auto_class.from_config(config)


def _sides_of_rows(visual_sides):
    """(rows, columns) of each tile and the tiles of each image, from rows of both and which tile of its image it is."""
    starts = [at for at, (_, _, number) in enumerate(visual_sides) if number == 0]
    sides = [(rows, columns) for rows, columns, _ in visual_sides]
    return sides, [end - at for at, end in zip(starts, [*starts[1:], len(visual_sides)])]


def _tiles(num_tiles, pixel_values):
    """Tiles of each image as a list.

    Raises:
        ValueError: they do not add up to the tiles that came.
    """
    tiles = [1] * len(pixel_values) if num_tiles is None else [int(number) for number in num_tiles]
    if sum(tiles) != len(pixel_values):
        raise ValueError(
            f"num_tiles {tiles} adds up to {sum(tiles)} but {len(pixel_values)} tiles came; give the num_tiles that the "
            "image processor returned with them"
        )
    return tiles


def _counts_of_runs(runs, tiles):
    """Visual tokens per tile of each image from the lengths of the runs."""
    for length, number in zip(runs, tiles):
        if length % number:
            raise ValueError(
                f"a run of {length} visual tokens cannot be shared by the {number} tiles of its image; give the model the "
                "num_tiles and input_ids that the processor returned together"
            )
    return [length // number for length, number in zip(runs, tiles)] if len(runs) == len(tiles) else runs


def splice(
    embeds_BTD: torch.Tensor, visual_VD: torch.Tensor, positions: torch.Tensor, kernels: object | None = None
) -> torch.Tensor:
    """Put visual rows at `positions` [V] of the flattened tokens; text rows there get no gradient.

    With `kernels` (the package `tokenflex_kernels`) in one pass, forward and backward.

    Raises:
        ValueError: not as many positions as rows; the message has both numbers.
    """
    if positions.shape[0] != visual_VD.shape[0]:
        raise ValueError(
            f"the prompt has {positions.shape[0]} image placeholders but the images gave {visual_VD.shape[0]} visual tokens; "
            "build the prompt with the same num_visual_tokens that the model is called with"
        )
    rows = embeds_BTD.flatten(0, 1)
    if kernels is not None:
        return kernels.splice_rows(rows, visual_VD, positions).view_as(embeds_BTD)
    return rows.index_copy(0, positions, visual_VD).view_as(embeds_BTD)


def image_runs(input_ids: torch.Tensor, image_token_id: int) -> list[tuple[int, int, int]]:
    """The runs of placeholders as (row, start, length), in order; one run per image."""
    runs = []
    for row, ids in enumerate(input_ids.tolist()):
        start = None
        for place, token in enumerate([*ids, None]):
            if token == image_token_id and start is None:
                start = place
            elif token != image_token_id and start is not None:
                runs.append((row, start, place - start))
                start = None
    return runs


def resize_image_runs(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, counts: Sequence[int], image_token_id: int, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the i-th run of placeholders `counts[i]` of them; rows are padded on the left to one length.

    Returns input_ids and attention_mask [B, T'].
    """
    runs = image_runs(input_ids, image_token_id)
    rows = []
    for row in range(input_ids.shape[0]):
        pieces, done = [], 0
        for (run_row, start, length), count in zip(runs, counts):
            if run_row == row:
                image = input_ids.new_full((count,), image_token_id)
                pieces += [input_ids[row, done:start][attention_mask[row, done:start].bool()], image]
                done = start + length
        pieces.append(input_ids[row, done:][attention_mask[row, done:].bool()])
        rows.append(torch.cat(pieces))
    length = max(len(row) for row in rows)
    resized = input_ids.new_full((len(rows), length), pad_token_id)
    mask = attention_mask.new_zeros(len(rows), length)
    for index, row in enumerate(rows):
        resized[index, length - len(row) :] = row
        mask[index, length - len(row) :] = 1
    return resized, mask


__all__ = ["TokenFlexForConditionalGeneration", "TokenFlexModel"]
