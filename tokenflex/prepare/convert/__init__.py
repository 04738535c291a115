"""Bring your own data: LLaVA JSON, OpenAI JSONL, Hugging Face parquet and plain webdataset shards -> shards of ours."""

from .run import FORMATS, Options, convert

__all__ = ["FORMATS", "Options", "convert"]
