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
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from lemon.runtime.secrets import guarded, holds_secret, names_secret, redacted

EXIT_OK, EXIT_BAD_CONFIG, EXIT_FAILURES = 0, 2, 3
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143  # 128 + the signal, as shells tell it

CELLS_FOLDER = "cells"
"""Where in its output a job that curates on the way puts the cells."""

COHORT_FILE = "cohort.parquet"
"""Where in its output ``jobs/fetch_tcga.py`` lists its slides."""


class ConfigError(ValueError):
    """Something the user gave is wrong; the message is one line: what it was, what is expected, how to mend it."""


class TerminatedError(KeyboardInterrupt):
    """SIGTERM has come: to be ended as by Ctrl-C, by all that cleans up after itself."""


FULL_OR_GONE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN}
"""Errors of a disk that is full or out of reach: no fault of the code, so a line and no traceback."""


NO_SUCH_FILE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.ENOTEMPTY, errno.EEXIST, errno.ETXTBSY, None),
}
"""Errors of a path that is not what was expected, or not allowed; None is pyarrow's, which tells only a text."""


class DamagedError(ConfigError):
    """A file is not what it was written as; one line: the file, what is wrong with it, how to mend it."""


class StorageError(OSError):
    """Object storage refuses or does not answer; the message is one line: the path, the HTTP status, the reason."""


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


# --- curate -----------------------------------------------------------------------------------------------------------


class HematoxylinConfig(Frozen):
    """Classical segmentation by colour deconvolution and watershed; needs no weights."""

    name: Literal["hematoxylin"]
    min_area_um2: float = Field(5.0, gt=0, description="smaller objects are dropped")


