"""Reads a Dockerfile and carries out its RUN and COPY steps in a folder, without an engine."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """One stage: its base image, its name and its instructions as (WORD, rest of the line)."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def only(self, word: str) -> str:
        """The rest of the stage's one instruction `word`."""
        [found] = [rest for step, rest in self.steps if step == word]
        return found


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile, which has neither continued lines nor heredocs."""
    stages: list[Stage] = []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        word, rest = line.split(" ", 1)
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base, name or "final"))
        else:
            stages[-1].steps.append((word, rest))
    return stages


class Builder:
    """Builds in a folder what stands for an image's root, with all paths translated.

    All stages are built at the same place, one after the other, so that the paths that a step
    writes into files are right in the next stage too, as they are in an image.
    """

    def __init__(self, context: Path, folder: Path) -> None:
        self.root = folder / "root"
        self._context = context
        self._folder = folder
        self._workdir = self.root
        tools = folder / "tools"
        tools.mkdir()
        # A script, as a link would lose the environment that this Python belongs to, and pip.
        (tools / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        (tools / "python").chmod(0o755)
        # Where packages are had is the machine's own setting.
        kept = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self.env = {**kept, "HOME": str(folder), "PATH": f"{tools}:/usr/bin:/bin"}
        self._steps: dict[str, Callable[[str], None]] = {
            "COPY": self._copy,
            "ENV": self._set,
            "RUN": self._run,
            "WORKDIR": self._enter,
        }

    def build(self, stages: list[Stage]) -> None:
        """Carry out all stages; the last one stays at `root`."""
        for stage in stages:
            if self.root.exists():
                self.root.rename(self._folder / stages[stages.index(stage) - 1].name)
            self.root.mkdir()
            self._workdir = self.root
            for word, rest in stage.steps:
                if word in self._steps:
                    self._steps[word](rest)

    def translate(self, text: str) -> str:
        """`text` with the image's absolute paths replaced."""
        if os.geteuid() != 0:
            # Only root may give a folder to another user.
            text = re.sub(r" -[og] \d+", "", text)
        return re.sub(r"(?<![\w.}/])/(?=(src|opt|etc|var)\b)", f"{self.root}/", text)

    def _at(self, path: str) -> Path:
        return self.root / path[1:] if path.startswith("/") else self._workdir / path

    def _enter(self, path: str) -> None:
        self._workdir = self._at(path)
        self._workdir.mkdir(parents=True, exist_ok=True)

    def _set(self, rest: str) -> None:
        for pair in shlex.split(self.translate(rest)):
            name, _, value = pair.partition("=")
            self.env[name] = value.replace("$PATH", self.env["PATH"])

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        root = self._context
        if sources[0].startswith("--from="):
            root = self._folder / sources.pop(0).removeprefix("--from=")
        for source in sources:
            _copy(root / source.lstrip("/"), self._at(target), into=target.endswith("/"))

    def _run(self, command: str) -> None:
        done = subprocess.run(
            ["/bin/sh", "-c", self.translate(command)],
            cwd=self._workdir,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"RUN {command}\n{done.stdout}{done.stderr}"


def _copy(source: Path, target: Path, *, into: bool) -> None:
    if source.is_dir():
        # What .dockerignore leaves out is left out by the copy of a stage too, at no harm.
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, symlinks=True, ignore=ignored, dirs_exist_ok=True)
        return
    target = target / source.name if into else target
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)
