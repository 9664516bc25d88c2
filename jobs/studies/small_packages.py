"""Fetch the Debian and npm packages of the small study, and unpack without installing them.

A package is fetched by name and version through the registry's own client (`apt-get download`,
`npm pack`), unpacked below one folder, and kept there, so a second call fetches nothing.

    PACKAGES/NAME/usr/share/...     of a Debian package
    PACKAGES/NAME/package/...       of an npm package
"""

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from moce_dist.settings import ConfigError


class Package(NamedTuple):
    """A package of a registry: its name, its version, and what is known of its licence."""

    name: str
    version: str
    licence: str
    registry: str = "apt"


PACKAGES = (
    Package("dataset-fashion-mnist", "0.0~git20200523.55506a9-1", "MIT (Expat)"),
    Package("openclipart-png", "1:0.18+dfsg-19", "public domain"),
    Package("wesnoth-1.16-data", "1:1.16.9-1", "GPL-2+"),
    Package("openarena-081-textures", "0.8.5split-14", "GPL-2+"),
    Package("tuxpaint-stamps-default", "2022.06.04-1", "GPL-2"),
    Package("mate-backgrounds", "1.26.0-1", "GPL-2+, CC-BY-SA-4.0"),
    Package("plasma-workspace-wallpapers", "4:5.27.5-2", "GPL-2+, LGPL"),
    Package("lomiri-wallpapers-16.04", "20.04.0-2", "CC-BY-SA, CC-BY, CC0, MIT"),
    Package("gcompris-qt-data", "3.1-2", "CC-BY-SA, public domain, GPL-3+"),
    Package("emoji-datasource-google", "16.0.0", "MIT; Noto Emoji: Apache-2.0", "npm"),
    Package("emoji-datasource-twitter", "16.0.0", "MIT; Twemoji: CC-BY-4.0", "npm"),
    Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT; Fluent Emoji: MIT", "npm"),
)
_MINUTES = 20


def unpack(package: Package, root: Path) -> Path:
    """Fetch and unpack a package unless it is there, and return its folder.

    Raises:
        ConfigError: the registry's client is missing, or cannot fetch the package.
    """
    folder = root / package.name.replace("/", "+")
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".new-") as temporary:
        tree = Path(temporary) / "tree"
        tree.mkdir()
        if package.registry == "npm":
            _call(package, temporary, "npm", "pack", f"{package.name}@{package.version}")
            _call(package, temporary, "tar", "-xzf", _only(temporary, "*.tgz"), "-C", str(tree))
        else:
            _call(package, temporary, "apt-get", "download", f"{package.name}={package.version}")
            _call(package, temporary, "dpkg", "-x", _only(temporary, "*.deb"), str(tree))
        tree.replace(folder)
    return folder


def _only(folder: str, pattern: str) -> str:
    (file,) = Path(folder).glob(pattern)
    return str(file)


def _call(package: Package, folder: str, *command: str) -> None:
    wanted = f"package {package.name} {package.version}"
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{wanted}: needs {command[0]}, which is not installed")
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=60 * _MINUTES, check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{wanted}: {command[0]} took over {_MINUTES} minutes") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = next((line for line in lines if line.startswith("E:")), lines[-1] if lines else "")
        raise ConfigError(
            f"{wanted}: {' '.join(command[:2])} failed: {why}; unpack it into "
            f"PACKAGES/{package.name.replace('/', '+')} by other means"
        )
