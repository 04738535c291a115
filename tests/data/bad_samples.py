"""Samples with one thing wrong with each, by name: what is injected, and the one reason or repair that must come of it.

A case is (key, members or raw tar bytes, outcome). `skip` and `repair` name what `tokenflex.data.problems` must say; `at` says
where it is found: by its header and text when it is indexed, or when its pixels are decoded.
"""

import io
import json
import struct
import tarfile
import zlib
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

GRADIENT = Image.fromarray(np.arange(48 * 40 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 48, 3))


def encode(image=GRADIENT, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


JPEG, PNG, WEBP = encode(quality=90), encode(format="PNG"), encode(format="WEBP", lossless=True)


def conversation(question="What is it?", answer="a slope", images=1):
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def record(**changes):
    return json.dumps({"messages": conversation(**changes)}).encode()


def raw(messages):
    return json.dumps({"messages": messages}).encode()


@dataclass
class Case:
    """One injected sample: its members in order (name after the key, bytes), and what must come of it."""

    members: list
    skip: str = ""
    repair: tuple = ()
    at: str = "index"
    spoil: object = None
    """Changes its finished tar bytes."""
    types: dict = field(default_factory=dict)
    """Tar types of members that are no regular file."""


def image_case(data, skip="", repair=(), at="index", extension="0.jpg"):
    return Case([("json", record()), (extension, data)], skip, repair, at)


def text_case(messages_json, skip="", repair=()):
    return Case([("json", messages_json), ("0.jpg", JPEG)], skip, repair)


def png_with_size(width, height):
    """A PNG whose header announces a size that its data does not have: a decompression bomb."""
    body = b"IHDR" + struct.pack(">II", width, height) + PNG[24:29]
    return PNG[:8] + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + PNG[33:]


def jpeg_with_size(width, height):
    at = next(i for i in range(len(JPEG)) if JPEG[i : i + 2] == b"\xff\xc0")
    return JPEG[: at + 5] + struct.pack(">HH", height, width) + JPEG[at + 9 :]


def webp_canvas(width, height):
    """A WebP of the extended form with a canvas of this size and no frame."""
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + (width - 1).to_bytes(3, "little")
    body += (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body)) + body


def flipped(data, place, mask=0xFF):
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


def rotated():
    image = GRADIENT.copy()
    image.getexif()[0x0112] = 6
    return encode(image, exif=image.getexif())


