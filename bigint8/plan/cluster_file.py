"""YAML that a person wrote, held against a pydantic model: what is wrong is told with its line and what it may mean."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..errors import BigInt8Error, in_one_line

_TEXT = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")

Model = TypeVar("Model", bound=BaseModel)
Where = tuple[int | str, ...]

MOST_BYTES = 2**20
"""Of a file that a person wrote. A checkpoint that is named by mistake is not read."""


def read_text(path: Path) -> str:
    """A file's text. Raises BigInt8Error for one that is not there, a folder, too large, or not text."""
    if path.is_dir():
        raise BigInt8Error(f"{path}: this is a folder; name a YAML file")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise BigInt8Error(f"{path}: {path.stat().st_size} bytes are too many for a file that a person wrote")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BigInt8Error(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BigInt8Error(f"{path}: this is no text in UTF-8; name a YAML file") from None


def validated(model: type[Model], text: str, where: str) -> Model:
    """What a YAML text says. `where`: the file's name, for errors. Raises BigInt8Error with the line of the first."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        written = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}" if mark else ""
        raise BigInt8Error(f"{where}{at}: this is no YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise BigInt8Error(f"{where}: this is no YAML: {in_one_line(error)}") from None
    if root is None or written is None:
        raise BigInt8Error(f"{where}: the file is empty; it needs {' and '.join(_required(model))}")
    for line, wrong in _wrong_keys(root, set()):
        raise BigInt8Error(f"{where}, line {line}: {wrong}")
    try:
        return model.model_validate(written)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        lines = [_line(root, each["loc"]) for each in found]
        # a key that is missing may be there with a typo, which says more
        first = min(range(len(found)), key=lambda i: (found[i]["type"] == "missing", lines[i]))
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        at = f", line {lines[first]}" if found[first]["loc"] else ""  # otherwise it is about the whole file
        raise BigInt8Error(f"{where}{at}: {_told(model, found[first])}{more}") from None


def _line(node: yaml.Node, location: Where) -> int:
    """Where the part of the text is that pydantic's error location names, as far as the text has it; from 1."""
    line = int(node.start_mark.line) + 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(part)), None)
            if found is None:
                continue  # a name that only the model has, such as that of a short form's field
            line, node = int(found[0].start_mark.line) + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = int(node.start_mark.line) + 1
    return line


def _told(model: type[BaseModel], error: ErrorDetails) -> str:
    """An error of pydantic as a person reads it."""
    location, kind = error["loc"], error["type"]
    path = ".".join(str(part) for part in location if part != "[key]")
    if kind == "extra_forbidden":
        known = _keys(model, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, 1, cutoff=0.5)
        meant = f"did you mean {close[0]}? " if close else ""
        return f"{path}: no such key; {meant}there are {', '.join(known)}"
    if kind == "missing":
        return f"{path} is missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if kind == "model_type":
        message = f"write keys and values here, of {', '.join(_keys(model, location))}"
    if not location:
        return message
    given = "" if isinstance(error["input"], dict | list) and error["input"] else f" {error['input']!r}"
    return f"{path}{given}: {message}"


def _keys(model: type[BaseModel], location: Where) -> list[str]:
    """The keys that the model at this place has."""
    here: Any = model
    for part in location:
        fields = getattr(here, "model_fields", {})
        if part in fields:
            here = next(_models(fields[part].annotation), here)
    return list(here.model_fields)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a type names, such as that of a list's items."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _required(model: type[BaseModel]) -> list[str]:
    return [name for name, field in model.model_fields.items() if field.is_required()]


def _wrong_keys(node: yaml.Node, seen: set[int]) -> Iterator[tuple[int, str]]:
    """Keys that stand twice, of which YAML would take the last, and those it takes for no text: line, what to say."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _wrong_keys(item, seen)
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name, line = str(key.value), int(key.start_mark.line) + 1
        if key.tag not in _TEXT:
            yield line, f"YAML takes the name {name} for something else than text; put quotes around it"
        if name in lines:
            yield line, f"{name} stands here again, after line {lines[name]}; rename one"
        lines[name] = line
        yield from _wrong_keys(value, seen)
