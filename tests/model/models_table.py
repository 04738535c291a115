"""Writes the tables of docs/models.md: every language model and vision encoder that transformers has, through the probe.

python tests/model/models_table.py            every type, some minutes on two cores
python tests/model/models_table.py qwen3 bit  only these; prints and writes nothing
"""

import logging
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

import zoo

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def main():
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    kinds = [name for name in sys.argv[1:] if name in ("text", "vision")] or ["text", "vision"]
    chosen = set(sys.argv[1:]) - set(kinds)
    for name, types, tried in (
        ("text", zoo.text_types(), zoo.try_text),
        ("vision", zoo.vision_types(), zoo.try_vision),
    ):
        if name not in kinds:
            continue
        rows = {}
        for model_type in types:
            if not chosen or model_type in chosen:
                rows[model_type] = tried(model_type)
                print(name, model_type, rows[model_type], flush=True)
        if not chosen:
            write(name, rows)


def write(name, rows):
    """Put the table of `name` between its marks in the page."""
    kinds = Counter(result.split(":")[0].split(" ")[0] for result in rows.values())
    words = {"its": "tried as their text part's type", "not": "not tried"}
    some = ", ".join(f"{number} {words.get(kind, kind)}" for kind, number in sorted(kinds.items()))
    lines = [f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}: {some}.", ""]
    lines += ["| model type | result |", "|---|---|"]
    lines += [f"| `{model_type}` | {result.replace('|', '/')} |" for model_type, result in rows.items()]
    page = PAGE.read_text()
    table = f"<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- end {name} -->"
    PAGE.write_text(re.sub(f"<!-- {name} -->.*<!-- end {name} -->", lambda _: table, page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
