"""Reads a YAML file and the command line's overrides into a Config, and writes one back. Next to read: `config.py`.

All mistakes in keys and values are reported at once, each with its key and, for an unknown key, the nearest known one.
"""

import types
import typing
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ml_src.core.config import Config
from ml_src.core.errors import ConfigError
from ml_src.core.registry import suggest


def load_config(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a YAML file; `overrides` maps dotted keys ("training.batch_size") to values that take its place.

    Raises: ConfigError with every mistake that was found.
    """
    return parse_config(read_yaml(path), overrides, source=str(path))


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises: ConfigError where it cannot be read, is not YAML, or says one key twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: write one with ml-init-config DATA") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from None


def parse_config(raw: Any, overrides: Mapping[str, Any] | None = None, source: str = "config") -> Config:
    """Validate plain data (of a YAML file or a checkpoint) into a Config.

    Raises: ConfigError with every mistake that was found; `source` names the file in it.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} holds no configuration: it must be a mapping with a section `data:`")
    for key, value in (overrides or {}).items():
        raw = _with(raw, key.split("."), value, key)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        lines = _sentences([dict(problem) for problem in error.errors(include_url=False)])
        if len(lines) == 1:
            raise ConfigError(f"{source}: {lines[0]}") from None
        raise ConfigError(f"{source} has {len(lines)} mistakes:\n  " + "\n  ".join(lines)) from None


def plain(config: Config) -> dict[str, Any]:
    """Return the configuration as plain data: what YAML files and checkpoints hold."""
    return config.model_dump(mode="json")


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML."""
    text: str = yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)
    return text


def parse_set(assignment: str) -> tuple[str, Any]:
    """Split `section.key=value` of --set; the value is read as YAML.

    Raises: ConfigError where there is no key or no "=".
    """
    key, equals, value = assignment.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {assignment}: write it as section.key=value")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {assignment}: {value!r} is not valid YAML") from None


def _with(raw: dict[str, Any], keys: list[str], value: Any, name: str) -> dict[str, Any]:
    """Return a copy with one nested key replaced."""
    head, *rest = keys
    if not rest:
        return {**raw, head: value}
    inner = raw.get(head)
    if inner is not None and not isinstance(inner, dict):
        raise ConfigError(f"{name}: {head} is a {type(inner).__name__}, not a section, so nothing can be set in it")
    return {**raw, head: _with(inner or {}, rest, value, name)}


def _sentences(problems: list[dict[str, Any]]) -> list[str]:
    """One sentence a key: of a value that fits neither a list nor a word, the complaint about the word is enough."""
    by_key: dict[tuple[str | int, ...], dict[str, Any]] = {}
    for problem in problems:
        key = tuple(part for part in problem["loc"] if "[" not in str(part))
        if key not in by_key or problem["type"] == "literal_error":
            by_key[key] = problem | {"loc": key}
    return [_sentence(problem) for problem in by_key.values()]


def _sentence(problem: dict[str, Any]) -> str:
    """One validation problem in one sentence."""
    loc, kind, value = problem["loc"], problem["type"], problem["input"]
    key = ".".join(str(part) for part in _yaml_keys(loc, Config)) or "config"
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {suggest(str(loc[-1]), _fields_at(loc[:-1], Config))}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "union_tag_invalid":
        known = [word.strip().strip("'") for word in str(problem["ctx"]["expected_tags"]).split(",")]
        return f"{key}.type: unknown name {problem['ctx']['tag']!r}; {suggest(str(problem['ctx']['tag']), known)}"
    if kind == "union_tag_not_found":
        return f"{key}: `type` is missing"
    if kind == "literal_error":
        known = [word.strip().strip("'") for word in str(problem["ctx"]["expected"]).replace(" or ", ", ").split(",")]
        return f"{key}: unknown value {value!r}; {suggest(str(value), known)}"
    if kind == "string_pattern_mismatch":
        return f"{key}: {value!r} is no name for a folder: leave out / and \\"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return message if kind == "value_error" and len(loc) == 0 else f"{key}: {message}, got {value!r}"


def _choices(annotation: Any) -> dict[str, type[BaseModel]]:
    """Map the `type` word (or the class name) to each section class that an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        field = annotation.model_fields.get("type")
        words = typing.get_args(field.annotation) if field else ()
        return {str(words[0]) if words else annotation.__name__: annotation}
    found: dict[str, type[BaseModel]] = {}
    if isinstance(annotation, types.GenericAlias | types.UnionType) or typing.get_origin(annotation):
        for part in typing.get_args(annotation):
            found |= _choices(part)
    return found


def _walk(loc: tuple[str | int, ...], section: type[BaseModel]) -> tuple[list[str | int], type[BaseModel] | None]:
    """Follow a pydantic location; return it without the words of the unions, and the section where it ends."""
    keys: list[str | int] = []
    current: type[BaseModel] | None = section
    choices: dict[str, type[BaseModel]] = {}
    for part in loc:
        if isinstance(part, int):
            keys.append(part)
        elif current is None and part in choices:  # the tag of a union: not a key of the file
            current = choices[part]
        elif current is not None and part in current.model_fields:
            choices = _choices(current.model_fields[part].annotation)
            current = next(iter(choices.values())) if len(choices) == 1 else None
            keys.append(part)
        elif not (choices and "[" in str(part)):
            keys.append(part)
    return keys, current


def _yaml_keys(loc: tuple[str | int, ...], section: type[BaseModel]) -> list[str | int]:
    return _walk(loc, section)[0]


def _fields_at(loc: tuple[str | int, ...], section: type[BaseModel]) -> list[str]:
    found = _walk(loc, section)[1]
    return list(found.model_fields) if found else []


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key said twice; plain YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "a key is no word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)