class HoverFastConfig(Frozen):
    """HoverFast's network, with LEMON's weights (research only, see their card) or those of a file."""

    name: Literal["hoverfast"]
    checkpoint: AnyPath | None = Field(
        None, description="path of a HoverFast checkpoint (.pth) or of .safetensors; null: the weights of LEMON"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    batch: int = Field(4, ge=1, description="regions a forward pass")
    min_area_um2: float = Field(5.0, gt=0, description="smaller nuclei are dropped")


SegmenterConfig = Annotated[HematoxylinConfig | HoverFastConfig, Field(discriminator="name")]


class TissueConfig(Frozen):
    """Which part of a slide is searched for nuclei."""

    masks: AnyPath | None = Field(
        None, description="folder of <slide_id>.png masks (non-zero is tissue) to use instead"
    )
    min_share: float = Field(0.01, ge=0, le=1, description="a region with a smaller share of tissue is skipped")
    require_he: bool = Field(True, description="reject slides whose colours are not those of H&E")


class WorkersConfig(Frozen):
    """Resources of the slide actors; one actor works on one slide at a time."""

    actors: int | None = Field(None, ge=1, description="actors in the pool; null: as many as the cluster's CPUs allow")
    cpus: int = Field(2, ge=1, description="CPUs of an actor: processes for instances and crops")
    gpus: float = Field(0.0, ge=0, description="GPUs of an actor; a share is allowed")
    readers: int = Field(2, ge=1, description="threads that read regions")


class CurateConfig(Frozen):
    """``jobs/curate.py``: slides -> nuclei -> cells."""

    slides: AnyPaths = Field(description="glob, folder, slide file, or a CSV/Parquet cohort; also at s3://")
    output: AnyPath = Field(description="folder or s3:// prefix of the tables cells/ and slides/")
    segmenter: SegmenterConfig
    cells_per_slide: int | None = Field(1000, ge=1, description="cells of lowest rank kept of a slide; null keeps all")
    default_mpp: float = Field(0.25, gt=0, description="um/px assumed where a slide states none")
    max_mpp: float = Field(0.75, gt=0, description="coarser slides fail: their nuclei cannot be resolved")
    region_px: int = Field(1024, ge=256, multiple_of=8, description="side of a region at 0.25 um/px")
    overlap_px: int = Field(128, ge=80, multiple_of=2, description="overlap of neighbouring regions")
    region_limit_s: float = Field(
        120.0, gt=0, description="longest time for reading one region; a slide that exceeds it fails"
    )
    tissue: TissueConfig = TissueConfig()
    scratch: LocalPath | None = Field(
        None, description="local folder for a slide of s3://, one at a time an actor; null: the system's temporary one"
    )
    workers: WorkersConfig = WorkersConfig()
    geojson: bool = Field(False, description="also write geojson/<slide>.geojson.gz for QuPath")
    retry: list[Literal["failed", "partial"]] = Field(["failed"], description="rows of an earlier run that are redone")
    max_attempts: int = Field(3, ge=1, description="crashes of a worker on one slide before it is given up")
    max_failed_share: float = Field(
        0.1, ge=0, le=1, description="share of failed slides above which the exit code is 3"
    )
    max_failed_region_share: float = Field(
        0.5, ge=0, le=1, description="share of unreadable regions that fails a slide"
    )
    overwrite: bool = Field(False, description="discard what an earlier run with other settings left in output")

    @model_validator(mode="after")
    def _overlap_fits(self) -> CurateConfig:
        if self.overlap_px * 2 > self.region_px:
            raise ValueError(f"overlap_px={self.overlap_px} exceeds half of region_px={self.region_px}")
        return self

    def result_settings(self) -> dict[str, Any]:
        """The settings that change the rows of the tables: what the fingerprint is taken of."""
        kept = {"segmenter", "cells_per_slide", "default_mpp", "max_mpp", "region_px", "overlap_px", "tissue"}
        settings = self.model_dump(include=kept)
        for speed_only in ("device", "batch"):
            settings["segmenter"].pop(speed_only, None)
        # Where the masks lie says nothing of them: each slide's row has the digest of its own.
        settings["tissue"]["masks"] = self.tissue.masks is not None
        return settings


def nested_curate_config(curation: dict[str, Any], *, own: dict[str, str], values: dict[str, Any]) -> CurateConfig:
    """The curation that is a part of another job, from that job's keys ``curation.*``.

    Args:
        curation: what was given as ``curation.*``.
        own: keys of curation that are not to be given so, and the job's own keys in their place.
        values: those keys' values, and the defaults of others.

    Raises:
        ValueError: one line that names the key.
    """
    for key in sorted(own.keys() & curation.keys()):
        raise ValueError(f"curation.{key}: expected {own[key]}=... instead")
    try:
        return validate(values | curation, CurateConfig)
    except ConfigError as error:
        raise ValueError("; ".join(f"curation.{line}" for line in str(error).splitlines())) from None


# --- fetch_tcga -------------------------------------------------------------------------------------------------------


class DownloadConfig(Frozen):
    """How files are downloaded."""

    parallel: int = Field(4, ge=1, description="files at a time; not with stream, see ahead")
    attempts: int = Field(5, ge=1, description="attempts in a row that bring nothing new before a file has failed")
    timeout_s: float = Field(60.0, gt=0, description="longest silence of the server")
    backoff_s: float = Field(1.0, ge=0, description="first wait between attempts; it doubles, with jitter")
    reserve_gb: float = Field(5.0, ge=0, description="free space that is left on the disk")


class FetchConfig(Frozen):
    """``jobs/fetch_tcga.py``: slides of TCGA from the Genomic Data Commons, kept, or curated and dropped one by one."""

    output: LocalPath = Field(description="local folder of the slides, cohort.parquet and downloads/")
    organs: list[str] = Field(
        [], description="studies and organs, as [BRCA,TCGA-LUAD,kidney]; at most one of a manifest"
    )
    slides_per_organ: int | None = Field(None, ge=1, description="slides of lowest rank of each organ; null: all")
    one_per_patient: bool = Field(True, description="of each patient only the slide of lowest rank")
    manifest: LocalPath | None = Field(
        None, description="manifest (TSV) of the GDC's portal that lists the slides instead"
    )
    api: NameOrPath = Field("https://api.gdc.cancer.gov", pattern=r"^https?://", description="address of the GDC's API")
    download: DownloadConfig = DownloadConfig()
    stream: bool = Field(False, description="curate each slide as it comes, then delete it")
    ahead: int = Field(1, ge=0, description="with stream: slides that a worker downloads while it curates one")
    cells: AnyPath | None = Field(
        None, description=f"with stream: folder or s3:// prefix of the cells; null: <output>/{CELLS_FOLDER}"
    )
    segmenter: SegmenterConfig = HematoxylinConfig(name="hematoxylin")
    curation: dict[str, Any] = Field(
        {}, description="with stream: other keys of jobs/curate.py, as curation.cells_per_slide=500"
    )

    @field_validator("organs", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> FetchConfig:
        if self.manifest is not None and len(self.organs) > 1:
            raise ValueError("organs: got several beside a manifest, which does not tell organs apart; expected one")
        if self.manifest is None and not self.organs:
            raise ValueError("organs: missing; give organs=[BRCA,LUAD] or manifest=...")
        if self.manifest is None and "slides_per_organ" not in self.model_fields_set:
            raise ValueError("slides_per_organ: missing; give slides_per_organ=50, or null for all")
        if self.stream:
            self.curate_config()
        elif self.cells is not None or self.curation:
            raise ValueError(f"{'curation' if self.curation else 'cells'}: only with stream=true")
        return self

    def curate_config(self) -> CurateConfig:
        """The settings of the curation that ``stream`` asks for. Raises ValueError.

        Failed slides are not tried again unless told so: the same bytes would be downloaded for the same end.
        """
        folder = self.output.rstrip("/")
        own = {"slides": "organs", "output": "cells", "segmenter": "segmenter"}
        values = {
            "slides": f"{folder}/{COHORT_FILE}",
            "output": self.cells or f"{folder}/{CELLS_FOLDER}",
            "segmenter": self.segmenter.model_dump(),
            "retry": [],
        }
        return nested_curate_config(self.curation, own=own, values=values)


# --- verify --------------------------------------------------------------------------------------------------------


class VerifyConfig(Frozen):
    """``jobs/verify.py``: reads all that LEMON wrote in an output and compares it with its records."""

    output: AnyPath = Field(description="folder or s3:// prefix of any job's output, with outputs inside it")


# --- demo ----------------------------------------------------------------------------------------------------------


class DemoConfig(Frozen):
    """``jobs/demo.py``: every stage on one slide."""

    output: LocalPath = Field("demo", description="folder of all that the demo makes")
    synthetic: bool = Field(False, description="use a made-up slide, as where pip reaches no package index")


# --- composing and validating -----------------------------------------------------------------------------------------


def conf_dir() -> Path:
    """The folder of YAML files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
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


def run_job(stage: str, model: type[C], main: Callable[[C], int], argv: Sequence[str] | None = None) -> int:
    """The frame of every job: read the config, call ``main(config)``, tell what stops it in a line; the exit code.

    Nothing that is printed meanwhile holds a secret. What is no fault of the user's, disk's or network's is raised.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help") for word in argv):
        print(describe(stage, model))
        return EXIT_OK
    with guarded(), _ended_by_sigterm():
        try:
            return main(load(stage, argv, model))
        except ConfigError as error:
            return _stopped(stage, str(error), EXIT_BAD_CONFIG)
        except OSError as error:
            if isinstance(error, StorageError) or error.errno in FULL_OR_GONE:
                return _stopped(stage, f"stopped: {error}; what is committed stays, rerun goes on", EXIT_FAILURES)
            if error.errno not in NO_SUCH_FILE:
                raise
            return _stopped(stage, f"stopped: {_told(error)}", EXIT_BAD_CONFIG)
        except TerminatedError:
            return _stopped(stage, f"ended by SIGTERM; {_GOES_ON}", EXIT_TERMINATED)
        except KeyboardInterrupt:
            return _stopped(stage, f"interrupted; {_GOES_ON}", EXIT_INTERRUPTED)


_GOES_ON = "the same command again goes on where it stopped"


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises TerminatedError in the block; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return

    def end(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped(stage: str, reason: str, code: int) -> int:
    for line in reason.splitlines():
        print(f"{stage}: {line}", file=sys.stderr)
    return code


def _told(error: OSError) -> str:
    """The file and the reason, in one line."""
    if error.filename is None or error.strerror is None:
        return " ".join(str(error).split())
    return f"{str(error.filename)[: 10 * _TOLD_CHARACTERS]}: {error.strerror}"


def one_line(error: Exception) -> str:
    """An error of ``requests`` in one line, without the names of its inner objects where it has a cause."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return " ".join(str(reason or error).split()) or type(error).__name__


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
