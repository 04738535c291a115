"""Strict loading: YAML file, then `section.key=value` overrides, then one check; errors are one line each."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from ..errors import UserError
from .schema import RunConfig

SEQUENCE_PARALLEL = re.compile(
    r"ulysses|ring_attention|((sequence|context)(_?parallel\w*|_ranks|_size|_degree)|[sc]p(_ranks|_size|_degree))$"
)
"""Names that people give to what is left out whole."""


class _Loader(yaml.SafeLoader):
    """YAML's safe loader without its surprises: `3e-3` is a number; `12:30:45`, `on` and `no` are text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float", ":bool", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in (
    ("bool", r"^(true|True|false|False)$"),
    ("int", r"^[-+]?\d[\d_]*$"),
    ("float", r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?$"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), None)


def load_config(
    path: str | PathLike | None = None, overrides: Sequence[str] = (), schema: type[RunConfig] = RunConfig
) -> RunConfig:
    """The checked configuration of a YAML file (or the defaults) with `section.key=value` overrides on top.

    A file may say `extends: other.yaml` and leave out what it has in common with that one.

    Raises:
        UserError: no such file, broken YAML, an unknown key (the nearest is named), or a value of the wrong type.
    """
    values = _read(Path(path)) if path is not None else {}
    values = apply_overrides(values, overrides)
    where = f"config {path}" if path is not None else "config"
    try:
        return schema.model_validate(_merged(schema().model_dump(), values))
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_explain(problem, schema) for problem in error.errors())) from None


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a YAML file, over those of the file that it `extends`, whose name is relative to its own folder.

    Raises:
        UserError: a file that is not there or not YAML, one whose top is no mapping, or one that extends itself.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader) or {}
    except OSError as error:
        raise UserError(
            f"config {path}: {error.strerror}; give the path of a YAML file, for example configs/quickstart.yaml"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path}: holds a {type(values).__name__} at the top; wanted `section: ...` entries")
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise UserError(f"config {path}: extends is {base!r}; wanted the name of one YAML file")
    if path.resolve() in seen:
        raise UserError(f"config {path}: extends itself, by way of {base}; name another file")
    return _merged(_read(path.parent / base, (*seen, path.resolve())), values)


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `values` with each `section.key=value` of `overrides` set.

    Raises:
        UserError: an override without `=`, or one that goes through a value that is no section.
    """
    result = dict(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path:
            raise UserError(f"override {override!r}: wanted section.key=value, for example train.num_steps=200")
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            value = text
        *sections, key = path.lstrip("-").split(".")
        node = result
        for section in sections:
            inner = node.get(section, {})
            if not isinstance(inner, dict):
                raise UserError(f"override {override!r}: {section} is {inner!r}, not a section")
            node[section] = node = dict(inner)
        node[key] = value
    return result


def _merged(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over `defaults`, section by section, so that one given key leaves its section's other defaults alone."""
    merged = dict(defaults)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _explain(problem: Mapping[str, Any], schema: type[BaseModel]) -> str:
    """One pydantic problem in our words: where, what came, what was wanted, the nearest key."""
    path = [str(part) for part in problem["loc"]]
    where = ".".join(path)
    if problem["type"] == "extra_forbidden" and SEQUENCE_PARALLEL.match(path[-1]):
        return (
            f"unknown key {where}: there is no sequence parallelism here, a pack lies whole on one rank; leave it out, and for longer "
            "packs set model.gradient_checkpointing=true or a higher ZeRO stage"
        )
    if problem["type"] == "extra_forbidden":
        section = _section(schema, path[:-1])
        known = list(section.model_fields)
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
        everywhere = [key for key, _, _ in _fields(schema)]
        elsewhere = [key for key in everywhere if key.split(".")[-1] == path[-1]]
        hint = f"; did you mean {'.'.join([*path[:-1], near[0]])}?" if near else ""
        hint = f"; did you mean {elsewhere[0]}?" if elsewhere else hint
        return f"unknown key {where}{hint or '; known here: ' + ', '.join(known)}"
    message = problem["msg"].removeprefix("Value error, ")
    came = "" if problem["type"] == "value_error" else f" (got {problem['input']!r})"
    return f"{where}: {message[0].lower() + message[1:]}{came}" if where else message + came


def _section(schema: type[BaseModel], path: Sequence[str]) -> type[BaseModel]:
    for part in path:
        if part not in schema.model_fields:  # a place in a list of sections
            continue
        schema = _section_type(schema.model_fields[part].annotation) or schema
    return schema


def _section_type(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _fields(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, documentation) of every leaf."""
    for name, field in schema.model_fields.items():
        inner = _section_type(field.annotation)
        if inner:
            # the default of a section may differ from the defaults of its type
            for key, default, text in _fields(inner, f"{prefix}{name}."):
                yield key, getattr(field.default, key.rsplit(".", 1)[-1], default), text
        else:
            yield prefix + name, field.default, field.description or ""


def describe(schema: type[BaseModel] = RunConfig) -> str:
    """Documentation of every key, one per paragraph, for `--help`."""
    lines = []
    for key, default, text in _fields(schema):
        lines += [f"  {key}={_short(default)}", f"      {text}"]
    return "\n".join(lines)


def _short(value: Any) -> str:
    if value is PydanticUndefined:
        return "(must be given)"
    if isinstance(value, tuple):
        return "[" + ",".join(_short(entry) for entry in value) + "]"
    return str(value) if not isinstance(value, str) or value else "''"


def save_config(config: BaseModel, path: str | PathLike) -> None:
    """Write a configuration as YAML that `load_config` reads back to an equal one."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")
