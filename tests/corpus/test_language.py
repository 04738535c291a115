"""The study's language model: what it is told is what training would render, its weights are a function of the seed alone."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tokenflex.config import load_config
from tokenflex.corpus import language, resolve_embedded
from tokenflex.corpus.glyphs import load_sources
from tokenflex.corpus.questions import ALL_CELLS
from tokenflex.corpus.scenes import INKS
from tokenflex.corpus.tokenizer import IMAGE_CONTEXT, TURN_END, build_tokenizer


@pytest.fixture(scope="module")
def told():
    return language._tell_share((range(60), 3, 120, load_sources("train")))


def test_a_symbol_stands_at_every_placeholder_and_answers_with_their_ends_are_learned(told):
    tokenizer = build_tokenizer()
    place, end = (tokenizer.convert_tokens_to_ids(token) for token in (IMAGE_CONTEXT, TURN_END))
    for one in told:
        assert (one.input_ids == place).sum() == len(one.symbols) <= max(ALL_CELLS) ** 2
        assert len(one.symbols) == 0 or ((one.symbols[:, 2:] > 0) & (one.symbols[:, 2:] < 1)).all()
        assert set(one.symbols[:, 0]) <= set(range(10)) and set(one.symbols[:, 1]) <= set(range(len(INKS)))
        ends = np.flatnonzero(one.is_learned & (one.input_ids == end))
        text = tokenizer.decode(one.input_ids)
        assert len(ends) == text.count("<|im_start|>assistant") > 0 and not one.is_learned[0]
        answers = "".join(tokenizer.decode([token]) for token in one.input_ids[one.is_learned])
        assert answers == "".join(
            part.split("\n", 1)[1].split(TURN_END)[0] + TURN_END for part in text.split("<|im_start|>assistant")[1:]
        )


def test_a_whole_grid_is_told_row_by_row(told):
    """Symbols come in the reading order of their places, so the n-th digit of a grid's reading is the n-th symbol's."""
    tokenizer, grids = build_tokenizer(), 0
    for one in told:
        text = tokenizer.decode(one.input_ids)
        if "read digits" not in text:
            continue
        reading = text.split("read digits<|im_end|>\n<|im_start|>assistant\n")[1].split(TURN_END)[0].split()
        assert [int(digit) for digit in reading[1::2]] == one.symbols[:, 0].astype(int).tolist()
        grids += 1
    assert grids > 10


def test_it_is_a_function_of_its_seed_and_loads_like_any_other(tmp_path):
    folders = [
        language.build_language_model(tmp_path / name, seed=seed, num_steps=2, num_workers=workers)
        for name, seed, workers in (("one", 0, 1), ("two", 0, 2), ("other", 1, 1))
    ]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders[0]), AutoTokenizer.from_pretrained(folders[0])
    assert model.config.vocab_size == len(tokenizer) and tokenizer.eos_token == TURN_END
    assert language.build_language_model(folders[0], seed=9, num_steps=2) == folders[0]  # built once


def test_the_loss_looks_at_answers_alone_and_falls(told):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**language.ARCHITECTURE, vocab_size=len(tokenizer)))
    symbols = language._Symbols(model.config.hidden_size)
    batch = told[:8]
    before = language._loss(model, symbols, batch, tokenizer)
    first, *others = batch
    silent = [first, *(one._replace(is_learned=np.zeros_like(one.is_learned)) for one in others)]
    alone = language._loss(model, symbols, [first], tokenizer)
    torch.testing.assert_close(language._loss(model, symbols, silent, tokenizer), alone, rtol=1e-4, atol=1e-5)
    assert alone != before
    optimizer = torch.optim.AdamW([*model.parameters(), *symbols.parameters()], lr=2e-3)
    for _ in range(12):
        optimizer.zero_grad()
        language._loss(model, symbols, batch, tokenizer).backward()
        optimizer.step()
    assert language._loss(model, symbols, batch, tokenizer) < 0.7 * before


def test_a_recipe_names_it_by_the_word(tmp_path):
    folder = tmp_path / f"embedded-language-v{language.LANGUAGE_VERSION}-0"
    language.build_language_model(folder, seed=0, num_steps=1, num_workers=1)
    overrides = [f"data.cache_dir={tmp_path}", "data.train=[]", "data.evaluation=[]", "model.vision={model_type: bit}"]
    config = resolve_embedded(load_config("configs/paper.yaml", overrides), say=lambda text: pytest.fail(text))
    assert config.model.text == str(folder)
