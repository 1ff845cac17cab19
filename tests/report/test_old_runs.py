"""Reports of runs that earlier versions wrote."""

import re
import shutil
from pathlib import Path

import pytest

from nasfast.report.__main__ import main

FIXTURES = Path(__file__).parents[1] / "fixtures"
DRAWN = {
    "segmentation": ["The best cell, of architecture 0", "The best decoder, of architecture 0"],
    "restoration": [
        "The cell, after epoch 3",
        "Its widths",
        "Losses and validation",
        "Supernet history",
    ],
    "restoration_random": ["The best cell, of architecture 0", "Its widths"],
}
TILES = {
    "segmentation": ["0.1072", "0.0628", "271.91 k", "18.28 M", "3", "3", "0", "0", "4.6 s"],
    "restoration": ["0.5266", "14.2558", "847", "9.02 M", "3", "2", "1", "0", "1.4 s"],
    "restoration_random": ["0.5856", "18.4998", "3.88 k", "44.85 M", "2", "2", "0", "0", "0.2 s"],
}
RANKED = {  # rank, index, rewards, metric
    "segmentation": [
        ["1", "0", "0.0744", "0.1072", "0.0628"],
        ["2", "1", "0.0211", "0.0598", "0.0316"],
        ["3", "2", "0.0250", "-", "0.0139"],
    ],
    "restoration": [["1", "2", "0.5266", "14.2558"], ["2", "0", "0.2436", "13.3004"]],
    "restoration_random": [["1", "0", "0.5856", "18.4998"], ["2", "1", "0.4992", "14.4998"]],
}


@pytest.mark.parametrize("name", DRAWN)
def test_report_of_version_1(name, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / "version1" / name, run)
    assert main([str(run), "--baseline", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    page = (run / "report.html").read_text()
    assert re.findall("<h2>([^<]*)</h2>", page) == [
        "Reward over the search",
        "Comparison",
        *DRAWN[name],
        "Architectures, best first",
        "Where the time went",
        "Continue, or run again",
        "Configuration",
        "Environment",
    ]
    assert re.findall("<dd>([^<]*)</dd>", page) == TILES[name]
    table = re.findall(r'<table class="numbers">.*?</table>', page, re.DOTALL)[0]
    rows = [re.findall("<td>([^<]*)</td>", row) for row in re.findall("<tr>.*?</tr>", table)]
    assert [row[: len(RANKED[name][0])] for row in rows[1:]] == RANKED[name]
