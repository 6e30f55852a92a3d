"""The versions, git commit, machine, user and command of this process."""

import getpass
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from ser_ray.version import __version__

TAG_BYTES = 5000
"""MLflow's own limit of a tag."""
PACKAGES = ("ray", "torch", "torchvision", "torchaudio", "numpy", "pyarrow", "mlflow")


def provenance() -> dict[str, str]:
    """Describe this process, its code and its machine: text by name."""
    tags = {f"version.{name}": version(name) for name in PACKAGES}
    tags["version.ser_ray"] = __version__
    tags["mlflow.user"] = _user()
    tags["mlflow.source.name"] = Path(sys.argv[0]).name
    tags["version.python"] = platform.python_version()
    tags["hardware.machine"] = f"{platform.machine()}, {os.cpu_count()} CPUs"
    tags["command"] = shlex.join([_program(), *sys.argv[1:]])[:TAG_BYTES]
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["git.commit"] = commit + ("-dirty" if _git("status", "--porcelain") else "")
    return tags


def _program() -> str:
    """Name of the program as a user types it; `python -m ser_ray` is ser-ray."""
    path = Path(sys.argv[0])
    return "ser-ray" if path.parent.name == "ser_ray" else path.name


def _user() -> str:
    """Name of the user, or the number of one without an account, as containers often have."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13
        return str(os.getuid())


def _git(*arguments: str) -> str:
    package = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
