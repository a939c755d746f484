"""`transformer-problems apply`: clauses as they are measured, a folder where it helps, one line for mistakes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from transformer_problems.checkpoints.bundled import bundled
from transformer_problems.checkpoints.checkup import exactly
from transformer_problems.cli import main
from transformer_problems.cli.apply import _print_clause
from transformer_problems.clinic import treat as clinic
from transformer_problems.clinic.contract import Clause
from transformer_problems.core.records import Interval

COMMAND = [sys.executable, "-c", "from transformer_problems.cli import main; main()", "apply"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=180, check=False)


@pytest.fixture
def without_cache(tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(bundled("draft"), tmp_path / "models" / "slow"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "use_cache": False}))
    return folder


def stopped_code(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command, run in this process."""
    monkeypatch.setattr("signal.signal", lambda *given: None)  # ours would stay for the tests that follow
    monkeypatch.setattr("sys.argv", ["transformer-problems", "apply", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_treatment_that_helps_is_told_and_written(without_cache: Path, tmp_path: Path) -> None:
    out, receipt = tmp_path / "new", tmp_path / "r.json"
    done = run("kv-cache", str(without_cache), "--out", str(out), "--json", str(receipt))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("slow  LlamaForCausalLM")
    assert "KV Cache: helps" in done.stdout
    assert done.stdout.count("kept ") == 3
    assert f"wrote {out}" in done.stdout
    told = json.loads(receipt.read_text())
    assert (told["verdict"], told["written"]) == ("helps", str(out))
    assert (out / "treatment.json").is_file()
    assert {file.name for file in tmp_path.iterdir()} == {"models", "new", "r.json"}


def test_several_are_applied_in_the_order_given(without_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    run("rope-scaling", "kv-cache", str(without_cache), "--out", str(out), "--write-anyway", "--factor", "3")
    told = json.loads((out / "treatment.json").read_text())
    assert told["solutions"] == ["rope-scaling", "kv-cache"]
    assert told["steps"][0]["settings"]["rope_parameters"]["factor"] == 3.0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["alibi", "MODEL", "--out", "new"], "trained anew"),
        (["alib", "MODEL", "--out", "new"], "unknown solution 'alib'. Nearest: alibi"),
        (["kv-cache", "MODEL"], "--out"),
        (["kv-cache", "--out", "new"], "a solution and then a model are needed"),
        (["MODEL", "kv-cache", "--out", "new"], "solutions come first, and the model last"),
        (["kv-cache", "MODEL", "--out", "new", "--json", "."], "cannot write .: it is a folder"),
        (["kv-cache", "/no/such/folder", "--out", "new"], "there is no /no/such/folder"),
        (["kv-cache", "MODEL", "--out", "."], "exists already"),
        (["kv-cache", "MODEL", "--out", "/no/such/folder/new"], "cannot write"),
        (["kv-cache", "MODEL", "--out", ""], "the name of the folder is empty"),
        (["kv-cache", "MODEL", "--out", "new", "--json", "new"], "--json must be outside of --out"),
        (["kv-cache", "MODEL", "--out", "new", "--factor", "2"], "--factor is for rope-scaling"),
        (["rope-scaling", "MODEL", "--out", "new", "--factor", "1"], "factor must be more than 1"),
        (["kv-cache", "kv-cache", "MODEL", "--out", "new"], "named 2 times"),
        (["kv-cache", "MODEL", "--out", "new"], "use its cache already"),
        (["rope-scaling", "MODEL", "--out", "new", "--data", "/no/such/file"], "--data must be an existing"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = stopped_code(monkeypatch, *(str(bundled("draft")) if one == "MODEL" else one for one in arguments))
    seen = capsys.readouterr()
    assert code == 2
    assert told in seen.err
    assert seen.err.count("\n") == 1
    assert seen.out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--out", "--json"])
def test_nothing_is_written_into_what_is_read(
    option: str,
    without_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {file.name: file.read_bytes() for file in without_cache.iterdir()}
    places = {"--out": str(tmp_path / "new"), option: str(without_cache / "config.json.new")}
    options = [part for pair in places.items() for part in pair]
    assert stopped_code(monkeypatch, "kv-cache", str(without_cache), *options) == 2
    assert f"{option} must be outside of the model's folder" in capsys.readouterr().err
    data = tmp_path / "data.txt"
    data.write_text("def f(x):\n    return x\n" * 1_000)
    options = ["--out", str(tmp_path / "new"), "--data", str(data), "--json", str(data)]
    assert stopped_code(monkeypatch, "kv-cache", str(without_cache), *options) == 2
    assert "--json must not be what --data names" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in without_cache.iterdir()} == before
    assert {file.name for file in tmp_path.iterdir()} == {"models", "data.txt"}


@pytest.mark.parametrize("anyway", [False, True])
def test_what_does_not_help_is_written_only_where_it_is_asked_for(
    anyway: bool,
    without_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(clinic, "verdict", lambda clauses, on_foreign_texts: "hurts")
    out = tmp_path / "new"
    options = ["--write-anyway"] if anyway else []
    code = stopped_code(monkeypatch, "kv-cache", str(without_cache), "--out", str(out), *options)
    assert code == (0 if anyway else 1)
    assert out.exists() == anyway
    assert ("nothing was written" in capsys.readouterr().out) != anyway
    assert {file.name for file in tmp_path.iterdir()} == ({"models", "new"} if anyway else {"models"})


def test_a_treatment_stopped_on_its_way_leaves_nothing(
    without_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(clinic, "read_back", stop)
    assert stopped_code(monkeypatch, "kv-cache", str(without_cache), "--out", str(tmp_path / "new")) == 130
    assert capsys.readouterr().err.strip() == "stopped"
    assert {file.name for file in tmp_path.iterdir()} == {"models"}


def test_a_clause_names_both_ends_the_effect_and_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    effect = Interval(-1.5, -2.0, -1.0)
    clause = Clause(
        "claim", "a loss", "nats", exactly(2.5), exactly(1.0), effect, "difference", "lower", "kept", 9, "better"
    )
    _print_clause(Console(width=110), clause)
    line = "kept      09  a loss  2.500 → 1.000 nats, -1.500 (95%: -2.000 to -1.000)   (lower)"
    assert capsys.readouterr().out.rstrip() == line
    _print_clause(Console(width=60), clause)
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.split() == ["kept", "09"]
    assert all(line.startswith("    ") for line in rest)
