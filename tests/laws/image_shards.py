"""Shards of samples with images of given shapes, for laws that look at sizes."""

import io
import json
import tarfile

from PIL import Image

EXIF = 0x0112


def encoded(width, height, format="PNG", orientation=0):
    """An image of noise as bytes; `orientation` is what its EXIF says."""
    image = Image.effect_noise((width, height), 90).convert("RGB")
    exif = Image.Exif()
    if orientation:
        exif[EXIF] = orientation
    file = io.BytesIO()
    image.save(file, format, exif=exif)
    return file.getvalue()


def conversation(number, images, has_bytes=True):
    """A question about images and its answer, the items with their bytes or without."""
    content = [{"type": "image", **({"image": data} if has_bytes else {})} for data in images]
    content.append({"type": "text", "text": f"What is {number}?"})
    return [{"role": "user", "content": content}, {"role": "assistant", "content": "it"}]


def write_shard(path, samples, talk=conversation):
    """A shard of one conversation per list of encoded images, as `talk` has them."""
    with tarfile.open(path, "w") as tar:
        for number, images in enumerate(samples):
            record = {"messages": talk(number, images, has_bytes=False)}
            files = {f"{number}.json": json.dumps(record).encode()}
            files |= {f"{number}.{i}.png": data for i, data in enumerate(images)}  # told by their bytes
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
