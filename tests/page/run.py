"""The live page in headless Chromium, against a live server with the default pair.

    python tests/page/run.py [--screenshots FOLDER] [PART ...]    all checks, or some, by their names

Installs playwright-core and axe-core from npm into out/page/; takes the Chromium that is installed, or the
one that CHROMIUM names. Prints a table; exits with 1 if any check failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "clients"))
from live import ROOT, RunFailed, node_environment, serving
from outcomes import failed, of_the_server, outcome_of, table

HERE = Path(__file__).resolve().parent
OUT = ROOT / "out" / "page"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browser() -> str:
    """Where Chromium is. Raises RunFailed."""
    named = os.environ.get("CHROMIUM")
    for name in [named] if named else BROWSERS:
        if found := shutil.which(name):
            return found
    wanted = f"no {named}" if named else "no Chromium is installed (Debian's package is chromium)"
    raise RunFailed(f"{wanted}; CHROMIUM names another one")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="of the names of checks")
    parser.add_argument("--screenshots", type=Path, default=OUT / "screenshots", help="where they go")
    arguments = parser.parse_args()
    shots = arguments.screenshots.resolve()
    shots.mkdir(parents=True, exist_ok=True)
    try:
        chromium = browser()
        folder = node_environment(OUT / "js", HERE / "js")
        shutil.copy(ROOT / "tests" / "clients" / "js" / "served.mjs", folder)
        with serving(OUT / "server.log") as served:
            environment = {**served.environment(), "SCREENSHOTS": str(shots), "CHROMIUM": chromium}
            words = ["node", "with_chromium.mjs", *arguments.parts]
            outcomes = [outcome_of("the page", lambda: words, folder, environment)]
            outcomes.append(of_the_server(served.url))
    except RunFailed as fault:
        print(fault, file=sys.stderr)
        return 1
    print(table(outcomes))
    return int(failed(outcomes))


if __name__ == "__main__":
    sys.exit(main())
