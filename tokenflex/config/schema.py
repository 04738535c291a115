"""The configuration of a run as frozen, strictly checked models; the text under each field is its documentation.

The defaults are those of a real run (SigLIP-so400m + Qwen2.5 as in the paper); `configs/quickstart.yaml` holds the tiny
model that trains on two CPU cores.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


Beta = Annotated[float, Field(ge=0, lt=1)]
Names = Annotated[
    tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value), Field(min_length=1)
]
Paths = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


def as_probabilities(shares: Sequence[float]) -> tuple[float, ...]:
    """Shares as probabilities: whole numbers are weights (2, 3, 5), fractions are 1 together but for their rounding.

    What sums to 1 within 1e-6 stays as it is to the bit.

    Raises:
        ValueError: nothing but zeros, or fractions that are more than 2 % from 1 together.
    """
    total = sum(shares)
    if abs(total - 1) <= 1e-6:
        return tuple(shares)
    if total <= 0 or (abs(total - 1) > 0.02 and not all(float(share).is_integer() for share in shares)):
        raise ValueError(
            f"the probabilities {list(shares)} sum to {total:g}; they must sum to 1, or be weights in whole numbers"
        )
    return tuple(share / total for share in shares)


class BudgetConfig(Section):
    """Visual-token counts and how often each is drawn in training (paper section 3.2)."""

    num_visual_tokens: tuple[PositiveInt, ...] = (64, 144, 256)
    """Counts per image (or tile) seen in training."""
    sides: Literal["square", "aspect"] = "square"
    """How a count becomes rows and columns: `square`, shaped like the patches of a tile, so 64 is 8 x 8; `aspect`, shaped like the image
    (or what a tile shows of it), so 64 is 4 x 16 for a wide page. The count, and so every length, stays the same."""
    probabilities: tuple[NonNegativeFloat, ...] = (0.2, 0.3, 0.5)
    """Probability of each count: fractions that sum to 1 (rounded ones such as 0.333 are scaled), or weights in whole numbers."""
    schedule: tuple[tuple[NonNegativeInt, tuple[NonNegativeFloat, ...]], ...] = ()
    """Change of the probabilities over training: points `[samples seen, [p, ...]]`, linear in between; empty keeps them."""
    per_sample: Literal["one", "all", "largest_and_one"] = "one"
    """Counts at which a sample is seen when it comes: `one` that is drawn (the paper); `all` of them side by side in its pack (M3);
    `largest_and_one`: the largest, and one of the others that is drawn (ViCO). Its images run through the encoder once."""
    total: NonNegativeInt = 0
    """Visual tokens that all images (or frames) of a sample have together at most, such as 512; 0 for no limit. A sample whose drawn count
    does not fit gets the largest of the counts that does, for each of its images."""
    share: Literal["even", "size"] = "even"
    """How the images of a sample share its visual tokens under a total: each the same, or by their size in pixels (without tiles)."""

    @model_validator(mode="after")
    def _check(self) -> "BudgetConfig":
        if len(set(self.num_visual_tokens)) != len(self.num_visual_tokens) or not self.num_visual_tokens:
            raise ValueError(f"num_visual_tokens is {list(self.num_visual_tokens)}; it must hold distinct counts")
        for probabilities in (self.probabilities, *(p for _, p in self.schedule)):
            if len(probabilities) != len(self.num_visual_tokens):
                raise ValueError(
                    f"{len(probabilities)} probabilities {list(probabilities)} came for {len(self.num_visual_tokens)} counts "
                    f"{list(self.num_visual_tokens)}; give one probability per count"
                )
            as_probabilities(probabilities)
        samples = [at for at, _ in self.schedule]
        if samples != sorted(set(samples)):
            raise ValueError(f"the schedule's points are at samples {samples}; they must rise")
        self._check_views()
        self._check_total()
        object.__setattr__(self, "probabilities", as_probabilities(self.probabilities))
        points = tuple((at, as_probabilities(probabilities)) for at, probabilities in self.schedule)
        object.__setattr__(self, "schedule", points)
        return self

    def _check_total(self) -> None:
        if self.total and self.total < min(self.num_visual_tokens):
            raise ValueError(
                f"total={self.total} holds no image at any of the counts {list(self.num_visual_tokens)}; raise it, or add a smaller count"
            )
        if self.total and self.per_sample != "one":
            raise ValueError(
                f"total={self.total} with per_sample={self.per_sample}; a total is for samples that are seen at one count"
            )
        if self.share != "even" and not self.total:
            raise ValueError(f"share={self.share} shares a total, and there is none; set total, such as 512")

    def _check_views(self) -> None:
        if self.per_sample != "one" and len(self.num_visual_tokens) < 2:
            raise ValueError(
                f"per_sample={self.per_sample} with the one count {self.num_visual_tokens[0]}; give several counts, or set it "
                "to one"
            )
        if self.per_sample == "all" and self.schedule:
            raise ValueError("per_sample=all draws nothing, so a schedule has no meaning; leave it out")
        largest = self.num_visual_tokens.index(max(self.num_visual_tokens))
        for shares in (self.probabilities, *(p for _, p in self.schedule)):
            if self.per_sample == "largest_and_one" and not sum(shares[:largest] + shares[largest + 1 :]) > 0:
                raise ValueError(
                    f"per_sample=largest_and_one draws among the counts below {max(self.num_visual_tokens)}, whose "
                    f"probabilities in {list(shares)} are all 0; raise one"
                )


class AdapterConfig(Section):
    """A low-rank adapter (LoRA) on a part, which is then trained in the part's place."""

    rank: NonNegativeInt = 0
    """Rank; 0 for no adapter."""
    alpha: PositiveFloat = 16.0
    """What the adapter adds is multiplied by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the adapter's input in training."""
    layers: Names = ("all-linear",)
    """Names of the linear layers that get one, such as [q_proj, v_proj]; `all-linear` is all but the output layer."""


