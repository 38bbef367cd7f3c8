"""What is public stays as it is, name by name, until somebody changes it knowingly.

What is public, the reference says. ``tests/api.txt`` has one line for each public name
with its signature. It is written by ``python tests/test_api.py``.
"""

import ast
import difflib
import importlib
import inspect
import sys
import textwrap
from enum import Enum
from pathlib import Path
from typing import Any

WRITTEN = Path(__file__).with_name("api.txt")

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from tables import documented, public_modules, resolved  # noqa: E402

PUBLIC = tuple(public_modules())
# Of the methods that Python calls, those that make a class what it is.
SPECIAL = {"__call__", "__contains__", "__getitem__", "__iter__", "__len__"}

ADVICE = """
The public API is no longer what tests/api.txt says ("-" is written there, "+" is true):

{diff}

If this is meant, run `python tests/test_api.py`, commit the file, and add a line to
CHANGELOG.md. A name or an argument that was in a release is not taken away or changed
at once: docs/reference/stability.md says how long its old form works on and warns.
"""


def annotation(value: Any) -> str:
    """A type as its source has it, which is the same in every version of Python."""
    value = getattr(value, "__forward_arg__", value)  # in named tuples
    return value if isinstance(value, str) else inspect.formatannotation(value)


def default(value: Any) -> str:
    """A default value without the address of anything."""
    if inspect.isfunction(value) or inspect.isclass(value):
        return value.__qualname__
    return (
        f"{type(value).__name__}.{value.name}"
        if isinstance(value, Enum)
        else repr(value)
    )


def signature(function: Any, skip: int = 0) -> str:
    """Parameters with types and default values, and what is returned."""
    found = inspect.signature(function)
    marks = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}
    parts: list[str] = []
    kinds: list[str] = []
    for parameter in list(found.parameters.values())[skip:]:
        kind = parameter.kind.name
        if kind == "KEYWORD_ONLY" and not {kind, "VAR_POSITIONAL"} & {*kinds}:
            parts.append("*")
        if kind != "POSITIONAL_ONLY" and kinds[-1:] == ["POSITIONAL_ONLY"]:
            parts.append("/")
        text = marks.get(kind, "") + parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            text += f" = {default(parameter.default)}"
        parts.append(text)
        kinds.append(kind)
    if kinds[-1:] == ["POSITIONAL_ONLY"]:
        parts.append("/")
    back = found.return_annotation
    returned = "" if back is found.empty else f" -> {annotation(back)}"
    return f"({', '.join(parts)}){returned}"


def is_ours(value: Any) -> bool:
    """Whether it was written in this package."""
    return str(getattr(value, "__module__", "")).split(".")[0] == "captum_cage"


def members(kind: type) -> dict[str, Any]:
    """What a class and its bases in this package hold, the class's own first."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if is_ours(base):
            found.update(vars(base))
    return found


def construction(kind: type) -> str:
    """How an object of a class is made, if it is for this package to say."""
    held = members(kind)
    if issubclass(kind, Enum) or getattr(kind, "_is_protocol", False):
        return ""
    made = held.get("__init__") or held.get("__new__")
    return "" if made is None else signature(made, skip=1).removesuffix(" -> None")


def attributes(kind: type) -> dict[str, str]:
    """What is set in a class and its bases here, with its type if it has one."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not is_ours(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base)))
        for node in ast.walk(body):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                found.setdefault(node.attr, "")
        for name, value in vars(base).get("__annotations__", {}).items():
            found[name] = f": {annotation(value)}"
    held = members(kind)
    return {
        name: text
        for name, text in found.items()
        if not name.startswith("_") and (text or name not in held)
    }


def class_lines(name: str, kind: type) -> list[str]:
    """A class and its public members."""
    bases = ", ".join(base.__name__ for base in kind.__bases__ if base is not object)
    lines = [f"class {name}{construction(kind)}" + (f" < {bases}" if bases else "")]
    held = members(kind)
    if issubclass(kind, Enum):
        return [*lines, *(f"{name}.{one.name} = {one.value!r}" for one in kind)]
    typed = attributes(kind)
    lines += [f"{name}.{field}{typed[field]}" for field in sorted(typed)]
    for member, value in sorted(held.items()):
        if member in typed or (member.startswith("_") and member not in SPECIAL):
            continue
        place = f"{name}.{member}"
        if isinstance(value, property):
            back = inspect.signature(value.fget).return_annotation
            lines.append(f"{place}: property -> {annotation(back)}")
        elif isinstance(value, classmethod):
            lines.append(f"{place}: classmethod {signature(value.__func__, skip=1)}")
        elif isinstance(value, staticmethod):
            lines.append(f"{place}: staticmethod {signature(value.__func__)}")
        elif inspect.isfunction(value):
            lines.append(place + signature(value, skip=1))
        elif type(value).__name__ == "cached_property":
            back = inspect.signature(value.func).return_annotation
            lines.append(f"{place}: property -> {annotation(back)}")
    return lines


def name_lines(place: str, value: Any) -> list[str]:
    """A public name."""
    if inspect.isclass(value) and is_ours(value):
        return class_lines(place, value)
    if inspect.isfunction(value) and is_ours(value):
        return [place + signature(value)]
    if isinstance(value, str | int | float) and place != "captum_cage.__version__":
        return [f"{place} = {value!r}"]
    if inspect.ismodule(value):
        return [f"{place}: module"]
    return [place]


def api() -> list[str]:
    """Every public name; one that several modules give is told once."""
    told: dict[int, str] = {}
    lines: list[str] = []
    # The module that defines a thing tells it, if it is public; else the first one.
    for module_name in sorted(PUBLIC, key=lambda name: (name == "captum_cage", name)):
        module = importlib.import_module(module_name)
        for name in sorted(module.__all__):
            value = getattr(module, name)
            place = f"{module_name}.{name}"
            told_here = inspect.isclass(value) or inspect.isfunction(value)
            home = getattr(value, "__module__", None)
            if told_here and home in PUBLIC and home != module_name:
                lines.append(f"{place} = {home}.{value.__name__}")
            elif told_here and id(value) in told:
                lines.append(f"{place} = {told[id(value)]}")
            else:
                told[id(value)] = place
                lines += name_lines(place, value)
    # Names of internal modules that the reference has nevertheless.
    for place, _ in sorted(documented()):
        if place.rpartition(".")[0] not in PUBLIC and id(resolved(place)) not in told:
            lines += name_lines(place, resolved(place))
    return lines


def test_the_public_api_is_as_written():
    """Names and signatures are those of tests/api.txt."""
    written = WRITTEN.read_text(encoding="utf-8").splitlines()
    true = api()
    diff = [
        line
        for line in difflib.unified_diff(written, true, lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]
    assert not diff, ADVICE.format(diff="\n".join(diff))


def test_nothing_written_depends_on_where_it_was_written():
    """No address of an object, and no type as only one version of Python prints it."""
    text = WRITTEN.read_text(encoding="utf-8")
    assert " at 0x" not in text
    assert "typing." not in text
    assert "<class" not in text


if __name__ == "__main__":
    WRITTEN.write_text("\n".join(api()) + "\n", encoding="utf-8")
