"""What ended a run is said with a way to go on that works."""

import signal
from pathlib import Path

import pytest

from jaxrl.config import Config
from jaxrl.interrupt import EndedAtOnce
from jaxrl.program import start
from jaxrl.types import RunError

CONFIG = Path(__file__).parent.parent / "configs" / "arithmetic_inprocess.yaml"
NEWEST = "to go on from the newest checkpoint, add --resume"
FIRST = "no checkpoint was written yet; --resume starts from the first step"
AGAIN = "nothing was written yet; start it again as it was"


def ended(error: BaseException, folder: Path) -> int:
    def go(command, hosts):
        raise error

    return start(["--config", str(CONFIG), f"--run.dir={folder}", "--run.name=run"], Config, go)


@pytest.mark.parametrize(
    "error, code",
    [
        (RunError("it broke"), 1),
        (KeyboardInterrupt(), 128 + signal.SIGINT),
        (EndedAtOnce(signal.SIGTERM), 128 + signal.SIGTERM),
    ],
)
@pytest.mark.parametrize(
    "left, expected",
    [
        ([], AGAIN),
        (["config.yaml", "checkpoints/"], FIRST),
        (["config.yaml", "checkpoints/tmp.step_00000003/"], FIRST),
        (["config.yaml", "checkpoints/step_00000003/"], NEWEST),
    ],
)
def test_how_to_go_on_depends_on_what_is_there(error, code, left, expected, tmp_path, capsys):
    for name in left:
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(parents=True) if name.endswith("/") else path.touch()
    assert ended(error, tmp_path) == code
    said = capsys.readouterr().err
    assert [line for line in (NEWEST, FIRST, AGAIN) if line in said] == [expected]
