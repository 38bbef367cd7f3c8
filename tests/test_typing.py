"""What a type checker sees of the package: programs that it takes or refuses.

`make types` checks both: tests/typed/accepted.py as it stands, and in
tests/typed/refused.py each wrong line names its error, so that one which is taken after
all is an error too. Here is what that does not show: that the programs run.
"""

import ast
import re
from pathlib import Path

import pytest

import captum_cage
from captum_cage.engines import registry
from typed import accepted

FOLDER = Path(__file__).with_name("typed")
PROGRAMS = [
    *("explain_an_answer", "ask_a_chat", "solve_rows_of_my_own", "measure"),
    "prove_an_engine",
]
ENGINES = ["give_a_method_an_engine", "declare_an_engine"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_users_run(name):
    """What a type checker takes works."""
    getattr(accepted, name)()


@pytest.mark.parametrize("name", ENGINES)
def test_engines_of_users_are_registered(name, monkeypatch):
    """By each of the forms that a type checker takes."""
    monkeypatch.setattr(registry, "_engines", dict(registry._engines))
    getattr(accepted, name)()
    assert accepted.Nearest.__name__ in registry.engine_names()


def test_every_refused_line_says_why():
    """Its ignore names a code, and nothing else in the file has one."""
    lines = (FOLDER / "refused.py").read_text(encoding="utf-8").splitlines()
    ignores = [line for line in lines if "type: ignore" in line]
    assert len(ignores) > 20
    assert all(re.search(r"# type: [i]gnore\[[a-z-]+\]$", line) for line in ignores)


def test_the_package_says_that_it_is_typed():
    """By the file that type checkers look for."""
    assert (Path(captum_cage.__file__).parent / "py.typed").exists()


def test_programs_stand_in_the_list():
    """Each function of accepted.py is run here."""
    body = ast.parse((FOLDER / "accepted.py").read_text(encoding="utf-8")).body
    functions = {one.name for one in body if isinstance(one, ast.FunctionDef)}
    assert functions == {*PROGRAMS, *ENGINES}
