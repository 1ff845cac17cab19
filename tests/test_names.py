"""What README, CONTRIBUTING and docs mention exists: names of the package, commands and flags; and
what help says of them."""

import contextlib
import functools
import importlib
import io
import pkgutil
import re
from pathlib import Path

import pytest

import nasfast
from nasfast import __main__ as command_line
from nasfast.commands import COMMANDS
from nasfast.methods.registry import METHODS
from nasfast.tasks.restoration import TASKS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"--only", "--rehearse", "--task.FIELD"}
"""Flags of bench/gpu_report.py, and a placeholder."""
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")


def code_of(text):
    """Commands and names in a page: its fenced and indented blocks by line, and its inline code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.S | re.M)
    prose = re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.S | re.M)
    blocks += re.findall(r"^ {4}.*$", prose, re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`([^`]+)`", prose)
    return [re.sub(r"\s+", " ", line.split(" #")[0]).strip() for line in lines + spans]


def exists(name):
    """Whether a dotted name is a module, or an attribute within one."""
    found = nasfast
    path = "nasfast"
    for part in name.split(".")[1:]:
        path = f"{path}.{part}"
        if hasattr(found, part):
            found = getattr(found, part)
        else:
            try:
                found = importlib.import_module(path)
            except ImportError:
                return False
    return True


def printed(function, *arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        function(*arguments)
    return out.getvalue()


@functools.cache
def help_of(*words):
    """What a command prints for --help."""
    return printed(command_line.main, list(words))


@functools.cache
def flags_of(command):
    """Every flag of a command, of whatever method."""
    if command == "evaluate":
        texts = [printed(m.parse_evaluate, ["--help"], "") for m in METHODS.values()]
    else:
        variants = {
            "search": [
                *([method, "--help-all"] for method in METHODS),
                *(["restoration", "--task", task, "--help-all"] for task in TASKS),
                ["--resume", "RUN", "--help"],
            ],
            "train": [
                ["fast_nas_arch0", "--help-all"],
                ["fpn_fcos_mnv2_128", "--help-all"],
                ["irnas-denoise", "--help-all"],
                ["--resume", "RUN", "--help"],
            ],
            "cache": [[word, "--help"] for word in ("ls", "verify", "rm")],
            "check": [[method, "--help"] for method in METHODS],
        }
        texts = [help_of(command, *words) for words in variants.get(command, [["--help"]])]
    if command == "profile":  # takes those of the search that it is for
        return {*flags_of("search"), *(flag for text in texts for flag in FLAG.findall(text))}
    return {"--help", "--help-all", *(flag for text in texts for flag in FLAG.findall(text))}


def missing_in(text):
    """Names, commands and flags of a page that do not exist."""
    missing = [name for name in set(re.findall(r"\bnasfast(?:\.\w+)+", text)) if not exists(name)]
    for code in code_of(text):
        call = re.match(r"(?:.* && )*(?:python -m )?nasfast ([a-z]\S*)(.*)", code)
        if call is None:
            every = ELSEWHERE.union(*map(flags_of, COMMANDS))
            if code.startswith("--"):
                missing += [flag for flag in FLAG.findall(code) if flag not in every]
        elif call[1] not in COMMANDS:
            missing.append(f"nasfast {call[1]}")
        else:
            flags = FLAG.findall(call[2])
            missing += [f"nasfast {call[1]} {f}" for f in flags if f not in flags_of(call[1])]
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_mentions_exists(page):
    assert missing_in(page.read_text()) == []


def test_a_missing_name_is_found():
    page = (
        "`nasfast.ops.nothing` and `nasfast serch`.\n\n"
        "    nasfast train RUN \\\n        --epoch 3  # --why\n\n"
        "```sh\npip install . && nasfast search --bugdet 3\n```\n`--stage0.nothing`, `--seed`\n"
    )
    assert sorted(missing_in(page)) == [
        "--stage0.nothing",
        "nasfast search --bugdet",
        "nasfast serch",
        "nasfast train --epoch",
        "nasfast.ops.nothing",
    ]


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_its_command(command):
    text = help_of(command, "--help")
    assert f"usage: nasfast {command} " in text
    assert command in help_of("--help")


def test_help_of_search_is_short_and_names_everything():
    text = help_of("search", "--help")
    for method in METHODS:
        assert re.search(rf"^  {method} +\S", text, re.M)
        assert f"usage: nasfast search [-h] [OPTIONS] [{{{method}}}]" in help_of(
            "search", method, "--help"
        )
    assert "nasfast search --resume RUN [--budget] " in text
    described = re.findall(r"^(?:│ |  )(--\w[\w-]+)", text.partition("more flags")[0], re.M)
    assert len(described) == 10
    assert {"--data", "--preset", "--budget", "--strategy", "--workers"} <= set(described)
    assert "more flags; nasfast search --help-all describes them\n" in text
    assert re.search(r"^  stage0 +--stage0.samples --stage0.crop ", text, re.M)
    assert set(FLAG.findall(help_of("search", "--help-all"))) <= set(FLAG.findall(text)) | {
        "--no-deterministic",
        "--decoder.no-aux-cell",
        "--stage1.no-gate-epochs",
        "--ppo.no-embed-decisions",
    }
    assert text.count("\n") < 80


def test_help_of_train_is_that_of_the_source():
    text = help_of("train", "irnas-denoise", "--help")
    assert "--steps INT" in text
    assert "more flags; nasfast train irnas-denoise --help-all describes them" in text
    assert "--network.width" in text.partition("more flags")[2]


def test_an_unknown_command_suggests_one(capsys):
    assert command_line.main(["serch"]) == 2
    assert capsys.readouterr().err == (
        f"error: nasfast: expected one of {', '.join(COMMANDS)}, got 'serch'; did you mean "
        "search?\n"
    )


def test_every_command_has_its_module():
    from nasfast import commands

    modules = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    assert modules == set(COMMANDS)
