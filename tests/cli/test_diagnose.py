"""`transformer-problems diagnose`: findings as they come, files for programs and people, one line for mistakes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console

from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.cli import main
from transformer_problems.cli.diagnose import DiagnosisRequest, _print_finding, diagnose_model
from transformer_problems.clinic import diagnose as clinic
from transformer_problems.core.findings import Finding, Remedy

COMMAND = [sys.executable, "-c", "from transformer_problems.cli import main; main()", "diagnose"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=180, check=False)


def test_a_check_up_tells_and_writes_what_it_found(tmp_path: Path) -> None:
    done = run("--only", "02", "--json", str(tmp_path / "d.json"), "--html", str(tmp_path / "d.html"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "LlamaForCausalLM, 4.79M parameters" in done.stdout
    assert "1 check, 1 ok" in done.stdout
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["complete"]
    assert [finding["problem"] for finding in found["findings"]] == [2]
    page = (tmp_path / "d.html").read_text()
    assert found["findings"][0]["meaning"] in page
    assert "http" not in page.replace("http://www.w3.org", "")  # it needs no network
    assert {file.name for file in tmp_path.iterdir()} == {"d.json", "d.html"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["/no/such/folder"], "there is no /no/such/folder"),
        (["--only", "77"], "unknown problem '77'"),
        (["--only", ","], "--only must name problems"),
        (["--data", "/no/such/file"], "--data must be an existing"),
        (["--json", "/no/such/folder/d.json"], "cannot write"),
        (["--html", "/"], "cannot write"),
        (["--json", "same", "--html", "./same"], "--json and --html must name two files"),
        ([""], "MODEL must be a folder or an id; it is empty"),
        (["--fail-on", "ok"], "--fail-on"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(arguments: list[str], told: str, tmp_path: Path) -> None:
    extra = [] if "--json" in arguments else ["--json", str(tmp_path / "d.json")]
    done = run(*arguments, *extra)
    assert done.returncode == 2
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def request(tmp_path: Path, **changes: object) -> DiagnosisRequest:
    asked: dict[str, object] = {
        "model": str(bundled("draft")),
        "only": "01,02,03",
        "data": None,
        "device": "cpu",
        "budget_s": None,
        "seed": 0,
        "json_file": tmp_path / "d.json",
        "html_file": None,
        "fail_on": None,
        "allow_pickle": False,
        "tokenizer": None,
    }
    return DiagnosisRequest(**(asked | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("severity", "fail_on", "code"),
    [
        ("mild", None, 0),
        ("mild", "severe", 0),
        ("mild", "mild", 1),
        ("severe", "mild", 1),
        ("severe", "severe", 1),
        ("not applicable", "mild", 0),
        ("not examined", None, 1),
    ],
)
def test_exit_codes_for_use_in_ci(
    severity: str, fail_on: str | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer import Exit

    monkeypatch.setattr(clinic, "_finding", lambda visit, problem: Finding(problem.number, severity, "so it is"))  # type: ignore[arg-type]
    if code:
        with pytest.raises(Exit) as caught:
            diagnose_model(request(tmp_path, fail_on=fail_on))
        assert caught.value.exit_code == code
    else:
        diagnose_model(request(tmp_path, fail_on=fail_on))


def test_an_interrupted_check_up_keeps_its_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finding(visit: object, problem: object) -> Finding:
        number: int = problem.number  # type: ignore[attr-defined]
        if number == 3:
            raise KeyboardInterrupt
        return Finding(number, "ok", "well")

    monkeypatch.setattr(clinic, "_finding", finding)
    with pytest.raises(SystemExit) as caught:
        diagnose_model(request(tmp_path))
    assert caught.value.code == 130
    found = json.loads((tmp_path / "d.json").read_text())
    assert not found["complete"]
    assert [kept["problem"] for kept in found["findings"]] == [1, 2]
    assert "stopped before the end" in capsys.readouterr().out


def test_a_budget_leaves_the_rest_unexamined(tmp_path: Path) -> None:
    diagnose_model(request(tmp_path, budget_s=0.0))
    found = json.loads((tmp_path / "d.json").read_text())
    assert {finding["severity"] for finding in found["findings"]} == {"not examined"}
    assert "budget" in found["findings"][0]["meaning"]


def test_a_check_up_that_fails_is_told_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer import Exit

    class Broken:
        not_for: ClassVar[dict[str, str]] = {}

        def examine(self, visit: object) -> object:
            raise RuntimeError("size mismatch\nin detail")

    monkeypatch.setattr(clinic, "has_checkup", lambda problem: True)
    monkeypatch.setattr(clinic, "load_checkup", lambda problem: Broken())
    with pytest.raises(Exit):
        diagnose_model(request(tmp_path))
    found = json.loads((tmp_path / "d.json").read_text())
    assert [f["meaning"] for f in found["findings"]] == ["the check-up failed with RuntimeError: size mismatch"] * 3


def test_a_check_up_stopped_while_it_loads_promises_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("transformer_problems.cli.diagnose.load_subject", stop)
    monkeypatch.setattr("signal.signal", lambda *given: None)  # ours would stay for the tests that follow
    monkeypatch.setattr("sys.argv", ["transformer-problems", "diagnose"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert capsys.readouterr().err.strip() == "stopped"


@pytest.mark.parametrize(("only", "is_named"), [("09", True), ("02", False)])
def test_the_end_names_a_remedy_that_can_be_applied(
    only: str, is_named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diagnose_model(request(tmp_path, only=only))
    line = f"try it: transformer-problems apply rope-scaling {bundled('draft')} --out DIR\n"
    assert (line in capsys.readouterr().out) == is_named


def test_a_narrow_terminal_keeps_sentences_together(capsys: pytest.CaptureFixture[str]) -> None:
    sentence = "a sentence of about fifty characters, which it is"
    finding = Finding(2, "mild", sentence, remedies=(Remedy("rope", "turned by its place"),))
    _print_finding(Console(width=60), finding)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["02  no positional awareness  mild", f"    {sentence}", "    → rope  turned by its place"]
    _print_finding(Console(width=100), finding)
    assert capsys.readouterr().out.startswith("02  no positional awareness       mild    a sentence")
