"""Commands that a Markdown page documents, and what is wrong with one of them.

A command is a script, or `python -m moce_dist`, and the words after it. In a code block, where
people copy it from, it must be complete. Within a sentence it may leave out words, stand for many
(NAME, a|b), or be `--set a.b=value` alone.
"""

import argparse
import contextlib
import itertools
import re
import shlex
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from benches.settings import load_bench_config
from in_process import ROOT, run_here

from moce_dist.cli import job_parser
from moce_dist.config import Config, load_config
from moce_dist.settings import ConfigError
from moce_dist.study.request import read_study

CONFIGS = ROOT / "configs"
MODULE = "-m moce_dist"
# with `python` a script may lie in any folder; words are one space apart
_PROGRAM = rf"(?:python|torchrun(?: \S+)* --) (?:{MODULE}\b|[\w./-]+\.py)|(?:jobs|k8s)/[\w/]+\.py"
_COMMAND = re.compile(rf"(?<![\w/-])({_PROGRAM})((?: \S+)*)")
_SET = re.compile(r"--set \S+=.*")
_ENDS = (">", "|", "&", "&&", ";")
_LEFT_OUT = re.compile(r"are required: |expected .*argument|invalid .*: '[A-Z]+'")


class Command(NamedTuple):
    """A command; `program` is empty where a page names only settings."""

    program: str
    words: tuple[str, ...]
    is_whole: bool

    def __str__(self):
        return " ".join((self.program, *self.words))


def commands_of(page):
    """Find the commands of a page's code blocks and quotations."""
    page = re.sub(r" *\\\n *", " ", page)
    blocks = re.findall(r"^ {4}(.*)$", page, re.M)
    quoted = re.findall(r"`([^`]+)`", re.sub(r"^ {4}.*$", "", page, flags=re.M))
    found = [command for line in blocks for command in _commands_in(line, is_block=True)]
    for text in quoted:
        found += _commands_in(" ".join(text.split()).replace(r"\|", "|"), is_block=False)
    return sorted(set(found))


def _commands_in(text, *, is_block):
    for called, rest in _COMMAND.findall(text):
        program = MODULE if MODULE in called else called.rpartition(" ")[2]
        words = itertools.takewhile(lambda w: w not in _ENDS, shlex.split(rest, comments=True))
        yield Command(program, tuple(words), is_block and " " in called)
    if not _COMMAND.search(text) and (settings := _SET.search(text)):
        yield Command("", tuple(shlex.split(settings[0])), is_whole=False)


def mistakes(command):
    """Say what is wrong with a command: its file, a word, a flag, a setting."""
    program, words, is_whole = command
    if program not in ("", MODULE) and not (ROOT / program).is_file():
        return [f"{program}: no such file"]
    if not words and not is_whole:
        return []
    every = itertools.product(*([word] if is_whole else word.split("|") for word in words))
    return [said for each in every for said in _mistakes(program, each, is_whole) if said]


def _mistakes(program, words, is_whole):
    if program:
        said = _said_against(program, words)
        if said and not is_whole and _LEFT_OUT.search(said):
            # argparse has not come to the other flags
            flags = {word.partition("=")[0] for word in words if word.startswith("--")}
            said = ", ".join(flags - _flags(program, words))
        yield said
    with contextlib.chdir(ROOT):
        yield _wrong_setting(program, words)


class _ParsedError(BaseException):
    """Ends a script once it has parsed its command line."""


def _said_against(program, words):
    """Let a script parse its command line, and no more; return its error."""
    if program != MODULE and "parse_args" not in (ROOT / program).read_text():
        return "parses no arguments"
    plain = argparse.ArgumentParser.parse_args

    def parse_and_end(parser, argv=None, namespace=None):
        plain(parser, argv, namespace)
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
        try:
            done = _run(program, *words)
        except _ParsedError:
            return ""
    return done.stderr.strip().rpartition("\n")[2]


def _run(program, *words):
    name = "moce_dist" if program == MODULE else (ROOT / program).with_suffix("")
    return run_here(name, *words)


def _flags(program, words):
    commands = [word for word in words[:1] if program == MODULE and not word.startswith("-")]
    return _flags_in_help(program, *commands)


@cache
def _flags_in_help(program, *commands):
    shown = _run(program, *commands, "--help").stdout
    return {*re.findall(r"^ +(?:-\w, )?(--[\w-]+)", shown, re.M)}


def _wrong_setting(program, words):
    """Load what --config and --set ask for, as the program does; return what is refused."""
    try:
        given, others = job_parser("", "").parse_known_args(words)
        if old := [text for text in given.overrides if text.startswith((*Config.RENAMED,))]:
            return f"--set {old[0]}: the field has another name now"
        usual, of_bench = None, any(text.startswith("bench.") for text in given.overrides)
        load = load_bench_config if of_bench and program == "" else load_config
        if program == "jobs/study.py":
            load, usual = read_study, CONFIGS / "studies" / "tiny.yaml"
        elif program == "jobs/bench.py":
            files = [CONFIGS / "bench" / f"{word}.yaml" for word in others]
            load, usual = load_bench_config, next(filter(Path.exists, files), None)
        elif program == "jobs/pretrain.py":
            usual = CONFIGS / "quickstart.yaml"
        load(Path(given.config) if given.config else usual, given.overrides)
    except ConfigError as error:
        return "" if _LEFT_OUT.search(str(error)) else str(error)
    return ""