class ModelConfig(Section):
    """What the model is made of."""

    init_from: str = ""
    """Folder or hub id of an exported TokenFLEX model to go on from (the next stage); then vision and text are its own."""
    vision: str | dict = "google/siglip-so400m-patch14-384"
    """Vision encoder: a hub id or local folder (pretrained), a configuration dict with `model_type` (from scratch), or
    `embedded`: the quick start's own, pretrained in half a minute where it is missing."""
    text: str | dict = "Qwen/Qwen2.5-7B-Instruct"
    """Causal language model: a hub id or local folder (pretrained), a configuration dict with `model_type` (from scratch), or
    `embedded`: one that speaks the embedded corpus' questions, pretrained in two minutes where it is missing."""
    tokenizer: str = ""
    """Hub id or folder of the tokenizer; empty takes the language model's, or that of the embedded corpus where it is used."""
    chat_template: str = ""
    """Chat template: the name of one of the tokenizer's, where it has several, or a file; empty takes its own (or `default`)."""
    chat_template_options: dict = {}
    """Variables of the chat template, such as `{enable_thinking: false}` for Qwen3, in training, evaluation and the export."""
    image_size: tuple[PositiveInt, PositiveInt] = (378, 378)
    """Height and width in pixels that every image is resized to; whole multiples of the encoder's patch (27 of 14 here)."""
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per-channel mean that is subtracted (of pixels in 0..1)."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)
    """Per-channel standard deviation to divide by."""
    max_tiles: PositiveInt = 1
    """Tiles that an image is cut into at most, by its aspect ratio (InternVL has 6 in training); 1 takes it whole."""
    thumbnail: bool = True
    """Whether an image of several tiles is followed by the whole of it as one more tile."""
    frames_per_second: PositiveFloat = 1.0
    """Frames of a video file that are taken per second of it; a clip that comes as a list of frames is taken as it is."""
    max_frames: PositiveInt = 16
    """Frames of a clip at most: of a longer file as many, spread evenly; a list of more is refused."""
    pooling_mode: Literal["adaptive", "resize"] = "adaptive"
    """`adaptive`: the paper's adaptive average pooling; `resize`: the authors' release (bilinear, then average)."""
    pooling_detail: Literal["none", "max"] = "none"
    """`max` adds to each pooled patch a learned share, zero at first, of what its window's largest value has over the average."""
    projector_multiplier: PositiveInt = 3
    """Inner width of the SwiGLU projector in units of the vision width."""
    projector_backend: Literal["auto", "kernels", "reference"] = "auto"
    """Pooling, projector and splice. `auto`: fused kernels on GPU, plain torch on CPU; `kernels`: their operators everywhere;
    `reference`: plain torch."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's kernels for the language model's RMSNorm, RoPE and SwiGLU; `auto`: on GPU where liger-kernel is installed."""
    vision_position_embedding: Literal["none", "sine2d"] = "none"
    """`sine2d` tells each patch feature its place in the image; for convolutional encoders, which do not know it."""
    vision_feature_layer: int = -1
    """Hidden state of the encoder to use; -1 is the last, -2 the one before."""
    image_tokens: tuple[str, str, str] = ("<img>", "<IMG_CONTEXT>", "</img>")
    """The tokenizer's tokens before, in place of, and after an image (Qwen: <|vision_start|> <|image_pad|> <|vision_end|>)."""
    add_image_tokens: bool = False
    """Add image tokens that the tokenizer lacks (the embedding grows where it must)."""
    probe: bool = True
    """Before the first step, try whether the parts do in a pack what they do alone (some forward passes). Off, a part that does
    not is trained all the same: samples that see each other, attention without its window or cap, features out of order."""
    text_adapter: AdapterConfig = AdapterConfig()
    """LoRA on the language model."""
    vision_adapter: AdapterConfig = AdapterConfig()
    """LoRA on the vision encoder."""
    text_frozen_dtype: Literal["same", "int8"] = "same"
    """Number format of the language model's linear layers where they are frozen, alone or under an adapter: `same` as everything, or
    `int8`, half of bf16, with a scale per row; the output layer stays as it is. At ZeRO 0 to 2; the export is in full."""
    vision_frozen_dtype: Literal["same", "int8"] = "same"
    """The same of the vision encoder."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    trust_remote_code: bool = False
    """Allow the pretrained parts to run code from their own repositories."""


class EmbeddedCorpusConfig(Section):
    """Size of the corpus that is built at first run where `embedded` stands for shards."""

    num_train: PositiveInt = 8000
    """Training samples (several questions each)."""
    num_eval_per_task: PositiveInt = 300
    """Held-out questions per task."""
    seed: NonNegativeInt = 0
    """Seed of every draw."""


class SourceConfig(Section):
    """One source of a mixture."""

    paths: Paths
    """Shards: tar files, folders of them, glob patterns, or URLs; `embedded` is the quick-start corpus."""
    weight: NonNegativeFloat = 0.0
    """Share of an epoch's samples relative to the other sources' weights; 0 for all sources takes each whole."""
    epochs: PositiveFloat = 1.0
    """Times the source comes per epoch (2 is twice, 0.5 every other sample); with weights the most it may come."""
    over_long: Literal["error", "drop", "truncate"] = "error"
    """A sample longer than a pack: stop and name it, leave it out, or end the conversation at the last answer that fits."""


class CostConfig(Section):
    """What things cost, in FLOPs of forward and backward pass; only their ratios matter. Defaults: a 7B model, SigLIP-so400m."""

    per_token: NonNegativeInt = 42_420_000_000
    """Language model, each token (6 x parameters)."""
    per_token_pair: NonNegativeInt = 602_112
    """Language model, times the square of a sample's tokens (attention; 6 x layers x width)."""
    per_tile: NonNegativeInt = 1_991_699_290_368
    """Vision encoder, each image or tile."""


