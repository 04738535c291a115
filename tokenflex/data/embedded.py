"""The embedded corpus and its vision encoder as sources of a run: where they lie, and their building at first use."""

from pathlib import Path

from ..errors import UserError


def embedded_corpus(data, say=print):
    """Folder of the embedded corpus of a configuration's data section, built first where it is missing.

    It holds `train/`, `evaluation` shards in `eval/`, and `tokenizer/`.

    Raises:
        UserError: the packages it draws from are not installed.
    """
    corpus = _corpus_package("data.train")
    size = data.embedded
    name = f"embedded-v{corpus.RECIPE_VERSION}-{size.num_train}-{size.num_eval_per_task}-{size.seed}"
    folder = Path(data.cache_dir).expanduser() / name
    if not (folder / "corpus.json").exists():
        say(f"corpus    building {size.num_train} samples into {folder}")
    return corpus.build_corpus(
        folder, seed=size.seed, num_train=size.num_train, num_eval_per_task=size.num_eval_per_task
    )


def with_embedded_encoder(config, say=print):
    """The configuration with `model.vision: embedded` replaced by the encoder's folder; pretrained first where it is missing.

    Raises:
        UserError: the packages it draws from are not installed.
    """
    if config.model.vision != "embedded":
        return config
    corpus = _corpus_package("model.vision")
    name = f"embedded-encoder-v{corpus.ENCODER_VERSION}-{config.data.embedded.seed}"
    folder = Path(config.data.cache_dir).expanduser() / name
    if not folder.exists():
        say(f"encoder   pretraining on labelled patches, about half a minute, into {folder}")
        corpus.build_encoder(folder, seed=config.data.embedded.seed)
    return config.model_copy(update={"model": config.model.model_copy(update={"vision": str(folder)})})


def _corpus_package(key):
    try:
        from . import corpus
    except ImportError as error:
        raise UserError(
            f"{key}: the embedded corpus needs the package {error.name}; run: pip install 'tokenflex[quickstart]'"
        ) from None
    return corpus
