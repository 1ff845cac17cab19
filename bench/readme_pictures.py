"""Make the pictures of README.md: ``python bench/readme_pictures.py [RUN]``.

RUN is the directory of a search; without it the demo is searched, in a minute. Writes to
docs/pictures: report.png, the beginning of its report, and prediction.png, the first of its
pictures. Needs Chromium or Chrome, which draws the page.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the checkout is what is shown

from nasfast.commands import report, search  # noqa: E402
from nasfast.runs.study import Study  # noqa: E402
from nasfast.training.pictures import png  # noqa: E402
from nasfast.utils.cli import reports_errors  # noqa: E402
from nasfast.utils.errors import UserError  # noqa: E402
from nasfast.utils.files import atomic_write  # noqa: E402

PICTURES = ROOT / "docs" / "pictures"
SIZE = (1080, 1490)  # of the screenshot, in pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(
            f"readme_pictures: expected one of {', '.join(BROWSERS)} on the PATH, got none; "
            "install Chromium"
        )
    with tempfile.TemporaryDirectory() as folder:
        if given:
            run = Path(given[0])
        else:
            search.main(["--runs", folder])
            (run,) = Path(folder).iterdir()
        report.main([str(run)])
        pictures = sorted(Study.open(run, read_only=True).best_files.glob("*.png"))
        if not pictures:
            raise UserError(
                f"readme_pictures: expected pictures of the best architecture in {run}, got none; "
                "search again with this version"
            )
        _photograph(browser, run / "report.html", Path(folder) / "page.png")
        page = Image.open(Path(folder) / "page.png").convert("RGB")
        atomic_write(PICTURES / "report.png", png(page, palette=True))
        atomic_write(PICTURES / "prediction.png", pictures[0].read_bytes())
    return 0


def _photograph(browser: str, page: Path, picture: Path) -> None:
    """Draw the top of a page."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    size = "--window-size={},{}".format(*SIZE)
    command = [browser, *flags, size, f"--screenshot={picture}", page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not picture.is_file():
        raise UserError(
            f"readme_pictures: expected a picture of {page} from {browser}, got exit status "
            f"{done.returncode}: {done.stderr.strip()[-200:]}; open the page there to see why"
        )


if __name__ == "__main__":
    sys.exit(main())