class DataConfig(Section):
    """Where samples come from and how they are packed."""

    train: Paths = ()
    """Training shards: tar files, folders of them, glob patterns, or URLs; `embedded` is the quick-start corpus."""
    sources: tuple[SourceConfig, ...] = ()
    """A mixture of several sources, each with its paths, weight, epochs and policy; takes the place of `train`."""
    evaluation: Paths = ()
    """Evaluation shards, likewise; empty for none."""
    cache_dir: str = "~/.cache/tokenflex"
    """Where the embedded corpus and indexes of read-only shards are kept."""
    shard_cache_gb: PositiveFloat = 100.0
    """Gigabytes of fetched shards that are kept in `cache_dir`; those used longest ago go first."""
    embedded: EmbeddedCorpusConfig = EmbeddedCorpusConfig()
    """The embedded corpus."""
    pack_length: PositiveInt = 8192
    """Tokens per pack, text and visual."""
    max_images_per_pack: PositiveInt = 48
    """Images (or tiles) per pack at most; bounds the vision encoder's memory."""
    packs_per_step: PositiveInt = 64
    """Packs per optimizer step over all ranks; the number of ranks must divide it."""
    lockstep_packs: PositiveInt = 8
    """Packs that are planned to run side by side, equal in tiles and cost: the most ranks that run in step; divides packs_per_step."""
    mixing: Literal["lockstep", "free"] = "lockstep"
    """`lockstep`: packs that run side by side share one visual-token count; `free`: a pack holds images of any count."""
    cost: CostConfig = CostConfig()
    """What balances packs that run side by side."""
    window_rows: PositiveInt = 16
    """Rows of `lockstep_packs` packs that are planned together: more makes packs more equal and looks further ahead."""
    packs_per_micro_batch: PositiveInt = 1
    """Packs that one rank runs through the model at once, at most; the rest of its share is accumulated."""
    shuffle_window: NonNegativeInt = 0
    """Samples are shuffled within windows of this many, which keep their order (a curriculum); 0 shuffles the whole epoch."""
    shuffle_shards: PositiveInt = 64
    """Shards that samples are shuffled across at a time, in an order that changes every epoch; bounds the files open at once."""
    over_long: Literal["error", "drop", "truncate"] = "error"
    """A sample longer than a pack: stop and name it, leave it out, or end the conversation at the last answer that fits."""
    num_workers: NonNegativeInt = 4
    """Processes per rank that read and decode; 0 reads in the training process."""
    max_member_bytes: PositiveInt = 64 * 2**20
    """Bytes of one file in a shard; a sample with a larger one is bad."""
    max_image_pixels: PositiveInt = 100_000_000
    """Pixels of one image by its header; a sample with a larger one is bad, and is not decoded."""
    max_bad_fraction: NonNegativeFloat = Field(default=0.01, le=1)
    """Share of bad samples (of all seen in this run, at least 1,000) above which training stops; below it their places are
    filled with tokens that teach nothing, and each is logged."""

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.packs_per_step % self.lockstep_packs:
            raise ValueError(
                f"lockstep_packs={self.lockstep_packs} does not divide packs_per_step={self.packs_per_step}"
            )
        return self


