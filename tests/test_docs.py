"""The documents, against the code that they describe."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import tomllib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from twisted.internet.task import Clock

from llmproxy import config, handover, policy, reactor, site
from llmproxy.balancing import Standing
from llmproxy.billing import settlement
from llmproxy.ctl import make_parser
from llmproxy.endpoints import ENDPOINTS
from llmproxy.logs import LEVELS
from llmproxy.metrics import ERROR_TYPES, Metrics
from llmproxy.model import Kind, Outcome, Reading, State
from llmproxy.queueing import FairQueue
from llmproxy.resource import MODELS, USAGE
from llmproxy.tryout import GREETING, PORT

ROOT = Path(__file__).parent.parent
README, OPERATIONS, ARCHITECTURE = "README.md", "docs/operations.md", "docs/architecture.md"
OURS = (README, OPERATIONS, ARCHITECTURE, "docs/capacity.md", "CHANGELOG.md", "SECURITY.md")
ALL = (*OURS, "docs/mongodb.md")


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next one of its level or above."""
    level, rest = re.search(rf"(?ms)^(#+) {re.escape(title)}$(.*)", text).groups()  # type: ignore[union-attr]
    return re.split(rf"(?m)^#{{1,{len(level)}}} ", rest)[0]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables in `text`, without their heads."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if re.match(r"\|[-|]+\|$", line):
            found.pop()  # the line before it was the head
        elif line.startswith("|"):
            found.append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def code(cell: str) -> list[str]:
    """What a cell has in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language; those in lists without their indent."""
    found = re.findall(rf"(?ms)^( *)```{language}\n(.*?)^ *```$", text)
    return ["\n".join(line.removeprefix(pad) for line in body.split("\n")) for pad, body in found]


def documented(title: str, name: str = OPERATIONS) -> dict[str, list[str]]:
    """The rows of the tables under a heading, by each name in their first cell."""
    return {word: cells for cells in rows(section(text_of(name), title)) for word in code(cells[0])}


# Settings


def settings() -> dict[str, str]:
    """Every setting that the configuration takes, with its default as the document shows it."""
    found: dict[str, str] = {}
    for prefix, cls in {
        "": config.Config,
        "db.": config.Database,
        "ledger.": config.LedgerConfig,
        "admin.": config.Admin,
        "metrics.": config.Metrics,
        "limits.": config.KeyLimits,
        "backends.NAME.": config.Backend,
        "backends.NAME.replicas[].": config.Replica,
        "prices.": config.Prices,
        "prices.models.NAME.": config.PriceEntry,
    }.items():
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in fields(cls):
            rule = next(iter(getattr(hints[field.name], "__metadata__", ())), None)
            if rule is None:
                continue  # a section, or a backend's name
            found[prefix + field.name] = shown(field.default)
            if rule.secret:
                found[f"{prefix}{field.name}_file"] = "none"
    return found | {
        "backends.NAME.url": "required",
        "backends.NAME.replicas": "`[]`",
        "backends.NAME.replicas[].token": "the backend's",
        "backends.NAME.replicas[].model": "the backend's",
        "backends.NAME.model": "`NAME`",
        "backends.NAME.timeout": "`timeout_read`",
    }


def shown(default: object) -> str:
    if default is MISSING:
        return "required"
    if default is None:
        return "none"
    if isinstance(default, tuple):
        return f"`{json.dumps(list(default))}`"
    return f"`{json.dumps(str(default) if isinstance(default, Path) else default)}`"


def test_every_setting_is_documented_with_its_default_and_no_other() -> None:
    table = {name: cells[1] for name, cells in documented("Settings").items()}
    assert table == settings()


def test_the_configuration_in_the_readme_is_valid() -> None:
    [text] = blocks(text_of(README), "toml")
    parsed = config.parse(tomllib.loads(text), read_text=lambda path: "secret")
    assert parsed.backends["qwen"].timeout == 600


def test_every_variable_is_documented() -> None:
    assert documented("Environment variables").keys() == {
        config.PATH_VARIABLE,
        config.DB_URI_VARIABLE,
        handover.VARIABLE,
        site.VARIABLE,
        reactor.VARIABLE,
    }


# What requests may ask for


def test_every_field_that_no_backend_gets_is_documented_and_no_other() -> None:
    within = {"vllm_xargs", "chat_template_kwargs", "tokenize"}
    within |= {"encoding_format", "bytes", "bytes_only"}
    listed = documented("What requests may ask for").keys()
    assert listed - within == policy.REFUSED_IN_FORMS.keys()


# Metrics


def exposed() -> dict[str, set[str]]:
    """The labels of every metric, once each has been used."""
    metrics = Metrics("0", ["m"])
    metrics.request_started()
    metrics.request_done(b"POST", b"/", 200, 1.0)
    backend = metrics.for_backend("m")
    backend.request_done(200, 1.0)
    backend.error("refused")
    backend.billed(dict.fromkeys(Kind, 1))
    metrics.backend_up("m", "u", True)
    metrics.watch({("m", "u"): Standing("u")}, {"m": FairQueue(Clock())})
    metrics.certificate("c.pem", 0.0)
    found = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        labels = {name for sample in family.samples for name in sample.labels} - {"le"}
        found[family.name + ("_total" if family.type == "counter" else "")] = labels
    return found


