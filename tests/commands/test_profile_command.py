"""``nasfast profile``: a table of this machine, or a folder for another."""

import json
import re

import pytest

import nasfast
from nasfast.commands import profile
from nasfast.latency import Profile
from nasfast.latency.operators import Operator


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "profile: expected --out TABLE.json or --bundle DIR, got none; give one of them"),
        (
            "--out a.json --bundle=b",
            "profile: expected --out TABLE.json or --bundle DIR, got both; give one of them",
        ),
        ("--out .", "profile: expected a file for --out, got the directory .; give table.json"),
        ("--bundle .", "profile: . exists and is never overwritten; give another --bundle"),
    ],
)
def test_what_is_refused(flags, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = flags.split()
    assert profile.main(words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not list(tmp_path.iterdir())


FLAGS = [
    "restoration",
    "--preset",
    "demo",
    "--strategy",
    "darts",
    "--latency-size",
    "24x32",
    "--latency-batch",
    "2",
]


def test_a_table(monkeypatch, tmp_path, capsys):
    operator = Operator("relu", ((1, 2, 3, 4),), (1, 2, 3, 4))

    def measured(target, space, draw, heartbeat):
        heartbeat()
        assert target.shape == (2, 1, 24, 32)
        return Profile(target, space, (({operator: 2}, 3.0),), {operator: 1.0})

    monkeypatch.setattr(profile, "measured_profile", measured)
    out = tmp_path / "table.json"
    out.write_text("an old one, which is replaced")
    assert profile.main([*FLAGS, "--out", str(out)]) == 0
    assert Profile.read(out).times == {operator: 1.0}
    again = nasfast.profile(
        "restoration",
        out=tmp_path / "again.json",
        quiet=True,
        preset="demo",
        latency_size="24x32",
        latency_batch=2,
    )
    assert Profile.read(again) == Profile.read(out)
    text = capsys.readouterr().out
    assert re.search(rf"nasfast search --latency-table {re.escape(str(out))} --objective", text)


def test_a_folder_for_another_machine(monkeypatch, tmp_path, capsys):
    def write(folder, target, space, draw, heartbeat):
        folder.mkdir()
        (folder / "profile.json").write_text(json.dumps(target.to_json()))

    monkeypatch.setattr(profile, "write_bundle", write)
    assert profile.main([*FLAGS, f"--bundle={tmp_path / 'there'}"]) == 0
    target = json.loads((tmp_path / "there/profile.json").read_text())
    assert (target["backend"], target["device"]) == ("onnxruntime", "cpu")
    assert target["precision"] == "float32"
    assert "on_target.py TABLE.json" in capsys.readouterr().out