class PartConfig(Section):
    """How one part of the model is trained."""

    train: bool = True
    """Whether it is trained; a frozen part keeps its weights and statistics bit for bit, and has no dropout."""
    learning_rate: NonNegativeFloat = 2e-5
    """Peak learning rate."""
    layer_decay: PositiveFloat = Field(default=1.0, le=1)
    """Rate of a layer as a share of the one above it: 0.9 trains early layers gently; 1 trains all of them alike."""
    weight_decay: NonNegativeFloat | Literal["same"] = "same"
    """Decoupled weight decay of the part's matrices; `same` takes `optimizer.weight_decay`."""
    betas: tuple[Beta, Beta] | Literal["same"] = "same"
    """Decay rates of the part's moments; `same` takes `optimizer.betas`."""


class OptimizerConfig(Section):
    """AdamW (or Muon for hidden matrices) with groups per part, and the learning-rate schedule."""

    vision: PartConfig = PartConfig(learning_rate=2e-6)
    """The vision encoder."""
    projector: PartConfig = PartConfig(learning_rate=2e-5)
    """The token-adaptive projector."""
    text: PartConfig = PartConfig(learning_rate=2e-5)
    """The language model."""
    train_image_tokens: bool = False
    """Of a frozen language model, train the rows of `model.image_tokens` in embedding and output layer, at its learning rate."""
    weight_decay: NonNegativeFloat = 0.05
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of the two moments."""
    matrices: Literal["adamw", "muon"] = "adamw"
    """What moves the matrices of linear layers, but for the output layer: `muon` orthogonalises their momentum, of the size
    that AdamW's updates have, so rates and weight decay keep their meaning; embeddings, convolutions and vectors stay at AdamW."""
    muon_momentum: Beta = 0.95
    """Decay rate of Muon's momentum (Nesterov's)."""
    eps: PositiveFloat = 1e-8
    """Added to the denominator."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this global norm; 0 clips nothing."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up; `wsd` (warm-up, stable, decay) stays at the peak and falls in a straight line at the end."""
    decay_fraction: PositiveFloat = Field(default=0.2, le=1)
    """Share of the steps over which `wsd` falls at the end."""
    warmup_fraction: NonNegativeFloat = Field(default=0.03, le=1)
    """Share of the steps over which the rate rises from zero."""
    warmup_steps: NonNegativeInt = 0
    """The same in steps; where it is not 0 it takes the place of `warmup_fraction`."""
    final_fraction: NonNegativeFloat = Field(default=0.0, le=1)
    """Rate at the end as a share of the peak."""


