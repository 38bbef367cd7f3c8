"""The directive ``command-line``: options of a command, from the program itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, get_args, get_origin

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.models import ArgumentInfo, CommandInfo, ParamMeta
from typer.utils import get_params_from_function

from captum_cage.cli import PROGRAM, app

FIRST_PANEL = "Options"


def commands() -> dict[str, tuple[str, str, Callable[..., Any]]]:
    """Help, epilogue and function of each command; ``""`` is the program itself."""
    found = {}
    for info in [app.registered_callback, *app.registered_commands]:
        if info is None or info.callback is None:
            continue
        if isinstance(info, CommandInfo):
            name = info.name or info.callback.__name__
            end = info.epilog
        else:
            name, end = "", app.info.epilog
        text = info.help or inspect.getdoc(info.callback)
        found[name] = (text or "", end or "", info.callback)
    return found


def markdown(name: str) -> str:
    """What a command does, its examples and its options, in MyST."""
    text, epilogue, function = commands()[name]
    lines = [text, "", *_epilogue(epilogue)]
    lines += ["```{program} " + f"{PROGRAM} {name}".strip(), "```", ""]
    panels: dict[str, list[str]] = {}
    for parameter in get_params_from_function(function).values():
        panel = parameter.default.rich_help_panel or FIRST_PANEL
        panels.setdefault(panel, []).extend(_option(parameter))
    for panel, options in panels.items():
        lines += ["```{rubric} " + panel, "```", "", *options]
    return "\n".join(lines)


def _epilogue(text: str) -> Iterator[str]:
    """Examples as a block of commands, the rest as it is."""
    parts = text.split("\n\n")
    first, *rest = parts if parts[0] == "Examples:" else ["", *parts]
    examples = [part for part in rest if first and not part.endswith(".")]
    if examples:
        yield from ("```console", *(f"$ {line}" for line in examples), "```", "")
    for part in rest:
        if part and part not in examples:
            yield from (part, "")


def _option(parameter: ParamMeta) -> Iterator[str]:
    """An option or an argument, its help and its default."""
    info, value = parameter.default, _value(parameter)
    if isinstance(info, ArgumentInfo):
        names = [value]
    else:
        declared = info.param_decls or [f"--{parameter.name.replace('_', '-')}"]
        # As in "--chat/--no-chat".
        parts = [part for name in declared for part in name.split("/")]
        names = [f"{part} {value}".strip() for part in parts]
    yield from ("````{option} " + ", ".join(names), "", info.help or "")
    if default := _default(info):
        yield from ("", f"Default: `{default}`")
    yield from ("````", "")


def _value(parameter: ParamMeta) -> str:
    """What stands after the name of an option."""
    hint, info = parameter.annotation, parameter.default
    (kind,) = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
    if kind is bool:
        return ""
    if info.metavar:
        return str(info.metavar)
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return "|".join(member.value for member in kind)
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT"}
    return names.get(kind, parameter.name.upper())


def _default(info: Any) -> str:
    """The default, where the help on the terminal shows it."""
    value = info.default
    if value in (None, False, ...) or not info.show_default:
        return ""
    return str(value.value if isinstance(value, Enum) else value)


class CommandLine(SphinxDirective):
    """``command-line``, with the name of a command or none."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The command's help as nodes."""
        name = self.arguments[0] if self.arguments else ""
        return self.parse_text_to_nodes(markdown(name))


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True}
