"""How a command ends: its exit status and the one line on stderr."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from t2idist.observability.command import describe_error, run_command


def test_urls_in_errors_lose_their_query_and_user() -> None:
    signed = "https://host/a.txt?X-Amz-Signature=sig&X=1"
    for text, expected in (
        (f"{signed}: no such object", "https://host/a.txt: no such object"),
        (f"'{signed}' and {signed}", "'https://host/a.txt' and https://host/a.txt"),
        (f'GET "{signed}"; try again.', 'GET "https://host/a.txt"; try again.'),
        (f"is it {signed}?", "is it https://host/a.txt"),
        ("https://me:pass@host/x: refused", "https://host/x: refused"),
        ("what is it? a file", "what is it? a file"),
        ("s3://bucket/x: is it there?", "s3://bucket/x: is it there?"),
    ):
        assert describe_error(ValueError(text)) == expected


@pytest.mark.parametrize(
    ("interrupted", "expected"), [("", "tool: interrupted\n"), ("stopped; run again", "stopped; run again\n")]
)
def test_ctrl_c_is_one_line(interrupted: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise KeyboardInterrupt(signal.SIGTERM)

    assert run_command("tool", main, interrupted=interrupted) == 143
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("command", "status", "error"),
    [
        ("print('text'); print(sys.stdout.isatty()); return 0", 0, ""),
        ("raise ValueError('bad')", 2, "tool: bad\n"),
        ("raise BrokenPipeError", 141, ""),
    ],
)
def test_closed_stdout_is_no_error(command: str, status: int, error: str) -> None:
    """As with >&- in a shell."""
    code = f"import sys\nfrom t2idist.observability.command import run_command\ndef main():\n {command}\n"
    code += "sys.exit(run_command('tool', main))"
    closed = ["sh", "-c", 'exec "$0" "$@" >&-', sys.executable, "-c", code]
    done = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, error)
