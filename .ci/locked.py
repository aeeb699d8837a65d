"""What the gate and .ci/lock need to know of the dependencies in pyproject.toml and their locked versions.

`locked.py lowest` prints the lower bounds of what users install, as pins. `locked.py clean FILE` prints the pins in a
file, without the project itself. `locked.py check` fails unless the locked versions fit pyproject.toml.
"""

import re
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
PIN = re.compile(r"^[\w.-]+==[^\n]+\\\n(?:    .*\n?)+", re.MULTILINE)
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def name_of(requirement: str) -> str:
    """Return the normalised name of what a requirement or pin asks for."""
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-").replace(".", "-")


def lowest() -> list[str]:
    """Return the lower bounds that are promised to users."""
    promised = [*PROJECT["dependencies"], *EXTRAS["cli"], *EXTRAS["otel"], *EXTRAS["speed"]]
    bounds = [re.match(r"([\w.-]+)>=([\w.]+)", requirement) for requirement in promised]
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound]


def locked(file: str) -> dict[str, str]:
    """Return name and version of what is locked in a file."""
    pins = PIN.findall((HERE / file).read_text())
    return {name_of(pin): pin.split("==")[1].split()[0] for pin in pins}


def with_marker(pin: str) -> str:
    """Return a pin with the marker of the requirement that asks for it: some are not for every Python."""
    markers = {name_of(requirement): requirement.partition(";")[2] for requirement in asked() if ";" in requirement}
    version, line_end, hashes = pin.rstrip().partition(" \\\n")
    marker = markers.get(name_of(pin))
    return f"{version} ;{marker}{line_end}{hashes}" if marker and ";" not in version else pin.rstrip()


def asked() -> list[str]:
    """Return all requirements of the project and of its extras."""
    return [*PROJECT["dependencies"], *(requirement for extra in EXTRAS.values() for requirement in extra)]


def mistakes() -> list[str]:
    """Return in what the locked versions do not fit pyproject.toml."""
    everything, at_lowest = locked("constraints.txt"), locked("constraints-lowest.txt")
    missing = {name_of(requirement) for requirement in asked()} - {*everything, PROJECT["name"]}
    wrong = [
        pin for pin in lowest() if not f"{at_lowest.get(name_of(pin), '')}.0.0".startswith(f"{pin.split('==')[1]}.")
    ]
    return [*(f"{name} is not locked" for name in sorted(missing)), *(f"{pin} is not locked" for pin in wrong)]


match sys.argv[1:]:
    case ["lowest"]:
        print(*lowest(), sep="\n")
    case ["clean", file]:
        pins = PIN.findall(Path(file).read_text())
        print(*(with_marker(pin) for pin in pins if name_of(pin) != PROJECT["name"]), sep="\n")
    case ["check"]:
        if found := mistakes():
            sys.exit("\n".join([*found, "run .ci/lock and commit what it writes"]))
    case _:
        sys.exit(__doc__)