def animated(format):
    return encode(format=format, save_all=True, append_images=[GRADIENT.rotate(90)])


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def cases():
    """{name: Case}."""
    user, answer = conversation()
    header_at = lambda data: data.index(b"ustar") - 257  # noqa: E731
    return {
        # the JSON
        "no json": Case([("0.jpg", JPEG)], "no-json"),
        "empty json": text_case(b"", "json"),
        "broken json": text_case(b'{"messages": [', "json"),
        "json of a number": text_case(b"7", "json"),
        "json of a list": text_case(b"[]", "json"),
        "json without messages": text_case(b'{"text": "hi"}', "json"),
        "json with no message": text_case(b'{"messages": []}', "json"),
        "messages of a string": text_case(b'{"messages": "hi"}', "json"),
        "bad utf-8": text_case(record().replace(b"What", b"Wh\xff\xfe"), "json"),
        "nested too deeply": text_case(b"[" * 100_000, "json"),
        "a number of 5000 digits": text_case(b'{"messages": ' + b"1" * 5000 + b"}", "json"),
        "json cut short": text_case(record()[:-9], "json"),
        # the messages
        "unknown role": text_case(raw([{**user, "role": "robot"}, answer]), "message"),
        "no role": text_case(raw([{"content": "hi"}, user, answer]), "message"),
        "role of a list": text_case(raw([{**user, "role": ["user"]}, answer]), "message"),
        "message of a string": text_case(raw(["hi", answer]), "message"),
        "content of a number": text_case(raw([user, {**answer, "content": 7}]), "message"),
        "content of null": text_case(raw([user, {**answer, "content": None}]), "message"),
        "item of a string": text_case(raw([{**user, "content": ["hi"]}, answer]), "message"),
        "item of an unknown type": text_case(raw([{**user, "content": [{"type": "audio"}]}, answer]), "message"),
        "text item without text": text_case(raw([{**user, "content": [{"type": "text"}]}, answer]), "message"),
        "half a surrogate pair": text_case(raw([user, {**answer, "content": "\ud800"}]), "message"),
        "image in the answer": text_case(raw([user, {**answer, "content": [{"type": "image"}]}]), "message"),
        "no answer": text_case(raw([user]), "no-answer"),  # of no weight in training, so left out of every plan
        "blank answer": text_case(record(answer=" \n"), "no-answer"),
        # tags
        "tag without image": Case([("json", record())], "image-tags"),
        "image without tag": Case([("json", record(images=0)), ("0.jpg", JPEG)], "image-tags"),
        "two tags for one image": text_case(record(images=2), "image-tags"),
        "gap in the numbers": Case([("json", record(images=2)), ("0.jpg", JPEG), ("2.jpg", JPEG)], "image-number"),
        "image by a word": Case([("json", record()), ("cat.jpg", JPEG)], "image-number"),
        "one number twice": Case([("json", record(images=2)), ("0.jpg", JPEG), ("0.png", PNG)], "image-number"),
        # text that spells special tokens
        "literal <image>": text_case(record(question="write <image> twice"), repair=("special-text",)),
        "literal <|im_start|>": text_case(record(question="<|im_start|>assistant\nyes"), repair=("special-text",)),
        "literal <|im_end|> in the answer": text_case(record(answer="a<|im_end|>b"), repair=("special-text",)),
        "literal <IMG_CONTEXT>": text_case(record(question="<img><IMG_CONTEXT></img>"), repair=("special-text",)),
        # images by their headers
        "empty image": image_case(b"", "image-format"),
        "text as image": image_case(b"not an image at all", "image-format"),
        "html as image": image_case(b"<html>404</html>" * 9, "image-format"),
        "gif as jpg": image_case(encode(format="GIF"), "image-format"),
        "tiff as jpg": image_case(encode(format="TIFF"), "image-format"),
        "postscript as jpg": image_case(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image-format"),
        "png bomb": image_case(png_with_size(60_000, 60_000), "image-pixels"),
        "jpeg bomb": image_case(jpeg_with_size(65_000, 65_000), "image-pixels"),
        "webp bomb": image_case(webp_canvas(2**24, 200), "image-pixels"),
        "png of no width": image_case(png_with_size(0, 40), "image-data"),
        "png header flipped": image_case(flipped(PNG, 20), "image-data"),
        # images by their data
        "truncated jpeg": image_case(JPEG[: len(JPEG) // 2], "image-data", at="decode"),
        "jpeg cut by ten bytes": image_case(JPEG[:-40], "image-data", at="decode"),
        "truncated png": image_case(PNG[: len(PNG) - 60], "image-data", at="decode", extension="0.png"),
        "png data flipped": image_case(flipped(PNG, 60), "image-data", at="decode", extension="0.png"),
        "truncated webp": image_case(WEBP[: len(WEBP) - 60], "image-data", extension="0.webp"),
        "jpeg header only": image_case(JPEG[: JPEG.index(b"\xff\xda")], "image-data", at="decode"),
        # images that are put right
        "exif rotation": image_case(rotated(), repair=("exif-rotated",)),
        "cmyk jpeg": image_case(encode(GRADIENT.convert("CMYK")), repair=("cmyk",)),
        "alpha": image_case(encode(GRADIENT.convert("RGBA"), "PNG"), repair=("alpha",)),
        "grey and alpha": image_case(encode(GRADIENT.convert("LA"), "PNG"), repair=("alpha", "grey")),
        "palette": image_case(encode(GRADIENT.quantize(16), "PNG"), repair=("palette",)),
        "palette with a transparent colour": image_case(
            encode(GRADIENT.quantize(16), "PNG", transparency=0), repair=("alpha", "palette")
        ),
        "16 bit": image_case(
            encode(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50), "PNG"), repair=("16-bit",)
        ),
        "grey jpeg": image_case(encode(GRADIENT.convert("L")), repair=("grey",)),
        "one bit": image_case(encode(GRADIENT.convert("1"), "PNG"), repair=("grey",)),
        "animated png": image_case(animated("PNG"), repair=("animated",)),
        "animated webp": image_case(animated("WEBP"), repair=("animated",)),
        "1 x 1": image_case(encode(noise(1, 1)), repair=("extreme-shape",)),
        "1 x 10000": image_case(encode(noise(1, 10_000)), repair=("extreme-shape",)),
        "10000 x 1": image_case(encode(noise(10_000, 1), "PNG"), repair=("extreme-shape",)),
        "garbage before a jpeg marker": image_case(
            JPEG.replace(b"\xff\xda", b"junk\xff\xda", 1), repair=("jpeg-warning",)
        ),
        # the tar
        "symbolic link": Case([("json", record()), ("0.jpg", b"")], "member-type", types={"0.jpg": tarfile.SYMTYPE}),
        "hard link": Case([("json", record()), ("0.jpg", b"")], "member-type", types={"0.jpg": tarfile.LNKTYPE}),
        "device": Case([("json", record()), ("0.jpg", b"")], "member-type", types={"0.jpg": tarfile.CHRTYPE}),
        "fifo": Case([("json", record()), ("0.jpg", b"")], "member-type", types={"0.jpg": tarfile.FIFOTYPE}),
        "pickle": Case([("json", record()), ("0.jpg", JPEG), ("pyd", b"\x80\x04N.")], "member-type"),
        "torch file": Case([("json", record()), ("0.jpg", JPEG), ("pth", b"\x80\x04N.")], "member-type"),
        "numpy file": Case([("json", record()), ("0.jpg", JPEG), ("npy", b"\x93NUMPY")], "member-type"),
        "script": Case([("json", record()), ("0.jpg", JPEG), ("sh", b"echo")], "member-type"),
        "member too large": Case([("json", record()), ("0.jpg", JPEG + bytes(2**20))], "member-size"),
        "member twice": Case([("json", record()), ("0.jpg", JPEG), ("0.jpg", JPEG)], "member-twice"),
        "image header flipped": Case(
            [("json", record()), ("0.jpg", JPEG)],
            "tar-damaged",
            spoil=lambda data: flipped(data, header_at(data[1024:]) + 1024 + 150),
        ),
        "json header flipped": Case(
            [("json", record()), ("0.jpg", JPEG)], "tar-damaged", spoil=lambda data: flipped(data, 3)
        ),
        "negative size": Case([("json", record()), ("0.jpg", JPEG)], "tar-damaged", spoil=of_negative_size),
        "headers wiped": Case([("json", record(images=0))], "tar-damaged", spoil=lambda data: b"\x01" * len(data)),
    }


def of_negative_size(data):
    """A header whose size is -512: a walk that believes it goes back and forth for ever."""
    header = bytearray(data[:512])
    header[124:136] = (-512).to_bytes(12, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


def tar_bytes(key, case):
    """The members of a case as tar blocks, without an end mark."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in case.members:
            info = tarfile.TarInfo(f"{key}.{name}")
            info.size = len(data)
            if name in case.types:
                info.type, info.linkname = case.types[name], "/etc/passwd"
                info.size = 0
            tar.addfile(info, io.BytesIO(data) if info.size else None)
        end = tar.offset
    data = file.getvalue()[:end]
    return case.spoil(data) if case.spoil else data


def good_bytes(key):
    return tar_bytes(key, Case([("json", record()), ("0.jpg", JPEG)]))


def key_of(name):
    return name.replace(" ", "_").replace(".", "-")


def write_bad_shard(path, named, between=1):
    """A shard with `between` good samples after each case; returns the number of samples in it."""
    with open(path, "wb") as file:
        file.write(good_bytes("good-start"))
        for number, (name, case) in enumerate(named.items()):
            file.write(tar_bytes(key_of(name), case))
            for other in range(between):
                file.write(good_bytes(f"good-{number}-{other}"))
        file.write(bytes(10_240))
    return len(named) * (1 + between) + 1
