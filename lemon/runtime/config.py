"""Typed configuration: Hydra composes ``conf/`` with ``key=value`` overrides, pydantic validates the result.

Nothing here imports torch or Ray, so a wrong key, type or value is told within a second.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from lemon.errors import ConfigError
from lemon.runtime.secrets import holds_secret, names_secret, redacted


class Frozen(BaseModel):
    """Base of every config: immutable, and a key that is not a field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Settings(Frozen):
    """A config whose numbers are numbers: neither infinite nor NaN."""

    model_config = ConfigDict(allow_inf_nan=False)


C = TypeVar("C", bound=Frozen)


class Fault(NamedTuple):
    """One thing that is wrong with settings that each alone are right."""

    key: str
    got: Any
    expected: str


def raise_faults(faults: Iterable[Fault]) -> None:
    """For validators of a whole config: raise pydantic's ValidationError with a line for each fault, if there is one.

    The message of a fault reads ``key: got ...; expected ...``.
    """
    if details := [
        InitErrorDetails(
            type=PydanticCustomError("fault", "Input should be {expected}", {"expected": fault.expected}),
            loc=tuple(fault.key.split(".")),
            input=fault.got,
        )
        for fault in faults
    ]:
        raise ValidationError.from_exception_data("config", details)


def _named(text: str) -> str:
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
    told = repr(path) if len(path) <= _TOLD_CHARACTERS else f"{path[:_TOLD_CHARACTERS]!r}..."
    try:
        mode = os.stat(os.path.expanduser(path)).st_mode  # noqa: PTH111, PTH116  (Path would make "a//b" another text)
    except ValueError:
        raise ValueError(f"got {told}; expected a path without a zero byte") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise ValueError(f"got {told}; expected a path that can be opened: {error.strerror}") from None
        return  # absent, or not to be seen from here: whoever reads it tells
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"got {told}, which is a pipe or a device; expected a file or folder")


_TOLD_CHARACTERS = 80
"""Of a path that cannot be opened."""


def _place(text: str) -> str:
    if "://" in _named(text) and not re.match(r"file://|s3://[A-Za-z0-9][\w.-]*(?:/|$)", text):
        raise ValueError(f"got {text!r}; expected a local path or s3://bucket/prefix")
    return text


def _local(text: str) -> str:
    if "://" in _named(text):
        raise ValueError(f"got {text!r}; expected a path on a local disk")
    return text


def _places(text: str | list[str]) -> str | list[str]:
    if not text:
        raise ValueError(f"got {text!r}, which names nothing; expected a path (is a variable of the shell not set?)")
    for one in [text] if isinstance(text, str) else text:
        _place(one)
    return text


AnyPath = Annotated[str, AfterValidator(_place)]
"""A file or folder, also at s3://."""

AnyPaths = Annotated[str | list[str], AfterValidator(_places)]
"""One or several of them."""

LocalPath = Annotated[str, AfterValidator(_local)]
"""One that cannot be at s3://: files that are mapped into memory, or that libraries open by their path."""

NameOrPath = Annotated[str, AfterValidator(_named)]
"""A path or a name that is looked up, as of an encoder (``uni:weights.bin``)."""


def conf_dir() -> Path:
    """The folder of YAML files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "conf", package / "conf"):
        if candidate.is_dir():
            return candidate
    raise ConfigError(f"conf/ not found beside {package}: reinstall the package or run from a checkout")


def load(stage: str, overrides: Sequence[str], model: type[C]) -> C:
    """Compose ``conf/<stage>/<variant>.yaml`` with overrides and validate it.

    ``variant=smoke`` among the overrides selects ``conf/<stage>/smoke.yaml``. Raises ConfigError, one line a fault.
    """
    for word in overrides:
        if names_secret(word):
            raise ConfigError(
                f"{redacted(_key(word))}: got the value of a secret variable of the environment; expected settings "
                "without secrets: they are kept and shown"
            )
        if not word.isascii() and not _is_utf8(word):
            raise ConfigError(f"{word.partition('=')[0]!r}: got {word!r}; expected UTF-8: rename what it names")
    variant, overrides = _split_variant(stage, overrides)
    return validate(_compose(f"{stage}/{variant}", overrides), model)


def compose_all() -> list[str]:
    """Compose every variant of every stage; returns their names. Raises ConfigError."""
    stages = sorted(path.parent for path in conf_dir().glob("*/default.yaml"))
    names = [f"{stage.name}/{variant.stem}" for stage in stages for variant in sorted(stage.glob("*.yaml"))]
    for name in names:
        _compose(name, [])
    return names


def validate(values: Any, model: type[C]) -> C:
    """Validate plain values; raises ConfigError whose lines read ``key: got value; expected ...``."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_explain(fault, model) for fault in error.errors()))) from None


