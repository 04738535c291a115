"""Bring your own data: LLaVA JSON, OpenAI JSONL, Hugging Face parquet and plain webdataset shards -> shards of ours."""

from .run import FORMATS, Options, convert, first_skipped

__all__ = ["FORMATS", "Options", "convert", "first_skipped"]
