"""The word `embedded` in a recipe, replaced by ordinary paths: the only place that knows it.

Every entry point calls `resolve_embedded` right after it has read a recipe. What is missing (shards, tokenizer, encoder) is
built then, by one process of the machine while the others wait at a lock.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ..config import DataConfig, RunConfig
from ..errors import UserError
from ..files import only_one_inside, staged_folder
from .apart import pretrain_apart

EMBEDDED = "embedded"


def resolve_embedded(
    config: RunConfig, say: Callable[[str], None] = print, with_data: bool = True, with_weights: bool = True
) -> RunConfig:
    """The configuration with `embedded` replaced by folders of shards, tokenizer and encoder, built where they are missing.

    `with_data=False` is for those who need the model's parts only: then no shards are built but for their tokenizer, which
    a language model from scratch takes where its recipe names none. `with_weights=False` is for those who need shapes only:
    nothing is pretrained or drawn, the encoder is its configuration, and the tokenizer lies alone in the cache.

    Raises:
        UserError: the packages that the corpus is drawn from are not installed.
    """
    if not with_weights:
        return _shapes(config)
    model, data = config.model, config.data
    if model.vision == EMBEDDED:
        model = model.model_copy(update={"vision": str(_encoder(data, say))})
    if model.text == EMBEDDED:
        model = model.model_copy(update={"text": str(_language_model(data, say))})
    paths = (*data.train, *data.evaluation, *(path for source in data.sources for path in source.paths))
    lacks_tokenizer = not (model.tokenizer or model.init_from or isinstance(model.text, str))
    if EMBEDDED in paths and (with_data or lacks_tokenizer):
        corpus = _corpus(data, say)
        if lacks_tokenizer:
            model = model.model_copy(update={"tokenizer": str(corpus / "tokenizer")})
        data = _with_folder(data, corpus)
    return config.model_copy(update={"model": model, "data": data})


def _shapes(config: RunConfig) -> RunConfig:
    """The configuration with embedded parts as configurations of parts from scratch, and data where they are or would be."""
    model, data = config.model, config.data
    paths = (*data.train, *data.evaluation, *(path for source in data.sources for path in source.paths))
    if EMBEDDED not in (model.vision, model.text, *paths):
        return config
    _, encoder = _builders("model.vision")
    update: dict[str, object] = {}
    if model.vision == EMBEDDED:
        update["vision"] = {"model_type": "bit", **encoder.ARCHITECTURE}
    if model.text == EMBEDDED:
        from . import language

        update["text"] = dict(language.ARCHITECTURE)
    is_from_scratch = EMBEDDED in paths and not isinstance(model.text, str)
    if not (model.tokenizer or model.init_from) and (model.text == EMBEDDED or is_from_scratch):
        update["tokenizer"] = str(_tokenizer(data))
    data = _with_folder(data, _corpus_folder(data)) if EMBEDDED in paths else data
    return config.model_copy(update={"model": model.model_copy(update=update), "data": data})


def _with_folder(data: DataConfig, corpus: Path) -> DataConfig:
    def resolved(paths: tuple[str, ...], split: str) -> tuple[str, ...]:
        return tuple(str(corpus / split) if path == EMBEDDED else path for path in paths)

    sources = tuple(s.model_copy(update={"paths": resolved(s.paths, "train")}) for s in data.sources)
    ours = {"train": resolved(data.train, "train"), "evaluation": resolved(data.evaluation, "eval"), "sources": sources}
    return data.model_copy(update=ours)


def _corpus(data: DataConfig, say: Callable[[str], None]) -> Path:
    """Folder of the corpus: `train/` and `eval/` shards, and `tokenizer/`."""
    build, _ = _builders("data.train")
    size, folder = data.embedded, _corpus_folder(data)
    if not (folder / "corpus.json").exists():
        say(f"corpus    building {size.num_train} samples into {folder}")
    with only_one_inside(folder.with_name(folder.name + ".lock")):
        return build.build_corpus(
            folder, seed=size.seed, num_train=size.num_train, num_eval_per_task=size.num_eval_per_task
        )


def _corpus_folder(data: DataConfig) -> Path:
    """Where the corpus is, or would be."""
    build, _ = _builders("data.train")
    size = data.embedded
    name = f"embedded-v{build.RECIPE_VERSION}-{size.num_train}-{size.num_eval_per_task}-{size.seed}"
    return Path(data.cache_dir).expanduser() / name


def _tokenizer(data: DataConfig) -> Path:
    """Folder of the corpus' tokenizer alone, which takes no time to build."""
    build, _ = _builders("data.train")
    folder = Path(data.cache_dir).expanduser() / f"embedded-tokenizer-v{build.RECIPE_VERSION}"
    if not folder.exists():
        with staged_folder(folder, replaces=False) as staging:
            build.build_tokenizer().save_pretrained(staging)
    return folder


def _encoder(data: DataConfig, say: Callable[[str], None]) -> Path:
    _, encoder = _builders("model.vision")
    told = "encoder   pretraining on labelled patches, about half a minute"
    return _pretrained("encoder", encoder.ENCODER_VERSION, told, data, say)


def _language_model(data: DataConfig, say: Callable[[str], None]) -> Path:
    _builders("model.text")
    from . import language

    told = "language  pretraining on scenes told in symbols, about four minutes"
    return _pretrained("language", language.LANGUAGE_VERSION, told, data, say)


def _pretrained(part: str, version: int, told: str, data: DataConfig, say: Callable[[str], None]) -> Path:
    """Folder of a part, pretrained where it is missing; one process of the machine sees to it."""
    folder = Path(data.cache_dir).expanduser() / f"embedded-{part}-v{version}-{data.embedded.seed}"
    if folder.exists():
        return folder
    say(f"{told}, into {folder}")
    with only_one_inside(folder.with_name(f"{folder.name}.lock")):
        return pretrain_apart(part, folder, data.embedded.seed)


def _builders(key: str) -> tuple[ModuleType, ModuleType]:
    try:
        from . import build, encoder
    except ImportError as error:
        raise UserError(
            f"{key}: the embedded corpus needs the package {error.name}; run: pip install 'tokenflex[quickstart]'"
        ) from None
    return build, encoder
