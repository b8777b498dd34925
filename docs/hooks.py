"""Hooks of MkDocs: what pages say of settings, presets, tables and encoders is read from the code at build time.

A line ``{{ name argument ... }}`` of a page is replaced by what the function of that name in ``MAKERS`` returns.
Notebooks become pages as they are, with the outputs that they were stored with. A page that would fetch something from
another machine fails the build.
"""

from __future__ import annotations

import importlib
import json
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pyarrow as pa
import yaml
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lemon import schema
from lemon.encoders import registry
from lemon.probe.tasks.catalogue import TASKS
from lemon.runtime.config import Choice, conf_dir, preset_names, variant_names

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^\{\{ (\w+)((?: \S+)*) \}\}$", re.MULTILINE)
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}

FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|object|embed|link(?=[^>]*rel=["']?(?:stylesheet|icon|preload|preconnect)))"""
    r"""[^>]*?\s(?:src|href|data)=["']?((?:https?:)?//[^"'\s>]+)|(?:@import|import|url\()\s*\(?["']?((?:https?:)?//[^"')\s]+)"""
)


def on_files(files: Files, *, config: Any) -> Files:
    """Make pages of notebooks."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = notebook.src_uri.removesuffix(".ipynb")
        text, resources = MarkdownExporter().from_filename(notebook.abs_src_path)
        pictures = {name: f"{Path(page).name}_{name}" for name in resources["outputs"]}
        for name, own in pictures.items():
            text = text.replace(f"]({name})", f"]({own})")
            place = f"{Path(page).parent}/{own}"
            files.append(File.generated(config, place, content=resources["outputs"][name]))
        link = f"\n\n[This page as a notebook]({Path(notebook.src_uri).name})\n"
        files.append(File.generated(config, f"{page}.md", content=text + link))
    return files


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Raises PluginError where a page would fetch something from another machine."""
    if found := FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri}: would fetch {found[1] or found[2]}; expected files of the site only")
    return output


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace the marks of a page. Raises PluginError for one that cannot be made."""

    def made(match: re.Match[str]) -> str:
        name, arguments = match[1], match[2].split()
        try:
            return MAKERS[name](*arguments)
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: {match[0]}: {type(error).__name__}: {error}") from error

    return outside_links(MARK.sub(made, markdown), page=page.file.src_uri)


def outside_links(markdown: str, *, page: str) -> str:
    """Links of a page to files of the repository outside docs/ as the files' names: the site does not hold them."""

    def told(match: re.Match[str]) -> str:
        target = (ROOT / "docs" / page).parent / match[2].partition("#")[0]
        inside = target.resolve().is_relative_to(ROOT / "docs")
        if "://" in match[2] or match[2].startswith("#") or inside:
            return match[0]
        return f"{match[1]} (`{target.resolve().relative_to(ROOT)}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", told, markdown)


# --- settings ---------------------------------------------------------------------------------------------------------


def settings(where: str, prefix: str = "") -> str:
    """Every key of a config class, ``module:Class``: a table. ``prefix`` goes before the keys."""
    model = _load(where)
    rows = ["| Key | Value | Default | Meaning |", "|---|---|---|---|", *_rows(model, prefix=prefix)]
    return "\n".join([_first_paragraph(model), "", *rows])


def variants(stage: str) -> str:
    """The variants of a stage, with the comments that their files begin with."""
    folder = conf_dir() / "stages" / stage
    lines = [
        f"- `variant={name}`: {_comment(folder / f'{name}.yaml')}" for name in variant_names(stage) if name != "default"
    ]
    return "\n".join(lines) or "There are no variants."


def presets(group: str) -> str:
    """The presets of a group: their files as they are."""
    if not (names := preset_names(group)):
        raise ValueError(f"no presets of {group}")
    texts = {name: (conf_dir() / "presets" / group / f"{name}.yaml").read_text().strip() for name in names}
    return "\n\n".join(f"### `{group}={name}`\n\n```yaml\n{text}\n```" for name, text in texts.items())


