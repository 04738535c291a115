"""The arms: each trains the same model on the same shards, some steps at a time, and says how many useful tokens it took and how long.

`arms.py SPEC.json`; reads a number of steps per line from standard input, answers with a line of JSON each. Tokens of samples are useful,
text and visual; padding is not.
"""

import contextlib
import io
import json
import random
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from shards import read_shards

from tokenflex import parallel
from tokenflex.config import load_config
from tokenflex.corpus import resolve_embedded
from tokenflex.layout import RunLayout
from tokenflex.train.guarding import SoleWriter, watched
from tokenflex.train.observers import Observer
from tokenflex.train.run import Run
from tokenflex.train.trainer import StopRequest, Trainer


class Counting(Observer):
    """Adds up the tokens of batches."""

    tokens = 0

    def on_batch(self, step, batch):
        self.tokens += batch.input_ids.shape[1]


class Ours:
    """The trainer itself: its loop, step by step, with its checks, observers and logging."""

    def __init__(self, recipe, config, ds_config, ranks, heartbeat):
        self.run = run = Run(recipe, config, ds_config, ranks, heartbeat, lambda text: None)
        run.prepare(fresh=True)
        run.build()
        run.resume()
        self.counting = Counting()
        self.trainer = Trainer(
            settings=config.train, engine=run.engine, objective=run.objective, open_batches=run.open_batches, rates=run.rates,
            state=run.state, metrics=run.metrics, observers=[*run.observers, self.counting], stop=StopRequest(),
        )  # fmt: skip
        run.engine.train()
        self.batches = run.open_batches(run.state.progress)

    def steps(self, number):
        """Useful tokens of so many steps."""
        self.counting.tokens = 0
        for _ in range(number):
            outcome = self.trainer.run_step(self.batches)
            self.run.state.record(outcome)
            self.trainer._tell("on_step", outcome)
            self.trainer._agree(outcome)
        return self.counting.tokens


class Paced:
    """A Trainer of transformers (or of TRL) stopped every so many steps, to be asked for the next."""

    def __init__(self, trainer_class, ask, **arguments):
        from transformers import TrainerCallback

        self.left, self.tokens = 0, 0
        paced = self

        class Counting(trainer_class):
            def training_step(self, model, inputs, *rest):
                mask = inputs.get("attention_mask")
                paced.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
                return super().training_step(model, inputs, *rest)

        class Pace(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                paced.left -= 1
                while paced.left <= 0:
                    number = ask(paced.tokens)
                    paced.left, paced.tokens = number or 1, 0
                    if not number:
                        control.should_training_stop = True
                return control

        self.trainer = Counting(callbacks=[Pace()], **arguments)

    def go(self):
        """One step that is not asked about, then as many as are asked for."""
        self.trainer.train()


def training_arguments(kind, spec, **more):
    """Settings that the peers' trainers share."""
    return kind(
        output_dir=spec["folder"], per_device_train_batch_size=spec["batch_size"], max_steps=10**6, report_to=[], learning_rate=1e-4,
        save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False, optim="adamw_torch_fused",
        dataloader_num_workers=spec["num_workers"], bf16=torch.cuda.is_available(), seed=0, **more,
    )  # fmt: skip


def conversation(messages, images):
    """Messages with their images in place, as transformers' chat templates take them."""
    left = iter(images)

    def item(part):
        if part["type"] != "image":
            return part
        return {"type": "image", "image": Image.open(io.BytesIO(next(left))).convert("RGB")}

    def content(value):
        return [{"type": "text", "text": value}] if isinstance(value, str) else [item(part) for part in value]

    return [{"role": turn["role"], "content": content(turn["content"])} for turn in messages]


class PaddedBatches:
    """Samples -> a batch with one drawn count, rows padded to the longest."""

    def __init__(self, processor, counts, probabilities):
        self.processor, self.counts, self.probabilities = processor, counts, probabilities
        self.draw = random.Random(0)

    def __call__(self, samples):
        (count,) = self.draw.choices(self.counts, self.probabilities)
        batch = self.processor.apply_chat_template(
            [conversation(*sample) for sample in samples], tokenize=True, return_dict=True, return_tensors="pt", padding=True,
            return_assistant_tokens_mask=True, num_visual_tokens=count,
        )  # fmt: skip
        learned = batch.pop("assistant_masks").bool()
        return {**batch, "labels": batch["input_ids"].masked_fill(~learned, -100)}


def padded(spec, ask):
    """transformers' Trainer on the exported model: random order, padded rows, one count per batch."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

    processor = AutoProcessor.from_pretrained(spec["model"])
    Paced(
        Trainer, ask, model=AutoModelForImageTextToText.from_pretrained(spec["model"]),
        args=training_arguments(TrainingArguments, spec), train_dataset=read_shards(Path(spec["shards"])),
        data_collator=PaddedBatches(processor, spec["counts"], spec["probabilities"]),
    ).go()  # fmt: skip


def packed_text(spec, ask):
    """TRL's SFT with packing, which it has for text alone: the model's language model on the same rows."""
    import datasets
    import trl
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(spec["model"])
    rows = []
    for messages, images in read_shards(Path(spec["shards"])):
        row = processor.apply_chat_template(
            [conversation(messages, images)], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, learned = (list(map(int, row[name][0])) for name in ("input_ids", "assistant_masks"))
        rows.append(
            {"input_ids": ids, "labels": [token if is_learned else -100 for token, is_learned in zip(ids, learned)]}
        )
    settings = training_arguments(trl.SFTConfig, spec, packing=True, max_length=spec["pack_length"])
    Paced(
        trl.SFTTrainer, ask, model=AutoModelForImageTextToText.from_pretrained(spec["model"]).language_model, args=settings,
        train_dataset=datasets.Dataset.from_list(rows), processing_class=processor.tokenizer,
    ).go()  # fmt: skip


def ours(spec, ask):
    """The trainer, in this process."""
    recipe = load_config(spec["recipe"], spec["overrides"])
    parallel.quiet_libraries()
    ranks = parallel.join_ranks(parallel.join())
    config = resolve_embedded(recipe, lambda text: None)
    layout = RunLayout.of(config)
    with SoleWriter(layout, ranks), watched(layout, config.train, ranks) as heartbeat:
        arm = Ours(recipe, config, parallel.load_ds_config(spec["ds_config"]), ranks, heartbeat)
        tokens = arm.steps(1)
        while number := ask(tokens):
            tokens = arm.steps(number)
        arm.batches.close()
        arm.run.close()


def main(path):
    """Run the arm of a specification, asked by lines of standard input."""
    spec = json.loads(Path(path).read_text())
    answers = sys.stdout
    last = [time.perf_counter(), time.process_time()]

    def ask(tokens):
        wall, cpu = time.perf_counter(), time.process_time()
        print(json.dumps({"tokens": tokens, "s": wall - last[0], "cpu_s": cpu - last[1]}), file=answers, flush=True)
        line = sys.stdin.readline().strip()
        last[:] = [time.perf_counter(), time.process_time()]
        return int(line or 0)

    torch.set_num_threads(spec["threads"])
    with contextlib.redirect_stdout(sys.stderr):
        ARMS[spec["arm"]](spec, ask)


ARMS = {"ours": ours, "padded": padded, "packed text": packed_text}

if __name__ == "__main__":
    main(sys.argv[1])
