"""More tokens than the language model has rows: its embedding and output layer grow, whole or sharded."""

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers import PreTrainedModel


def grow_vocabulary(
    language_model: PreTrainedModel,
    num_tokens: int,
    gathered: Callable[[Iterable[nn.Parameter]], AbstractContextManager] = contextlib.nullcontext,
) -> int:
    """Give the embedding (and the output layer, tied or not) `num_tokens` rows; returns how many are new.

    A new row is the mean of all old ones, in the embedding and in the output layer each: for the model a token of no
    particular meaning, so what is said before is as likely as it was. It is the same on any number of ranks, for it is drawn
    from nothing. Within `gathered(parameters)` sharded parameters are whole; a grown layer is whole, as a part from scratch is.

    Raises:
        ValueError: the output layer is not a linear one with a row per token.
    """
    embedding, head = language_model.get_input_embeddings(), language_model.get_output_embeddings()
    num_old = embedding.num_embeddings
    if num_tokens <= num_old:
        return 0
    if head is not None and getattr(head, "out_features", None) != num_old:
        raise ValueError(
            f"the output layer of a {language_model.config.model_type} has not one row per token, so it cannot grow with the "
            f"embedding from {num_old} to {num_tokens} rows; name image tokens that the tokenizer has in model.image_tokens"
        )
    is_tied = head is not None and head.weight is embedding.weight
    embedding.weight = _grown(embedding.weight, num_tokens, gathered)
    embedding.num_embeddings = num_tokens
    if head is not None:
        head.weight = embedding.weight if is_tied else _grown(head.weight, num_tokens, gathered)
        head.out_features = num_tokens
        if head.bias is not None:
            head.bias = _grown(head.bias, num_tokens, gathered)
    for part in (language_model, language_model.base_model):
        part.vocab_size = part.config.vocab_size = num_tokens
    return num_tokens - num_old


def _grown(parameter, num_rows, gathered):
    with torch.no_grad(), gathered([parameter]):
        old = parameter.detach()
        mean = old.float().mean(0, keepdim=True).to(old.dtype)
        return nn.Parameter(torch.cat([old, mean.expand(num_rows - len(old), *old.shape[1:])]), parameter.requires_grad)
