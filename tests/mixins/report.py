"""Runs transformers' own mixins over the exported classes, counts them, and writes docs/models.md's table of what was skipped and why.

python tests/mixins/report.py               all of them; a skip that has no reason in `REASONS` is an error
python tests/mixins/report.py -k beam       some of them; the page stays as it is

Arguments are pytest's. `fetch.py` has to have run.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

import fetch

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "models.md"
FILES = ["transformers_model.py", "transformers_processor.py"]
REASONS = {
    r"test requires (multiple )?accelerators?|test requires MPS": "need a GPU, or several",
    r"test requires Flash Attention": "need Flash Attention 2, 3 or 4 on a GPU",
    r"test requires the kernels library": "need the package `kernels`, which fetches kernels from the hub",
    r"test requires optimum-quanto": "need optimum-quanto: quantized caches are not installed here",
    r"test requires (librosa|Torchcodec)|(audio|video)_processor|feature_extractor|no (audio|video) processor|accept videos": "of audio "
    "and video: this processor has images and text",
    r"test is slow": "of compiled attention and torch.compile at length, which transformers itself runs by night only",
    r"does not support SDPA": "of models of one modality: the composite model has its own test, which runs",
    r"_keep_in_fp32_modules": "of modules kept in 32 bit: neither class names some",
    r"grouped_mm|sparse experts|output_router_logits": "of mixtures of experts: the tiny language model is none",
    r"partial rope|axial RoPE|position embeddings|sliding window|recurrent layer|MTP keys|encoder-decoder": "of parts that the "
    "tiny language model has not: other rotary embeddings, windows, states, heads for several tokens, an encoder",
    r"Only PrefixChange conversions": "of conversions of old weights: there are none, names are kept",
    r"less than 2 backends": "compare two back ends of an image processor: there is one",
    r"No validation found for `preprocess`": "of a decorator that is not used: unknown keywords are refused by the processor",
    r"dict size or list image_mean": "of sizes as a dict: sizes are `height` and `width` here",
    r"does not support tools": "of a template with tools: the test's tokenizer has one without (`tests/laws/test_rendering.py` has such)",
    r"^own: ": "",
}
"""What a skip says -> why it is one; a skip with a reason of our own says it itself."""


class Skips:
    """Counts results, and skips by what they say."""

    def __init__(self):
        self.counts, self.said = Counter(), Counter()

    def pytest_runtest_logreport(self, report):
        if "subtest" in type(report).__name__.lower() and not report.skipped:
            return  # its test says the rest
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.skipped:
            self.said[str(report.longrepr[2]).removeprefix("Skipped: ")] += 1


def main():
    arguments = sys.argv[1:]
    skips = Skips()
    settings = ["-c", str(HERE / "pytest.ini"), "-q", "--timeout", "300", *arguments]
    status = pytest.main([*settings, *(str(HERE / name) for name in FILES)], plugins=[skips])
    reasons, unknown = explained(skips.said)
    counts = ", ".join(f"{skips.counts[name]} {name}" for name in ("passed", "failed", "skipped"))
    generation = fetch.sources()["generation"]
    print(f"\n{counts}; generation mixin: {'NOT RUN, it could not be had' if generation == 'nowhere' else generation}")
    for text in unknown:
        print(f"skipped without a reason in {Path(__file__).name}: {text}", file=sys.stderr)
    if not arguments and not unknown and not status and generation != "nowhere":
        write(f"{counts}; the generation mixin is from {generation}", reasons)
    return status or int(bool(unknown))


def explained(said):
    """({reason: number}, skips that nothing explains)."""
    reasons, unknown = Counter(), []
    for text, number in said.items():
        pattern = next((pattern for pattern in REASONS if re.search(pattern, text)), None)
        if pattern is None:
            unknown.append(text)
        else:
            reasons[REASONS[pattern] or text.removeprefix("own: ")] += number
    return reasons, unknown


def write(counts, reasons):
    """Put counts and table between their marks in the page."""
    lines = [f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, CPU: {counts}.", ""]
    lines += ["| skipped | why |", "|---:|---|"]
    lines += [f"| {number} | {reason} |" for reason, number in reasons.most_common()]
    table = "<!-- mixins -->\n" + "\n".join(lines) + "\n<!-- end mixins -->"
    page = PAGE.read_text()
    PAGE.write_text(re.sub("<!-- mixins -->.*<!-- end mixins -->", lambda _: table, page, flags=re.DOTALL))


if __name__ == "__main__":
    sys.exit(main())
