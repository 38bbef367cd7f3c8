"""What is installed: the files of the wheel, and what it says about itself.

`make wheel-test` builds it and runs these tests on it; elsewhere they are skipped.
"""

import configparser
import subprocess
import tarfile
from fnmatch import fnmatch
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest

from captum_cage._version import __version__

ROOT = Path(__file__).parents[1]
ARCHIVES = ROOT / "build" / "wheel-test"
# All that a wheel may hold, beside modules: each form has at least one file.
DATA = (
    "captum_cage/py.typed",
    "captum_cage/templates/*",
    "captum_cage/metrics/*.json",
    "captum_cage/demo/*.json",
    "captum_cage/demo/*.safetensors",
)
# Of the metadata, by the build and by pip.
ABOUT = {
    *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"),
    *("INSTALLER", "REQUESTED", "direct_url.json", "top_level.txt"),
}
# Of the tree, what is no part of the source archive.
NOT_PACKED = (".ci/", ".git")


@pytest.fixture(scope="module")
def installed() -> Distribution:
    """The package as it is installed."""
    try:
        found = distribution("captum-cage")
    except PackageNotFoundError:
        pytest.skip("the package is not installed: run make wheel-test")
    if any("__editable__" in str(file) for file in found.files or ()):
        pytest.skip(
            "the package is installed as a link to the tree: run make wheel-test"
        )
    return found


def test_the_wheel_holds_the_package_and_nothing_else(installed):
    """Modules, the demo model, templates, verdicts on metrics, py.typed, metadata."""
    files = {str(file) for file in installed.files or ()}
    files = {file for file in files if "__pycache__" not in file}
    about = {file for file in files if file.split("/")[0].endswith(".dist-info")}
    assert {file.split("/", 1)[1] for file in about} <= ABOUT
    scripts = {file for file in files if file.startswith("..")}
    assert {Path(file).stem for file in scripts} == {"captum-cage"}
    rest = files - about - scripts
    in_tree = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "captum_cage").rglob("*")
        if file.is_file() and file.parent.name != "__pycache__"
    }
    assert rest == in_tree
    data = {file for file in rest if not file.endswith(".py")}
    unknown = {f for f in data if not any(fnmatch(f, p) for p in DATA)}
    assert not unknown
    assert all(any(fnmatch(file, pattern) for file in data) for pattern in DATA)


def test_the_wheel_says_what_it_is(installed):
    """Its metadata are those of setup.cfg, and complete."""
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    told = installed.metadata
    assert told["Name"] == "captum-cage"
    assert told["Version"] == __version__
    assert told["Summary"] == setup["metadata"]["description"]
    assert told["Keywords"].replace(",", ", ").split() == (
        setup["metadata"]["keywords"].split()
    )
    assert told["Requires-Python"] == setup["options"]["python_requires"]
    assert told["License-Expression"] == "BSD-3-Clause"
    assert told.get_all("License-File") == ["LICENSE"]
    assert told["Description-Content-Type"] == "text/markdown"
    assert told["Description"].startswith("# captum_cage")
    extras = set(setup["options.extras_require"])
    assert set(told.get_all("Provides-Extra")) == extras
    listed = setup["metadata"]["classifiers"].strip().splitlines()
    assert told.get_all("Classifier") == listed
    core = [line for line in installed.requires or () if "extra ==" not in line]
    wanted = setup["options"]["install_requires"].split()
    assert sorted(core) == sorted(wanted)


def test_the_wheel_has_one_command(installed):
    """captum-cage."""
    scripts = installed.entry_points.select(group="console_scripts")
    assert [script.value for script in scripts] == ["captum_cage.cli:main"]


def test_the_source_archive_is_the_tree():
    """All that git tracks but its own files, and nothing else but metadata."""
    archives = list(ARCHIVES.glob("*.tar.gz"))
    if not archives:
        pytest.skip("there is no source archive: run make wheel-test")
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the tree is not known")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    tree = {f for f in listed.stdout.splitlines() if not f.startswith(NOT_PACKED)}
    with tarfile.open(archives[0]) as archive:
        packed = {one.name.split("/", 1)[1] for one in archive if one.isfile()}
    made = {f for f in packed if f.startswith("captum_cage.egg-info/")} | {"PKG-INFO"}
    assert packed - made == tree