class TrainConfig(Section):
    """The loop."""

    num_steps: PositiveInt = 1000
    """Optimizer steps in all."""
    loss_weighting: Literal["token", "sample", "sqrt"] = "sqrt"
    """Weight of each learned token of a sample with n of them: 1, 1/n or 1/sqrt(n) (the authors' release)."""
    consistency: NonNegativeFloat = 0.0
    """Weight of the divergence of a sample's answers at each of its counts from those at its largest (ViCO); needs a
    `budget.per_sample` of several, and 0 leaves it out."""
    fused_loss: Literal["auto", "on", "off"] = "auto"
    """Cross-entropy without logits in memory, torch's own (2.13 and newer); `auto`: on GPU where torch and the model allow."""
    resume_from: str = ""
    """Another run's folder, or one of its checkpoints, to branch off from with its moments and its place in the data (a
    cooldown, say); a run that has checkpoints of its own goes on from those."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Decay rate of an average of the trained weights over the steps (0.999, say), kept in fp32 and in checkpoints; 0 for none."""
    export_average: bool = False
    """Export that average instead of the weights."""
    export_adapter: bool = False
    """Write the adapters beside the merged model too, as a folder that peft loads onto the model of `model.init_from`."""
    compile: Literal["off", "blocks"] = "off"
    """`blocks`: torch.compile for the layers of encoder and language model, once for all lengths; at ZeRO 0 to 2."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of the forward and backward pass; `auto` is bf16 on GPU and fp32 on CPU, where it is the fast one."""
    seed: NonNegativeInt = 0
    """Seed of weights, sample order and visual-token draws."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics.jsonl."""
    save_every: NonNegativeInt = 500
    """Steps between two checkpoints; 0 saves at the end and on interruption only."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_every: NonNegativeInt = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 for none."""
    keep_best: NonNegativeInt = 0
    """Best checkpoints that are kept besides: with `evaluate.every` those of the lowest validation loss, else those of the lowest
    mean loss over their last steps."""
    max_failed_saves: PositiveInt = 3
    """Saves in a row that may fail (disk full, input/output errors) before the run stops."""
    spike_sigma: NonNegativeFloat = 6.0
    """A step is skipped where its loss or gradient norm is this many standard deviations above the last 128; 0 for never."""
    max_bad_steps: PositiveInt = 8
    """Skipped steps in a row (spikes, NaN, infinity) after which the run goes back to a checkpoint and passes over their data."""
    max_rollbacks: PositiveInt = 3
    """Times in a row that it goes back without getting further, before it stops."""
    hang_timeout_s: PositiveFloat = 120.0
    """A phase of a step that lasts longer than this, and than 3 times the 99th percentile of steps, is a hang; seconds."""
    startup_timeout_s: PositiveFloat = 3600.0
    """The same for what is not a step: the first steps, waiting for a checkpoint, the export; seconds."""
    log_samples: bool = False
    """Write the sample ids of every step to `samples-RANK.jsonl`."""
    tensorboard: bool = False
    """Write TensorBoard's event files into the run's folder as well (needs the extra `tensorboard`)."""
    wandb: Literal["auto", "off"] = "auto"
    """`auto` logs to wandb where it is installed: online if WANDB_API_KEY is set, else offline into the run folder."""


