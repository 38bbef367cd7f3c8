"""What an installation adds, and what an import takes.

Prints the packages that captum-cage needs beyond those that torch, Captum and
transformers need themselves, with their sizes here, and the time that importing it
takes beyond importing Captum, each import in a process of its own::

    python benchmarks/install.py
    python benchmarks/install.py --smoke
"""

import argparse
import statistics
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HOSTS = ("torch", "captum", "transformers")
CAPTUM = "import captum.attr"
IMPORTS = {
    "captum.attr": CAPTUM,
    "captum.attr, transformers": f"{CAPTUM}; import transformers",
    "captum_cage": "import captum_cage",
    "captum_cage.GraphContextAttribution": (
        "import captum_cage; captum_cage.GraphContextAttribution"
    ),
    "captum_cage.cli": "import captum_cage.cli",
}
TIMED = """
import time
wall, cpu = time.perf_counter(), time.process_time()
{code}
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def needed(names: tuple[str, ...]) -> dict[str, Distribution]:
    """These packages and what they need, without extras that nobody asks for."""
    found: dict[str, Distribution] = {}
    asked: set[tuple[str, str]] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # of another platform, or one that torch's CPU build does without
        for extra in ("", *requirement.extras):
            if (name, extra) in asked:
                continue
            asked.add((name, extra))
            inner = [Requirement(line) for line in found[name].requires or ()]
            waiting += [
                one
                for one in inner
                if one.marker is None or one.marker.evaluate({"extra": extra})
            ]
    return found


def megabytes(package: Distribution) -> float:
    """Size of a package's files, compiled modules left out."""
    files = (file for file in package.files or () if file.suffix != ".pyc")
    places = (package.locate_file(file) for file in files)
    sizes = (
        path.stat().st_size for path in map(Path, map(str, places)) if path.is_file()
    )
    return sum(sizes) / 1e6


def print_packages() -> None:
    """What the core install adds, package by package."""
    hosts = needed(HOSTS)
    added = {
        name: package
        for name, package in needed(("captum-cage",)).items()
        if name not in hosts
    }
    sizes = {name: megabytes(package) for name, package in added.items()}
    direct = {
        canonicalize_name(one.name)
        for one in map(Requirement, distribution("captum-cage").requires or ())
        if one.marker is None
    }
    print(f"{', '.join(HOSTS)} need {len(hosts)} packages.")
    total = sum(sizes.values())
    print(f"captum-cage adds {len(added)} packages, {total:.1f} MB, itself included:")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        how = "" if name in direct or name == "captum-cage" else ", needed by another"
        if any("__editable__" in str(file) for file in added[name].files or ()):
            how = ", a link to the tree"
        print(f"  {name} {added[name].version}: {size:.1f} MB{how}")


def print_times(runs: int) -> None:
    """Medians over processes that take turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in IMPORTS}
    for _ in range(runs):
        for name, code in IMPORTS.items():
            done = subprocess.run(
                [sys.executable, "-c", TIMED.format(code=code)],
                capture_output=True,
                text=True,
                check=True,
            )
            wall, cpu = map(float, done.stdout.split())
            times[name].append((wall, cpu))
    print(f"Seconds that an import takes, median of {runs}, and beyond captum.attr:")
    walls = {n: statistics.median(wall for wall, _ in t) for n, t in times.items()}
    cpus = {n: statistics.median(cpu for _, cpu in t) for n, t in times.items()}
    for name, wall in walls.items():
        more = wall - walls["captum.attr"], cpus[name] - cpus["captum.attr"]
        print(
            f"  {name}: {wall:.2f} ({more[0]:+.2f}), "
            f"of the processor {cpus[name]:.2f} ({more[1]:+.2f})"
        )


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=7, help="processes for each import")
    parser.add_argument("--smoke", action="store_true", help="one process each")
    options = parser.parse_args()
    print_packages()
    print_times(1 if options.smoke else options.runs)


if __name__ == "__main__":
    main()
