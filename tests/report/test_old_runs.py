"""Reports of runs that earlier versions wrote."""

import re
import shutil
from pathlib import Path

import pytest

from nasfast.commands.report import main

FIXTURES = Path(__file__).parents[1] / "fixtures"
DRAWN = {
    "segmentation": ["The best cell, of architecture 0", "The best decoder, of architecture 0"],
    "restoration_random": ["The best cell, of architecture 0", "Its widths"],
    "restoration": ["The cell, after epoch 3", "Its widths"],
}
DRAWN["restoration"] += ["Losses and validation", "Supernet history"]
TILES = {
    "segmentation": ["0.1072", "0.0628", "271.91 k", "18.28 M", "3", "3", "0", "0", "4.6 s"],
    "restoration": ["0.5266", "14.2558", "847", "9.02 M", "3", "2", "1", "0", "1.4 s"],
    "restoration_random": ["0.5856", "18.4998", "3.88 k", "44.85 M", "2", "2", "0", "0", "0.2 s"],
}


@pytest.mark.parametrize("name", DRAWN)
def test_report_of_version_1(name, tmp_path, capsys):
    run = shutil.copytree(FIXTURES / "version1" / name, tmp_path / "run")
    assert main([str(run), "--baseline", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    page = (run / "report.html").read_text()
    assert re.findall("<h2>([^<]*)</h2>", page) == [
        *(["Warning"] if name == "restoration" else []),  # two epochs chose nothing
        "Reward over the search",
        "Comparison",
        *DRAWN[name],
        *([] if name == "restoration" else ["Reward against cost"]),
        f"Architectures, {'last' if name == 'restoration' else 'best'} first",
        "Where the time went",
        "Continue, or run again",
        "Configuration",
        "Environment",
    ]
    assert re.findall("<dd>([^<]*)</dd>", page.partition("<section>")[0]) == TILES[name]
