"""Which files of a Hugging Face dataset folder belong together: its configurations (subsets) and their splits.

A dataset's README declares them, or its folders and file names tell them. Several are never mixed unless that is asked for.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from ...errors import UserError

ALL = "all"
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing")
SYNONYMS = {"training": "train", "testing": "test"}
_SPLIT = re.compile(rf"(?:^|[/_.-])({'|'.join(SPLITS)})(?=[-_./])", re.IGNORECASE)
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
Files = dict[tuple[str, str], list[Path]]
"""{(configuration, split): files}; empty names where nothing tells."""


def chosen_files(folder: Path, files: list[Path], subset: str = "", split: str = "") -> list[Path]:
    """Those of a dataset's parquet files that are of one configuration and one split, or of `all`.

    Args:
        folder: of the dataset.
        files: all its parquet files.
        subset, split: names; may be left empty where there is one.

    Raises:
        UserError: there are several and none is named, or none of this name.
    """
    by_name = _declared(folder) or _told(folder, files)
    subsets = _named(folder, by_name, 0, "configurations", "--subset", subset)
    by_name = {key: some for key, some in by_name.items() if key[0] in subsets}
    splits = _named(folder, by_name, 1, "splits", "--split", split)
    return sorted({path for key, some in by_name.items() if key[1] in splits for path in some})


def _named(folder: Path, by_name: Files, place: int, what: str, option: str, wanted: str) -> set[str]:
    """The names to take of what stands at `place` of the keys.

    Raises:
        UserError: several, or none of this name; the message has all and their files.
    """
    numbers: dict[str, int] = {}
    for key, some in by_name.items():
        numbers[key[place]] = numbers.get(key[place], 0) + len(some)
    if wanted == ALL or (not wanted and len(numbers) == 1):
        return set(numbers)
    held = ", ".join(f"{name or 'without a name'} ({number} files)" for name, number in sorted(numbers.items()))
    if not wanted:
        first = "train" if "train" in numbers else next(name for name in sorted(numbers) if name)
        raise UserError(
            f"{folder}: holds several {what}: {held}; name the one to convert, {option} {first}, or {option} {ALL}"
        )
    if wanted not in numbers:
        raise UserError(f"{option} {wanted}: {folder} holds {held}")
    return {wanted}


def _told(folder: Path, files: Iterable[Path]) -> Files:
    """By folders and file names: `train`, `validation`, `test` and the like are splits, `data` is nothing, other folders are
    configurations."""
    by_name: Files = {}
    for path in files:
        place = path.relative_to(folder) if path != folder else Path(path.name)
        found = _SPLIT.findall(str(place))
        folders = [part for part in place.parts[:-1] if part != "data" and part.lower() not in SPLITS]
        split = found[-1].lower() if found else ""
        by_name.setdefault(("/".join(folders), SYNONYMS.get(split, split)), []).append(path)
    return by_name


def _declared(folder: Path) -> Files:
    """By the `configs` in the head of the dataset's README, with glob patterns as `datasets` reads them; empty without.

    Raises:
        UserError: it declares files that are not there.
    """
    readme = folder / "README.md"
    front = _FRONT.match(readme.read_text(encoding="utf-8", errors="replace")) if readme.is_file() else None
    try:
        declared = (yaml.safe_load(front[1]) or {}).get("configs", []) if front else []
    except (yaml.YAMLError, AttributeError):
        return {}
    by_name: Files = {}
    for config in declared if isinstance(declared, list) else []:
        for split, patterns in _patterns(config):
            name = str(config.get("config_name", "default"))
            some = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.suffix == ".parquet"})
            if not some:
                raise UserError(
                    f"{readme}: declares {' '.join(patterns)} for {name} ({split}), and no parquet file is there; download it, or "
                    "mend the declaration"
                )
            by_name.setdefault((name, split), []).extend(some)
    return by_name


def _patterns(config: Any) -> Iterable[tuple[str, list[str]]]:
    """(split, glob patterns) of what a configuration says of its files: a pattern, several, or one entry per split."""
    said = config.get("data_files") if isinstance(config, dict) else None
    if isinstance(said, dict):
        said = [{"split": split, "path": path} for split, path in said.items()]
    said = [said] if isinstance(said, (str, dict)) else said or []
    root = str(config.get("data_dir") or "").strip("/") if isinstance(config, dict) else ""
    for entry in said:
        split, path = (
            (str(entry.get("split", "train")), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        )
        paths = [path] if isinstance(path, str) else [each for each in path or [] if isinstance(each, str)]
        yield split, [f"{root}/{each}".strip("/").removeprefix("./") for each in paths]
