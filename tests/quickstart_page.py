#!/usr/bin/env python3
"""What a run of the quick start came to, into docs/quickstart.md, docs/results/quickstart.json and quickstart.png.

python tests/quickstart_page.py runs/quickstart/accuracy.json
"""

import json
import re
import sys
from pathlib import Path

from tokenflex.evaluate import accuracy_table, plot_accuracy
from tokenflex.files import write_whole

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"<!-- accuracy -->\n(.*?)\n<!-- end accuracy -->", re.DOTALL)


def main(source):
    record = json.loads(Path(source).read_text())
    write_whole(DOCS / "results" / "quickstart.json", json.dumps(record, indent=1) + "\n")
    plot_accuracy(record, DOCS / "results" / "quickstart.png")
    table = f"<!-- accuracy -->\n{accuracy_table(record)}\n<!-- end accuracy -->"
    page = DOCS / "quickstart.md"
    write_whole(page, BLOCK.sub(lambda _: table, page.read_text()))
    print(accuracy_table(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