def describe(stage: str, model: type[Frozen]) -> str:
    """The help text: every key with its type, default and meaning."""
    variants = ", ".join(sorted(path.stem for path in (conf_dir() / stage).glob("*.yaml")))
    lines = [f"usage: python jobs/{stage}.py key=value ...", f"variants (variant=NAME): {variants}", ""]
    lines += _describe_fields(model, prefix="")
    for group in sorted(groups_of(f"{stage}/default")):
        lines.append(f"  {group}=NAME: {', '.join(_choices(group))}")
    return "\n".join(lines)


def _describe_fields(model: type[BaseModel], *, prefix: str) -> list[str]:
    lines = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += _describe_fields(kind, prefix=f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"default {field.get_default(call_default_factory=True)!r}"
        lines.append(f"  {prefix + name:<28} {default:<24} {field.description or ''}".rstrip())
    return lines


def _split_variant(stage: str, overrides: Sequence[str]) -> tuple[str, list[str]]:
    chosen = [word.split("=", 1)[1] for word in overrides if word.startswith("variant=")]
    variant = chosen[-1] if chosen else "default"
    known = sorted(path.stem for path in (conf_dir() / stage).glob("*.yaml"))
    if variant not in known:
        raise ConfigError(f"variant: got {variant!r}; expected one of {', '.join(known)}")
    return variant, [word for word in overrides if not word.startswith("variant=")]


def _compose(name: str, overrides: Sequence[str]) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with initialize_config_dir(str(conf_dir()), version_base="1.3"), _no_environment():
        try:
            base = compose(name)
            parsed, groups = [_readable(word) for word in overrides], groups_of(name)
            for word in parsed:
                _check_group(word, groups)
            own = [word for word in parsed if _is_ours(word, parsed, groups)]
            # Unknown keys are pydantic's to report, in one form with the others: hence "++", add or override.
            words = [word if _key(word) in groups else f"++{word.lstrip('+')}" for word in parsed if word not in own]
            composed: Any = OmegaConf.to_container(compose(name, overrides=words) if words else base, resolve=True)
            for word in own:
                _set(composed, word, parsed, groups)
            return composed
        except (HydraException, OmegaConfBaseException) as error:
            asked = "oc.env" in str(error)
            raise ConfigError(_NO_ENVIRONMENT if asked else " ".join(str(error).split())) from None


_NO_ENVIRONMENT = (
    "${oc.env:...}: variables of the environment are not put into settings, which are kept and shown; let your shell "
    'put in what is no secret: key="$NAME"'
)


@contextlib.contextmanager
def _no_environment() -> Iterator[None]:
    """While the block runs, an interpolation that asks for a variable of the environment is an error."""
    from omegaconf import OmegaConf
    from omegaconf.resolvers import oc

    def refuse(*_: Any) -> None:
        raise ValueError("oc.env")

    OmegaConf.register_new_resolver("oc.env", refuse, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _readable(word: str) -> str:
    """A word that Hydra's grammar reads: values with spaces or parentheses quoted, a,b,c as a list."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, equals, value = word.partition("=")
    if not equals or not key.strip("+"):
        raise ConfigError(f"{word!r}: expected key=value; --help lists the keys")
    try:
        # Hydra takes a,b for a sweep of its own; here it is a list without its brackets, or a file's name.
        is_list = OverridesParser.create().parse_override(word).is_sweep_override()
    except HydraException:
        return _quoted(key, value)
    if is_list and _names_a_file(value):
        return _quoted(key, value)
    return f"{key}=[{value}]" if is_list else word


def _quoted(key: str, value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{escaped}'"


def _names_a_file(value: str) -> bool:
    """Whether a value with a comma is the name of a file or folder, or a glob that finds one."""
    try:
        path = Path(value).expanduser()
        return path.exists() or (glob.has_magic(value) and any(glob.iglob(str(path), recursive=True)))  # noqa: PTH207
    except (OSError, ValueError, RuntimeError):  # too long, or no home
        return False


@cache
def groups_of(name: str) -> frozenset[str]:
    """Keys that name a file of ``conf/<key>/``, by the defaults list of ``conf/<name>.yaml``.

    Another stage's folder may be a plain key here.
    """
    listed = yaml.safe_load((conf_dir() / f"{name}.yaml").read_text(encoding="utf-8")).get("defaults", [])
    found = frozenset(key.lstrip("/") for entry in listed if isinstance(entry, dict) for key in entry)
    for other in (entry for entry in listed if isinstance(entry, str) and entry != "_self_"):
        found |= groups_of(f"{name.partition('/')[0]}/{other}")
    return found


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+")


def _check_group(word: str, groups: frozenset[str]) -> None:
    key, choice = _key(word), word.partition("=")[2]
    if key in groups and choice not in (known := _choices(key)):
        raise ConfigError(f"{key}: got {choice!r}; expected one of {', '.join(known)}")


def _is_ours(word: str, words: Sequence[str], groups: frozenset[str]) -> bool:
    """Whether Hydra would misread a word: a folder of conf/ as a choice (``probe=null``), or a key below a name.

    A sweep takes ``pretrain.ssl=NAME`` with ``pretrain.ssl.out_dim=64``; only its pretraining job knows the choice.
    """
    key = _key(word)
    return ((conf_dir() / key).is_dir() and key not in groups) or _above(key, words, groups) is not None


def _above(key: str, words: Sequence[str], groups: frozenset[str]) -> str | None:
    """The key above, where another word gives it a value, as Hydra cannot have both."""
    given = {_key(word) for word in words}
    parents = (key.rsplit(".", count)[0] for count in range(1, key.count(".") + 1))
    return next((parent for parent in parents if parent in given and parent not in groups), None)


def _set(values: Any, word: str, words: Sequence[str], groups: frozenset[str]) -> None:
    """Set a word that is ours; a key below a name stays whole beside it: ``{"ssl": ..., "ssl.out_dim": ...}``."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    key = _key(word)
    path = (_above(key, words, groups) or key).split(".")[:-1]
    for part in path:
        values = values.setdefault(part, {})
    values[key.removeprefix(".".join([*path, ""]))] = OverridesParser.create().parse_override(f"++{word}").value()


def _explain(fault: Any, model: type[BaseModel]) -> str:
    """One line for one pydantic fault: the key, what was got, what is expected."""
    # Discriminated unions put the chosen tag into the location; it is no key of the user's.
    tags = {"hematoxylin", "hoverfast", "mocov3", "dinov2", "str", "list[str]", "dict[str,any]"}
    parts = [str(part) for part in fault["loc"] if str(part) not in tags]
    key = ".".join(parts) or "config"
    if fault["type"] == "extra_forbidden":
        close = difflib.get_close_matches(parts[-1], _field_names(model), n=1, cutoff=0.6)
        return f"{key}: unknown key{f'; did you mean {close[0]}?' if close else '; --help lists the keys'}"
    if fault["type"] == "missing" or (fault["type"] == "string_type" and fault["input"] == "???"):
        return f"{key}: missing; give {key}=..."
    if fault["type"] == "string_pattern_mismatch" and (field := model.model_fields.get(key)) and field.description:
        return f"{key}: got {fault['input']!r}; expected {field.description}"  # no user reads a regular expression
    message = fault["msg"].removeprefix("Value error, ")
    expected = message.removeprefix("Input should be ").removeprefix("a valid ")
    if expected == message:
        return f"{key}: {message}"
    return f"{key}: got {fault['input']!r}; expected {expected}"


def _field_names(model: type[BaseModel]) -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _field_names(field.annotation)
    return names
