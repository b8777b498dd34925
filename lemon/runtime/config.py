"""Typed configuration: pydantic's fields hold every default; YAML presets and ``key=value`` words change them.

``conf/stages/<stage>/<variant>.yaml`` are the variants of a stage, ``conf/presets/<group>/<name>.yaml`` what a choice
(``ssl=NAME``) stands for. Nothing here imports torch or Ray, so a wrong key, type or value is reported within a second.
"""

from __future__ import annotations

import difflib
import errno
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from lemon.errors import ConfigError, Fault
from lemon.runtime.registry import Registry, unknown
from lemon.runtime.secrets import holds_secret, names_secret, redacted


class _StringLoader(yaml.SafeLoader):
    """YAML whose plain scalars are what the same words are on the command line: 0012, NO and 1.50 stay text."""


def _scalar(_: _StringLoader, node: yaml.ScalarNode) -> Any:
    return node.value if node.style else plain_value(node.value)


_StringLoader.yaml_implicit_resolvers = {}
_StringLoader.add_constructor("tag:yaml.org,2002:str", _scalar)

_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")

PRESET = "preset"
"""In a mapping: the name of the preset that its other keys change."""


class Frozen(BaseModel):
    """Base of every config: immutable, and a key that is not a field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), coerce_numbers_to_str=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _exponents_are_numbers(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        """1e6 is a whole number too, where one is expected; it reaches a field as text, which a path may be."""
        try:
            return handler(value)
        except ValidationError:
            if isinstance(value, str) and _EXPONENT.fullmatch(value):
                return handler(float(value))
            raise

    def check_inputs(self) -> None:
        """Raises ConfigError for inputs that are plainly not there, as a stage's ``cells``; imports nothing heavy."""


class Settings(Frozen):
    """A config whose numbers are numbers: neither infinite nor NaN."""

    model_config = ConfigDict(allow_inf_nan=False)


C = TypeVar("C", bound=Frozen)


def raise_faults(faults: Iterable[Fault]) -> None:
    """For validators of a whole config: raise pydantic's ValidationError with a line for each, if any."""
    if details := [
        InitErrorDetails(
            type=PydanticCustomError("fault", "Input should be {expected}", {"expected": fault.expected}),
            loc=tuple(fault.key.split(".")),
            input=fault.got,
        )
        for fault in faults
    ]:
        raise ValidationError.from_exception_data("config", details)


# --- paths ------------------------------------------------------------------------------------------------------------


def _validate_name_or_path(text: str) -> str:
    """A path or URI that can be asked for. Raises ValueError, which never tells a URI that holds a secret."""
    if not text.removeprefix("file://").strip():
        raise ValueError(f"got {text!r}, which names nothing; expected a path (is a variable of the shell not set?)")
    if holds_secret(text):
        raise ValueError(
            f"got a {text.partition('://')[0]}:// address that holds a user, key or option; expected the address "
            "alone, the rest in the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY) or a profile"
        )
    if not _is_utf8(text):
        raise ValueError(f"got {text!r}; expected a path in UTF-8: rename what it names")
    if "://" not in text:
        _check_kind(text)
    return text


def _is_utf8(text: str) -> bool:
    """Whether a text can be written: bytes of the command line that are no UTF-8 come as half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_kind(path: str) -> None:
    """Refuse what is there but no file or folder: a pipe would be waited for without end. Raises ValueError."""
    shown = repr(path) if len(path) <= _MAX_PATH_CHARACTERS else f"{path[:_MAX_PATH_CHARACTERS]!r}..."
    try:
        mode = os.stat(os.path.expanduser(path)).st_mode  # noqa: PTH111, PTH116  (Path would make "a//b" another text)
    except ValueError:
        raise ValueError(f"got {shown}; expected a path without a zero byte") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise ValueError(f"got {shown}; expected a path that can be opened: {error.strerror}") from None
        return  # absent, or not to be seen from here: whoever reads it tells
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"got {shown}, which is a pipe or a device; expected a file or folder")


_MAX_PATH_CHARACTERS = 80
"""Of a path that cannot be opened."""


def _validate_path(text: str) -> str:
    if "://" in _validate_name_or_path(text) and not re.match(r"file://|s3://[A-Za-z0-9][\w.-]*(?:/|$)", text):
        raise ValueError(f"got {text!r}; expected a local path or s3://bucket/prefix")
    return text


def _validate_local_path(text: str) -> str:
    if "://" in _validate_name_or_path(text):
        raise ValueError(f"got {text!r}; expected a path on a local disk")
    return text


def _validate_paths(text: str | list[str]) -> str | list[str]:
    if not text:
        raise ValueError(f"got {text!r}, which names nothing; expected a path (is a variable of the shell not set?)")
    for one in [text] if isinstance(text, str) else text:
        _validate_path(one)
    return text


AnyPath = Annotated[str, AfterValidator(_validate_path)]
"""A file or folder, also at s3://."""