class EvaluateConfig(Section):
    """Greedy exact-match accuracy per task and visual-token count, and the loss on held-out samples while training."""

    every: NonNegativeInt = 0
    """Steps between two validations while training: the loss on `data.evaluation` per task and count; 0 for none."""
    num_validation_samples: PositiveInt = 512
    """Samples that a validation looks at, each at every count; evenly spread over the shards."""
    answers: bool = False
    """Whether validations also let the model answer their questions, for accuracy beside the loss."""
    at_end: bool = True
    """Evaluate the exported model after training."""
    num_visual_tokens: tuple[PositiveInt, ...] = (64, 100, 144, 196, 256)
    """Counts to evaluate and to validate at; they need not have been trained."""
    max_samples_per_task: PositiveInt = 1000
    """Questions per task at most."""
    max_new_tokens: PositiveInt = 32
    """Length of an answer at most."""
    batch_size: PositiveInt = 32
    """Questions generated together."""
    tasks: tuple[str, ...] = ()
    """Tasks that the evaluation at the end asks; all where it is empty."""
    router_samples: NonNegativeInt = 0
    """Training conversations with images on which the exported model gets a router before it is evaluated, which then has the column
    "auto" as well; 0 for no router."""


class RunConfig(Section):
    """A whole run."""

    name: str = Field(default="tokenflex", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is `<output_dir>/<name>`. Letters, digits, dot, dash and underscore."""
    output_dir: str = "runs"
    """Folder of all runs."""
    model: ModelConfig = ModelConfig()
    """The model."""
    budget: BudgetConfig = BudgetConfig()
    """Visual-token counts."""
    data: DataConfig = DataConfig()
    """The data."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    train: TrainConfig = TrainConfig()
    """The loop."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation."""

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.optimizer.warmup_steps > self.train.num_steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is more than train.num_steps={self.train.num_steps}: the "
                "rate would never reach its peak; shorten the warm-up"
            )
        for part in ("text", "vision"):
            if getattr(self.model, f"{part}_adapter").rank and not getattr(self.optimizer, part).train:
                raise ValueError(
                    f"model.{part}_adapter is trained in the place of the {part} part, but optimizer.{part}.train=false; set it "
                    f"to true, or model.{part}_adapter.rank=0"
                )
        self._check_frozen_dtypes()
        parts = (self.optimizer.vision, self.optimizer.projector, self.optimizer.text)
        if not (any(part.train for part in parts) or self.optimizer.train_image_tokens):
            raise ValueError(
                "optimizer: vision, projector and text are all frozen; set optimizer.projector.train=true or another part's"
            )
        has_adapter = self.model.text_adapter.rank or self.model.vision_adapter.rank
        if self.train.export_adapter and not (has_adapter and self.model.init_from):
            raise ValueError(
                "train.export_adapter=true needs an adapter (model.text_adapter.rank) and an exported model that it is for "
                "(model.init_from); without them the merged model is exported alone"
            )
        if self.train.export_adapter and self.optimizer.train_image_tokens:
            raise ValueError(
                "train.export_adapter=true with optimizer.train_image_tokens=true: an adapter's folder has no place for single rows of "
                "an embedding; set one of them to false (the merged model has them)"
            )
        if self.train.compile == "blocks" and self.model.gradient_checkpointing:
            raise ValueError(
                "train.compile=blocks with model.gradient_checkpointing=true: attention stays outside of what is compiled, and a "
                "checkpointed layer is compiled whole or not at all; set one of them off"
            )
        if self.train.export_average and not self.train.ema_decay:
            raise ValueError(
                "train.export_average=true, but train.ema_decay is 0: no average is kept; set it to 0.999, say"
            )
        return self

    def _check_frozen_dtypes(self) -> None:
        for part in ("text", "vision"):
            is_trained = getattr(self.optimizer, part).train and not getattr(self.model, f"{part}_adapter").rank
            if is_trained and getattr(self.model, f"{part}_frozen_dtype") != "same":
                raise ValueError(
                    f"model.{part}_frozen_dtype=int8, but the {part} part is trained whole, and 8 bit cannot be; set it to same, "
                    f"optimizer.{part}.train=false, or an adapter (model.{part}_adapter.rank=16)"
                )

    @model_validator(mode="after")
    def _check_views(self) -> "RunConfig":
        if self.train.consistency and self.budget.per_sample == "one":
            raise ValueError(
                f"train.consistency={self.train.consistency:g} compares a sample's counts, and budget.per_sample is one; set it to "
                "all or largest_and_one"
            )
        return self
