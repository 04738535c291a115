"""The embedded corpus as a data source: where it lies, and its building at first use."""

from pathlib import Path

from ..errors import UserError


def embedded_corpus(data, say=print):
    """Folder of the embedded corpus of a configuration's data section, built first where it is missing.

    It holds `train/`, `evaluation` shards in `eval/`, and `tokenizer/`.

    Raises:
        UserError: the packages it draws from are not installed.
    """
    size = data.embedded
    try:
        from .corpus import RECIPE_VERSION, build_corpus
    except ImportError as error:
        raise UserError(
            f"data.train: the embedded corpus needs the package {error.name}; run: pip install 'tokenflex[quickstart]'"
        ) from None
    name = f"embedded-v{RECIPE_VERSION}-{size.num_train}-{size.num_eval_per_task}-{size.seed}"
    folder = Path(data.cache_dir).expanduser() / name
    if not (folder / "corpus.json").exists():
        say(f"corpus    building {size.num_train} samples into {folder}")
    return build_corpus(folder, seed=size.seed, num_train=size.num_train, num_eval_per_task=size.num_eval_per_task)
