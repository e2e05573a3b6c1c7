"""A real browser, driven from its command line: a page is opened from disk, its scripts run, and what it shows then is read."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
ABSENT = f"no browser: none of {', '.join(NAMES)} is on PATH"
_CONSOLE = re.compile(r"\bCONSOLE[:(]|Uncaught ")


@dataclass(frozen=True)
class Shown:
    """`dom`: the page as it stands once its scripts have run; `complaints`: what they wrote to the console, errors included."""

    dom: str
    complaints: list[str]

    def weights(self) -> list[float]:
        """Of every cell of the viewer's map."""
        return [float(found) for found in re.findall(r'data-weight="([0-9.]+)"', self.dom)]


def open_page(path: Path, fragment: str = "", profile: Path | None = None) -> Shown:
    """Opens a file, at a fragment of it. Whatever it asks the network for fails."""
    assert BROWSER is not None
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions", "--enable-logging=stderr"]
    switches += ["--virtual-time-budget=2000", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile or path.parent / 'profile'}"]
    done = subprocess.run([BROWSER, *switches, "--dump-dom", f"{path.as_uri()}{fragment}"], capture_output=True, text=True, timeout=60, check=True)
    return Shown(done.stdout, [line for line in done.stderr.splitlines() if _CONSOLE.search(line)])