def _rows(model: type[BaseModel], *, prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        choice = next((each for each in field.metadata if isinstance(each, Choice)), None)
        if _is_model(inner) and choice is None:
            yield from _rows(inner, prefix=f"{prefix}{name}.")
            continue
        kind = _chosen(choice) if choice else _kind(inner)
        bounds = " ".join(_bounds(field.metadata))
        default = f"`{choice.default}`" if choice else _default(field)
        meaning = (field.description or "").replace("|", "\\|").replace("<", "&lt;")
        yield f"| `{prefix}{name}` | {' '.join(filter(None, (kind, bounds)))} | {default} | {meaning} |"


def _chosen(choice: Choice) -> str:
    """What a key that chooses a class takes: the presets of its group, or where there are none the names themselves."""
    if preset_names(choice.group):
        return f"a preset of [{choice.group}](presets.md#{choice.group})"
    return " or ".join(f"`{name}`" for name in choice.registry.names()) if choice.registry else ""


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _kind(kind: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return " ".join(filter(None, (_kind(inner[0]), " ".join(_bounds(inner[1:])))))
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in inner)
    if origin is list:
        return f"list of {_kind(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(_kind(part) for part in inner)}]"
    if origin is dict or kind is dict:
        return "mapping"
    if _is_model(kind):
        return f"keys below: {', '.join(f'`{name}`' for name in kind.model_fields)}"
    words = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", type(None): "`null`"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def _bounds(metadata: Any) -> Iterator[str]:
    for each in metadata:
        for bound, sign in BOUNDS.items():
            if getattr(each, bound, None) is not None:
                limit = getattr(each, bound)
                yield f"{sign} {f'{limit:,}' if isinstance(limit, int) else f'{limit:g}'}"
        if getattr(each, "multiple_of", None) is not None:
            yield f"a multiple of {each.multiple_of:g}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix('...').strip()}`"


def _first_paragraph(model: type[BaseModel]) -> str:
    text = (model.__doc__ or "").split("\n\n")[0]
    return " ".join(text.replace("``", "`").split())


def _comment(path: Path) -> str:
    lines = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return " ".join(line for line in lines if not line.startswith("@"))


def _load(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


# --- tables, encoders, tasks ------------------------------------------------------------------------------------------


def table(name: str) -> str:
    """The columns of a table of ``lemon.schema``."""
    found: pa.Schema = getattr(schema, name)
    lines = ["| Column | Type | Null |", "|---|---|---|"]
    for column in found:
        kind = str(column.type).replace("[1]", "[D]")
        if column.metadata:
            noted = {key.decode(): value.decode() for key, value in column.metadata.items()}
            kind += f" ({noted['dtype']} {'x'.join(map(str, json.loads(noted['shape'])))}, {noted['um_per_px']} um/px)"
        lines.append(f"| `{column.name}` | {kind} | {'may be' if column.nullable else 'never'} |")
    return "\n".join(lines)


def encoders() -> str:
    """The encoders that open by name."""
    return registry.describe()


def tasks() -> str:
    """The benchmarks, their folders and how to obtain them."""
    lines = ["| Task | Folder in `data` | How to obtain |", "|---|---|---|"]
    for name, entry in TASKS.parts().items():
        obtain = " ".join(entry.obtain.split()).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | `{entry.folder}/` | {obtain} |")
    return "\n".join(lines)


def include(name: str) -> str:
    """A Markdown file of the repository, without its heading; links into docs/ lead to the pages."""
    text = (ROOT / name).read_text(encoding="utf-8").partition("\n")[2].strip()
    return re.sub(r"\]\(docs/", "](../", text)


MAKERS: dict[str, Callable[..., str]] = {
    make.__name__: make for make in (settings, variants, presets, table, encoders, tasks, include)
}
