"""A small language model that speaks the questions' language before it meets an image.

Why this file exists: in the paper the language model is pretrained, and what a study of visual tokens compares is how images
are joined to it. From scratch, the runs would differ most in when each leaves the plateau on which nothing is read yet. So a
Qwen3 of under a million parameters learns the corpus' questions about scenes that are told to it in symbols: one embedding
per digit, of its value, its ink and its place. It sees no image, no patch and no pooled token, one symbol per digit however
large the grid is, so that no visual-token count is favoured. The symbols' embeddings are thrown away.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..data.sample import parse_message
from ..files import over_processes, staged_folder
from ..model import TokenFlexImageProcessor, TokenFlexProcessor
from .glyphs import NUM_CLASSES, Sources, load_sources
from .questions import GRID_CELLS, draw_train_sample
from .scenes import IMAGE_SIDE, INKS, grid_layout
from .tokenizer import IMAGE_CONTEXT, build_tokenizer

LANGUAGE_VERSION = 2
ARCHITECTURE = {
    "model_type": "qwen3", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip
NUM_STEPS = 800
BATCH_SIZE = 16
PEAK_LEARNING_RATE = 1e-3
# That a name stands for a place is learned from small grids; on all of them at once nothing is, for a thousand steps.
EASY_SHARE = 0.35
EASY_CELLS = (2, 3, 4)
# Of the symbols' embeddings. At the 0.02 of the text's, they take four times as many steps to be told apart.
SYMBOL_STD = 0.5


class Told(NamedTuple):
    """A conversation as tokens. is_learned [L]: the answers and their ends. symbols [N, 4]: digit, ink, x and y in 0..1 of what
    stands at its `<IMG_CONTEXT>` tokens."""

    input_ids: np.ndarray
    is_learned: np.ndarray
    symbols: np.ndarray


def build_language_model(directory: Path, *, seed: int, num_steps: int = NUM_STEPS, num_workers: int = 2) -> Path:
    """Returns `directory`, holding the pretrained language model and its tokenizer in the format of transformers; built only if
    it is not there. Draws from the training split only. Written beside `directory` and renamed when complete.
    """
    directory = Path(directory)
    if directory.exists():
        return directory
    tokenizer = build_tokenizer()
    shares = [range(start, num_steps * BATCH_SIZE, num_workers) for start in range(num_workers)]
    jobs = [(share, seed, num_steps * BATCH_SIZE, load_sources("train")) for share in shares]
    parts = [part for _, part in over_processes(_tell_share, jobs, num_workers)]
    told = [parts[number % num_workers][number // num_workers] for number in range(num_steps * BATCH_SIZE)]
    model = _pretrain(told, tokenizer, seed, num_steps)
    with staged_folder(directory, replaces=False) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return directory


def _tell_share(job: tuple[range, int, int, Sources]) -> list[Told]:
    indices, seed, number, sources = job
    tokenizer = build_tokenizer()
    processor = TokenFlexProcessor(TokenFlexImageProcessor(), tokenizer, chat_template=tokenizer.chat_template)
    return [_tell(index, seed, index < EASY_SHARE * number, sources, processor) for index in indices]


def _tell(index: int, seed: int, is_easy: bool, sources: Sources, processor: TokenFlexProcessor) -> Told:
    rng = np.random.Generator(np.random.Philox(key=[seed, (1 << 53) | index]))
    sample = draw_train_sample(rng, sources, cells=EASY_CELLS if is_easy else GRID_CELLS)
    while sample.task == "word":  # letters are no symbols here
        sample = draw_train_sample(rng, sources, cells=EASY_CELLS if is_easy else GRID_CELLS)
    layouts = [grid_layout(scene, rng) for scene in sample.scenes]
    symbols = [
        (
            glyph.digit,
            list(INKS).index(scene.ink),
            *((at + glyph.side / 2) / IMAGE_SIDE for at in (glyph.left, glyph.top)),
        )
        for scene, glyphs in zip(sample.scenes, layouts)
        for glyph in glyphs
    ]
    messages = [parse_message(message) for message in sample.to_json()["messages"]]
    tokens = processor.encode(messages, [len(glyphs) for glyphs in layouts])
    return Told(np.array(tokens.input_ids), np.array(tokens.is_target), np.array(symbols, np.float32).reshape(-1, 4))


class _Symbols(nn.Module):
    """[N, 4] symbols -> [N, width]: value, ink and place, each embedded; the place by sines as `model.vision.sine2d` has them."""

    def __init__(self, width: int):
        super().__init__()
        self.digit, self.ink = nn.Embedding(NUM_CLASSES, width), nn.Embedding(len(INKS), width)
        self.place = nn.Linear(width, width)
        for weight, std in (
            (self.digit.weight, SYMBOL_STD),
            (self.ink.weight, SYMBOL_STD),
            (self.place.weight, SYMBOL_STD / 8),
        ):
            nn.init.normal_(weight, std=std)

    def forward(self, symbols: torch.Tensor) -> torch.Tensor:
        frequencies = torch.pi * 2 ** torch.linspace(-1, 2, self.place.in_features // 4)
        phases = (2 * symbols[:, [3, 2], None] - 1) * frequencies  # rows before columns
        sines = torch.cat([phases.sin(), phases.cos()], dim=-1).flatten(1)
        return self.digit(symbols[:, 0].long()) + self.ink(symbols[:, 1].long()) + self.place(sines)


def _pretrain(told: list[Told], tokenizer: PreTrainedTokenizerFast, seed: int, num_steps: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ARCHITECTURE, vocab_size=len(tokenizer)))
        symbols = _Symbols(model.config.hidden_size)
    parameters = [*model.parameters(), *symbols.parameters()]
    # Fused: its square root is the processor's; MKL's differs between processors.
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=num_steps, pct_start=0.05)
    for step in range(num_steps):
        batch = told[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        loss = _loss(model, symbols, batch, tokenizer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _loss(
    model: PreTrainedModel, symbols: _Symbols, batch: list[Told], tokenizer: PreTrainedTokenizerFast
) -> torch.Tensor:
    """Mean cross-entropy of the answers, each token weighed by 1 / sqrt(learned tokens of its sample) as in training."""
    padded = nn.utils.rnn.pad_sequence
    ids = padded(
        [torch.from_numpy(one.input_ids) for one in batch], batch_first=True, padding_value=tokenizer.pad_token_id
    )
    weights = padded(
        [torch.from_numpy(one.is_learned / max(one.is_learned.sum(), 1) ** 0.5).float() for one in batch],
        batch_first=True,
    )
    mask = padded([torch.ones(len(one.input_ids), dtype=torch.long) for one in batch], batch_first=True)
    places = (ids == tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)).nonzero(as_tuple=True)
    told = symbols(torch.from_numpy(np.concatenate([one.symbols for one in batch])))
    embeds = model.get_input_embeddings()(ids).index_put(places, told)
    logits = model(inputs_embeds=embeds, attention_mask=mask).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights.sum()