AnyPaths = Annotated[str | list[str], AfterValidator(_validate_paths)]
"""One or several of them."""

LocalPath = Annotated[str, AfterValidator(_validate_local_path)]
"""One that cannot be at s3://: files that are mapped into memory, or that libraries open by their path."""

NameOrPath = Annotated[str, AfterValidator(_validate_name_or_path)]
"""A path or a name that is looked up, as of an encoder (``uni:weights.bin``)."""


# --- choices ----------------------------------------------------------------------------------------------------------


class Choice:
    """Marks a field that is chosen by name: ``ssl=NAME``, or keys below it that change a preset: ``ssl.out_dim=64``.

    The presets lie in ``conf/presets/<group>``; a path that ends in .yaml is one of the user's own.

    Args:
        group: folder of the presets.
        default: preset that keys without a choice change.
        registry: which config a preset's ``name`` is of; None: the field's own type.
    """

    def __init__(self, group: str, default: str, *, registry: Registry | None = None) -> None:
        self.group, self.default, self.registry = group, default, registry

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(lambda value: self.build(value, source))

    def build(self, value: Any, kind: type[BaseModel]) -> BaseModel:
        """The config that a value stands for: a preset's name, or changes to one. Raises ValueError."""
        if isinstance(value, BaseModel):
            return value
        if not isinstance(value, (str, Mapping)):
            raise ValueError(f"got {value!r}; expected one of {', '.join(self.names())}")
        changes = {PRESET: value} if isinstance(value, str) else dict(value)
        # Of parts that are registered, a name alone tells which is meant.
        name = str(changes.pop(PRESET, (changes.get("name") if self.registry else None) or self.default))
        if name in preset_names(self.group) or _is_file(name):
            base = read_preset(self.group, name)
        elif name in (names := self.names()):
            base = {"name": name}
        else:
            raise ValueError(unknown(name, names))
        values = merged(base, changes)
        if self.registry is None:
            return kind.model_validate(values)
        if "name" not in values:
            raise ValueError(f"{name}: expected name=..., or preset=... that it changes")
        config: BaseModel = self.registry.load(str(values["name"])).model_validate(values)
        return config

    def names(self) -> list[str]:
        """What may be chosen: presets, and what is registered without one."""
        known = preset_names(self.group)
        return known + [name for name in (self.registry.names() if self.registry else []) if name not in known]

    def classes(self, kind: Any) -> list[type[BaseModel]]:
        """What the field may hold; what cannot be imported is left out."""
        return [kind] if self.registry is None else [*self.registry.parts().values()]


def preset_names(group: str) -> list[str]:
    """Names of the presets of a group."""
    return sorted(path.stem for path in (conf_dir() / "presets" / group).glob("*.yaml"))