def test_every_metric_is_documented_with_its_labels_and_no_other() -> None:
    table = documented("Metrics")
    assert table.keys() == exposed().keys()
    for name, labels in exposed().items():
        assert set(code(table[name][1])) == labels, name


@pytest.mark.parametrize("name", ALL)
def test_metrics_that_are_mentioned_exist(name: str) -> None:
    known = set(exposed()) | {"llmproxy_plugin"}
    assert set(re.findall(r"\bllmproxy_\w+", text_of(name))) <= known


def test_the_types_of_backend_errors_are_those_of_the_metric() -> None:
    types = set(code(documented("Metrics")["llmproxy_backend_errors_total"][2]))
    assert types == ERROR_TYPES
    assert {str(outcome) for outcome in Outcome} - {
        "complete",
        "client_gone",
        "out_of_budget",
    } <= types


# States and endings


def test_every_state_is_documented() -> None:
    assert documented("States").keys() == {str(state) for state in State}


@pytest.mark.parametrize(("title", "name"), [("Endings", OPERATIONS), ("Endings and states", "")])
def test_every_ending_is_documented(title: str, name: str) -> None:
    table = section(text_of(name or ARCHITECTURE), title).split("reading |")[0]
    listed = {word for cells in rows(table) for word in code(cells[0])}
    assert listed == {str(outcome) for outcome in Outcome}


READINGS = (
    Reading({Kind.PROMPT: 1, Kind.COMPLETION: 2}, exact=True),
    Reading({Kind.PROMPT: 1}, raw="{}"),
    Reading({Kind.COMPLETION: 2}),
    Reading({Kind.COMPLETION: 0}),
    Reading(),
)


def test_the_table_of_states_is_what_billing_does() -> None:
    text = section(text_of(ARCHITECTURE), "Endings and states")
    head = next(line for line in text.splitlines() if line.startswith("| reading |"))
    table = rows(text[text.index(head) :])
    assert len(table) == len(READINGS)
    assert set(code(head)) == {str(outcome) for outcome in Outcome}
    for outcomes, column in zip(head.strip("|").split("|")[1:], range(1, 4), strict=True):
        for cells, reading in zip(table, READINGS, strict=True):
            for outcome in code(outcomes):
                closed = settlement(Outcome(outcome), reading, datetime.now(UTC))
                assert [str(closed.state)] == code(cells[column]), (outcome, cells[0])


# Log lines


def log_formats() -> dict[str, str]:
    """Every format that is given to a logger, with the level at which it is logged."""
    names = {"failure": "CRITICAL", "warn": "WARNING", "Line": "INFO"} | {
        name.lower(): name for name in LEVELS
    }
    found = {}
    for path in sorted((ROOT / "llmproxy").rglob("*.py")):
        tree = ast.parse(path.read_text())
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args):
            if (method := logging_method(call, names)) is not None:
                text = call.args[1 if method == "Line" else 0]
                found[literal(text, tree)] = names.get(method, method)
    return found


def logging_method(call: ast.Call, names: Mapping[str, str]) -> str | None:
    match call.func:
        case ast.Attribute(value=ast.Name(id="log") | ast.Attribute(attr="log"), attr=method):
            return method if method in names else None
        case ast.Name(id="Line"):
            return "Line"
        case ast.Name(id="tell"):  # a method of the logger that was chosen before
            return "INFO for up, WARNING for down"
    return None


def literal(node: ast.expr, tree: ast.AST) -> str:
    if isinstance(node, ast.Name):
        values = [
            each.value
            for each in ast.walk(tree)
            if isinstance(each, ast.Assign) and ast.dump(each.targets[0]) == stored(node.id)
        ]
        [node] = values
    assert isinstance(node, ast.Constant), ast.dump(node)
    return str(node.value)


def stored(name: str) -> str:
    return ast.dump(ast.Name(id=name, ctx=ast.Store()))


def listed_lines() -> dict[str, str]:
    """The lines in the document, each with its level; "" in the table that has none."""
    found = {}
    for cells in rows(section(text_of(OPERATIONS), "Log lines")):
        for line in code(cells[0]):
            found[line] = cells[1] if len(cells) == 3 else "CRITICAL"
    return found


def test_every_log_line_is_documented_with_its_level() -> None:
    formats, lines = log_formats(), listed_lines()
    assert len(formats) > 30
    for text, level in formats.items():
        assert lines.get(text) == level, text


def test_every_documented_log_line_exists() -> None:
    own = (ROOT / "llmproxy" / "logs.py").read_text()  # the log's own, about itself
    for line in listed_lines().keys() - log_formats().keys():
        assert line in own, line


# llmproxyctl


