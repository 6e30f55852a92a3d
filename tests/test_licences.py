"""The licences of all packages that are installed with this one may be combined with Apache-2.0.

Only what the packages declare is read. What a wheel has inside, such as the FFmpeg of PyAV, has
licences of its own.
"""

import re
from importlib.metadata import PackageNotFoundError, metadata, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("cluster", "demo", "export")
PERMISSIVE = re.compile(
    r"MIT|BSD|0BSD|Apache|PSF|Python Software Foundation|ISC|Zlib|CC0|HPND|Unlicense|OSI Approved"
)
LIBRARIES = re.compile(r"LGPL|MPL|Mozilla Public License")
"""Their files keep this licence, and whoever uses them as a library need not take it over."""
GPL = re.compile(r"(?<!L)GPL|(?<!Lesser )General Public")
OF_NVIDIA = re.compile(r"nvidia-.*|cuda-.*")
"""Parts of CUDA, which torch installs; NVIDIA allows their use and redistribution."""
UNDECLARED = {"huey": "MIT, in its repository"}


def dependencies(root: str) -> set[str]:
    """Names of all installed packages that a package needs, with its extras."""
    found: set[str] = set()
    waiting = [Requirement(f"{root}[{','.join(EXTRAS)}]")]
    while waiting:
        needed = waiting.pop()
        for line in requires(needed.name) or []:
            item = Requirement(line)
            name, extras = canonicalize_name(item.name), needed.extras or {""}
            marker = item.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
                continue
            try:
                metadata(name)
            except PackageNotFoundError:
                continue
            if name not in found:
                found.add(name)
                waiting.append(item)
    return found


def licence(package: str) -> str:
    """The licence that a package declares: an SPDX expression, classifiers or a text."""
    declared = metadata(package)
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in declared.get_all("Classifier", [])
        if line.startswith("License ::")
    ]
    expression, text = (
        declared.get_all(name, [""])[0] for name in ("License-Expression", "License")
    )
    return expression or "; ".join(classifiers) or text.partition("\n")[0]


def test_all_licences_may_be_combined_with_ours() -> None:
    packages = dependencies("ser-ray")
    assert {"torch", "ray", "mlflow", "soxr"} <= packages
    licences = {
        name: licence(name) or UNDECLARED.get(name, "")
        for name in packages
        if not OF_NVIDIA.fullmatch(name)
    }
    unsuited = {
        name: text
        for name, text in licences.items()
        if GPL.search(text) or not (PERMISSIVE.search(text) or LIBRARIES.search(text))
    }
    assert unsuited == {}