def read_preset(group: str, name: str, *, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a preset, of ``conf/presets/<group>`` or a YAML file, on top of those of its own ``preset``.

    A file is looked for beside the file ``below`` that names it. Raises ValueError, one line, for an unknown name, for
    a file that is no mapping, and for presets that name each other in a circle.
    """
    folder = below[-1].parent if below else Path()
    path = folder / os.path.expanduser(name) if _is_file(name) else conf_dir() / "presets" / group / f"{name}.yaml"  # noqa: PTH111
    if not path.is_file() or not (_is_file(name) or name in preset_names(group)):
        raise ValueError(unknown(name, preset_names(group)))
    if path in below:
        raise ValueError(f"{path}: names itself as its preset")
    values = read_yaml(path)
    if PRESET not in values:
        return values
    return merged(read_preset(group, str(values.pop(PRESET)), below=(*below, path)), values)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ValueError, one line, for another one."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StringLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if values is not None and not isinstance(values, dict):
        raise ValueError(f"{path}: expected keys with values")
    return values or {}


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the leaves of ``changes`` in the place of its own."""
    both = {key: value for key, value in changes.items() if key in base}
    inner = {
        key: merged(base[key], value)
        for key, value in both.items()
        if isinstance(value, Mapping) and isinstance(base[key], Mapping)
    }
    return {**base, **changes, **inner}


# --- composing and validating -----------------------------------------------------------------------------------------


def conf_dir() -> Path:
    """The folder of YAML files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "conf", package.parent / "conf"):
        if candidate.is_dir():
            return candidate
    raise ConfigError(f"conf/ not found beside {package}: reinstall the package or run from a checkout")


def load(stage: str, overrides: Sequence[str | Mapping[str, Any]], model: type[C]) -> C:
    """The config of a stage: its variant's values, changed by what is given.

    Args:
        stage: names the folder of variants in ``conf/stages``.
        given: ``key=value`` words, or nested values; of two for one key the later wins, and choices
            (``ssl=NAME``) come before keys below them. ``variant=smoke`` selects ``conf/stages/<stage>/smoke.yaml``.
        model: the config.

    Raises ConfigError, one line a fault.
    """
    changes = list(_leaves(overrides))
    variants = [str(value) for path, value in changes if path == ("variant",)]
    values = read_variant(stage, variants[-1] if variants else "default")
    for path, value in sorted(changes, key=lambda change: not _is_choice(change[0], change[1], changes)):
        if path != ("variant",):
            _set(values, path, value)
    return validate(values, model)


def variant_names(stage: str) -> list[str]:
    """Names of the variants of a stage; ``default`` changes nothing."""
    return sorted({"default", *(path.stem for path in (conf_dir() / "stages" / stage).glob("*.yaml"))})


def read_variant(stage: str, name: str) -> dict[str, Any]:
    """The values of a variant. Raises ConfigError for an unknown one."""
    if name not in (known := variant_names(stage)):
        raise ConfigError(Fault("variant", name, f"one of {', '.join(known)}"))
    path = conf_dir() / "stages" / stage / f"{name}.yaml"
    try:
        return read_yaml(path) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(str(error)) from None


def read_all() -> list[str]:
    """Read every variant and preset that is shipped; returns their names. Raises ConfigError."""
    names = []
    for path in sorted((conf_dir()).glob("*/*/*.yaml")):
        kind, group, name = *path.relative_to(conf_dir()).parts[:2], path.stem
        try:
            read_variant(group, name) if kind == "stages" else read_preset(group, name)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        names.append(f"{group}/{name}")
    return names


def validate(values: Any, model: type[C]) -> C:
    """Validate plain values; raises ConfigError with a Fault for each that is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(*(_fault_of(fault, model) for fault in error.errors())) from None


Keys = tuple[str, ...]


def _leaves(overrides: Iterable[str | Mapping[str, Any]], prefix: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """(path of keys, value) of words and nested values, in their order; a preset comes before what changes it."""
    for each in overrides:
        for key, value in [_parse_word(each)] if isinstance(each, str) else each.items():
            path = (*prefix, *str(key).split("."))
            if not isinstance(value, Mapping) or not value:
                yield path, value
                continue
            if PRESET in value:
                yield path, value[PRESET]
            yield from _leaves([{name: part for name, part in value.items() if name != PRESET}], path)


def _is_choice(path: Keys, value: Any, changes: Sequence[tuple[Keys, Any]]) -> bool:
    """Whether a value names what other changes are made to."""
    return isinstance(value, str) and any(len(each) > len(path) and each[: len(path)] == path for each, _ in changes)


def _set(values: dict[str, Any], path: Keys, value: Any) -> None:
    """Set a value in nested ones; a name on the way becomes the preset that the keys below it change."""
    for key in path[:-1]:
        inner = values.get(key)
        if not isinstance(inner, dict):
            inner = values[key] = {} if inner is None else {PRESET: inner}
        values = inner
    values[path[-1]] = value


# --- words of the command line ----------------------------------------------------------------------------------------


def _parse_word(word: str) -> tuple[str, Any]:
    """The key and value of a word. Raises ConfigError for one that is no ``key=value``, or holds a secret."""
    key, equals, text = word.partition("=")
    if names_secret(word):
        expected = "settings without secrets: they are kept and shown"
        raise ConfigError(
            f"{redacted(key)}: got the value of a secret variable of the environment; expected {expected}"
        )
    if not _is_utf8(word):
        raise ConfigError(f"{key!r}: got {word!r}; expected UTF-8: rename what it names")
    if not equals or not key.strip("."):
        raise ConfigError(f"{word!r}: expected key=value; --help lists the keys")
    if "${" in text:
        raise ConfigError(
            f"{key}: got an interpolation, and variables of the environment are not put into settings, which are kept "
            f'and shown; let your shell put in what is no secret: {key}="$NAME"'
        )
    return key, _parse_value(key, text)


def _parse_value(key: str, text: str) -> Any:
    """A value as typed: a list in brackets or with commas, a mapping in braces, a quoted text, or a plain one."""
    text = text.strip()
    if "," in text and _names_a_file(text):
        return text
    if text[:1] in ("[", "{", "'", '"'):
        try:
            return yaml.load(text, _StringLoader)
        except yaml.YAMLError:
            if text[:1] in ("[", "{") and not _names_a_file(text):
                raise ConfigError(f"{key}: got {text!r}; expected a list as [a,b] or a mapping as {{a: 1}}") from None
            return text
    return [plain_value(part.strip()) for part in text.split(",")] if "," in text else plain_value(text)


def plain_value(text: str) -> Any:
    """null, true, false and numbers as such, where nothing is lost by it (007 and 1.50 stay text)."""
    words = {"null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            if str(number := kind(text)) == text:
                return number
        except ValueError:
            continue
    return text


def _names_a_file(text: str) -> bool:
    """Whether a value is the name of a file or folder, or a glob that finds one."""
    try:
        path = Path(text).expanduser()
        return path.exists() or (glob.has_magic(text) and any(glob.iglob(str(path), recursive=True)))  # noqa: PTH207
    except (OSError, ValueError, RuntimeError):  # too long, or no home
        return False


# --- reporting -------------------------------------------------------------------------------------------------------


def describe(stage: str, model: type[Frozen], *, command: str | None = None) -> str:
    """The help text: every key with its default and meaning; ``command`` is the stage's in ``lemon COMMAND``."""
    lines = [f"usage: lemon {command or stage} key=value ...   (or: python jobs/{stage}.py key=value ...)"]
    lines += [f"variants (variant=NAME): {', '.join(variant_names(stage))}", ""]
    return "\n".join([*lines, *_describe_fields(model)])


def _describe_fields(model: type[BaseModel], *, of: BaseModel | None = None, prefix: str = "") -> Iterator[str]:
    """A line a key; the defaults are the values of ``of`` where it is given, as of a preset."""
    for name, field in model.model_fields.items():
        choice, inner = _choice_of(field), _model_in(field.annotation)
        value = getattr(of, name) if of else field.get_default(call_default_factory=True)
        if choice is not None and inner is not None:
            yield _line(prefix + name, f"default {choice.default}", f"one of {', '.join(choice.names())}")
            default = choice.build(choice.default, inner)
            yield from _describe_fields(type(default), of=default, prefix=f"{prefix}{name}.")
        elif inner is not None and isinstance(value, inner):
            yield from _describe_fields(inner, of=value, prefix=f"{prefix}{name}.")
        else:
            state = "required" if of is None and field.is_required() else f"default {value!r}"
            yield _line(prefix + name, state, field.description or "")
            if inner is not None and choice is None:  # not used unless it is given
                yield from _describe_fields(inner, prefix=f"{prefix}{name}.")


def _line(key: str, default: str, meaning: str) -> str:
    return f"  {key:<28} {default:<24} {meaning}".rstrip()


def _fault_of(fault: Any, model: type[BaseModel]) -> Fault | str:
    """One pydantic fault: the key as the user writes it, what was got, what is expected."""
    key, fields = _key_of(fault["loc"], model)
    key = key or "config"
    if fault["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(fault["loc"][-1]), fields, n=1, cutoff=0.6)
        return f"{key}: unknown key{f'; did you mean {close[0]}?' if close else '; --help lists the keys'}"
    if fault["type"] == "missing":
        return f"{key}: missing; give {key}=..."
    if fault["type"] == "string_pattern_mismatch" and (field := model.model_fields.get(key)) and field.description:
        return Fault(key, fault["input"], field.description)  # no user reads a regular expression
    message = fault["msg"].removeprefix("Value error, ")
    expected = message.removeprefix("Input should be ").removeprefix("a valid ")
    return f"{key}: {message}" if expected == message else Fault(key, fault["input"], expected)


def _key_of(loc: Sequence[str | int], model: type[BaseModel]) -> tuple[str, list[str]]:
    """The key of a fault, without what pydantic puts in between (kinds of a union), and the fields that are known."""
    parts, fields, models = [], list(_field_names(model)), [model]
    for part in loc:
        if isinstance(part, int):
            parts.append(str(part))
            continue
        holders = [each for each in models if part in each.model_fields]
        if models:
            parts.append(part)
        models = [inner for each in holders for inner in _models_in(each.model_fields[part])]
    return ".".join(parts), [*fields, *(name for each in models for name in _field_names(each))]


def _models_in(field: Any) -> list[type[BaseModel]]:
    choice = _choice_of(field)
    if choice is not None:
        return list(choice.classes(field.annotation))
    inner = _model_in(field.annotation)
    return [] if inner is None else [inner]


def _choice_of(field: Any) -> Choice | None:
    return next((each for each in field.metadata if isinstance(each, Choice)), None)


def _model_in(kind: Any) -> type[BaseModel] | None:
    """The config that an annotation is, or holds beside None."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    models = [each for each in map(_model_in, get_args(kind)) if each is not None] if get_args(kind) else []
    return models[0] if models else None


def _field_names(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        for inner in _models_in(field):
            yield from _field_names(inner)
