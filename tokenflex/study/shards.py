"""The corpus without its images, for the arm that shows what can be answered without looking."""

import json
from pathlib import Path

import webdataset

from ..data import Limits
from ..data.shards import find_shards, walk_shard
from ..files import staged_folder


def without_images(source: Path, target: Path) -> Path:
    """`target`, holding the shards of the folder `source` with neither images nor their tags; made only if it is not there.

    Samples keep their keys, order and questions.

    Raises:
        UserError: a shard that cannot be read. BadSample: one that is damaged.
    """
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with staged_folder(target, replaces=False) as staging:
        for shard in find_shards([str(source)]):
            with open(staging / shard.name, "wb") as file, webdataset.TarWriter(file, mtime=0, encoder=False) as writer:
                for members, _, _ in walk_shard(shard, Limits()):
                    record = json.loads(members["json"])
                    for message in record["messages"]:
                        if isinstance(message["content"], list):
                            message["content"] = [item for item in message["content"] if item["type"] != "image"]
                    writer.write({"__key__": members["__key__"], "json": json.dumps(record).encode()})
    return target