def commands() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command that can be given, such as `user create`, with its parser."""

    def walk(words: str, parser: argparse.ArgumentParser) -> Iterator[tuple[str, Any]]:
        groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        for group in groups:
            for name, inner in group.choices.items():
                yield from walk(f"{words} {name}", inner)
        if not groups:
            yield words.strip(), parser

    yield from walk("", make_parser())


def shell_commands(name: str) -> list[list[str]]:
    """The words of every `llmproxyctl` command in the shell blocks of a document."""
    text = "\n".join(blocks(text_of(name), "sh")).replace("\\\n", " ")
    found = re.findall(r"(?m)(?:^|/|exec llmproxy )llmproxyctl ([^>\n]*)", text)
    return [shlex.split(each) for each in found]


@pytest.mark.parametrize("name", ALL)
def test_the_commands_in_the_documents_are_understood(name: str) -> None:
    stand_ins = {"N": "1", "SECONDS": "1", "ID": "an-id"}
    for words in shell_commands(name):
        make_parser().parse_args([stand_ins.get(word, word) for word in words])


def test_every_command_has_an_example() -> None:
    examples = [" ".join(words) + " " for words in shell_commands(OPERATIONS)]
    for command, _ in commands():
        assert any(each.startswith(f"{command} ") for each in examples), command


def test_every_option_of_the_commands_is_documented() -> None:
    text = section(text_of(OPERATIONS), "llmproxyctl")
    for command, parser in commands():
        for action in parser._actions:
            long = [each for each in action.option_strings if each.startswith("--")]
            for option in long:
                assert option == "--help" or option in text, f"{command} {option}"


# Paths, links, examples


def test_every_path_is_in_the_readme_and_no_other() -> None:
    listed = {
        word.removeprefix("POST ").removeprefix("GET ")
        for cells in rows(section(text_of(README), "Use"))
        for word in code(cells[0])
    }
    models = MODELS.decode()
    assert listed == {*ENDPOINTS, models, f"{models}/{{id}}", USAGE.decode()}


def test_the_paths_that_stream_are_marked() -> None:
    for cells in rows(section(text_of(README), "Use")):
        endpoint = ENDPOINTS.get(code(cells[0])[0].removeprefix("POST "))
        assert cells[1] == ("yes" if endpoint is not None and endpoint.streams else "no")


@pytest.mark.parametrize("name", ALL)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def anchors(text: str) -> set[str]:
    heads = re.findall(r"(?m)^#+ (.*)$", text)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", ALL)
def test_files_that_are_named_exist(name: str) -> None:
    folders = (ROOT, ROOT / "llmproxy", ROOT / "docs")
    for word in re.findall(
        r"[\w./-]+\.(?:py|sql|js|toml|md|service|socket|yaml|yml)\b", text_of(name)
    ):
        if word.startswith("/") or "://" in word:
            continue
        near = [folder / word for folder in (*folders, (ROOT / name).parent)]
        assert any(each.exists() for each in near), word


def test_every_module_has_its_place_in_the_architecture() -> None:
    text = section(text_of(ARCHITECTURE), "The rooms")
    named = {word for cells in rows(text) for word in code(cells[0])}
    modules = {str(path.relative_to(ROOT / "llmproxy")) for path in modules_of_ours()}
    assert named == modules - {"__init__.py"} | {"twisted/plugins/llmproxy_plugin.py"}


def modules_of_ours() -> list[Path]:
    return sorted((ROOT / "llmproxy").rglob("*.py"))


def test_modules_import_only_what_stands_above_them() -> None:
    text = section(text_of(ARCHITECTURE), "The rooms")
    order = [word for cells in rows(text) for word in code(cells[0])]
    place = {dotted(word): number for number, word in enumerate(order)}
    for path in modules_of_ours():
        me = dotted(str(path.relative_to(ROOT / "llmproxy")))
        for other in imports(ast.parse(path.read_text()), set(place)):
            assert me in ("", other) or place[other] < place[me], f"{me} imports {other}"


def dotted(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").removesuffix("__init__").removesuffix(".")


def imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """The modules of ours that a module needs when it is imported."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmproxy"):
            base = (node.module or "").removeprefix("llmproxy").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                if inner in known:
                    yield inner
                elif base:
                    yield base


@pytest.mark.parametrize("name", ALL)
def test_examples_in_python_and_json_are_valid(name: str) -> None:
    for block in blocks(text_of(name), "python"):
        compile(block, name, "exec")
    for block in blocks(text_of(name), "json"):
        json.loads(block)


def test_the_demo_s_command_is_in_the_readme() -> None:
    command = GREETING.format(port=PORT).split("terminal:")[1].split("The bill")[0]
    said = "\n".join(line.removeprefix("  ") for line in command.strip("\n").split("\n")).strip()
    assert said in text_of(README)


@pytest.mark.parametrize("name", OURS)
def test_the_documents_are_plain_text(name: str) -> None:
    assert text_of(name).isascii()
