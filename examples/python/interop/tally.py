"""What was found for one family: numbers beside their limits, what was left over, and what failed."""

import subprocess
from dataclasses import dataclass, field

LIMIT = 1e-5


# What the files of this process are for, by loraweld's id.
MODEL = None


def run(*command):
    """Runs a program; if it fails, raises with what it said. A conversion is told which model its file is for."""
    command = [str(word) for word in command]
    if MODEL and "convert" in command:
        command += ["--model", MODEL]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip() or f"exit code {done.returncode}")
    return done.stdout


def first_line(error):
    text = str(error).strip().splitlines()
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    return kind + (text[0].removeprefix("error: ") if text else type(error).__name__)


@dataclass
class Tally:
    """`lines` has every number, in the order of the checks."""

    checked: list = field(default_factory=list)
    worst_update: float | None = None
    worst_forward: float | None = None
    keys_left: int = 0
    error: str = ""
    failed: bool = False
    lines: list = field(default_factory=list)

    def update(self, what, value):
        self.worst_update = max(self.worst_update or 0.0, value)
        self.number(what, "update", value)

    def forward(self, what, value):
        self.worst_forward = max(self.worst_forward or 0.0, value)
        self.number(what, "output", value)

    def number(self, what, kind, value):
        self.did(what)
        good = value <= LIMIT  # NaN fails.
        self.failed |= not good
        self.lines.append(f"{'ok  ' if good else 'FAIL'} {what}, {kind}: {value:.1e} (at most {LIMIT:g})")

    def left(self, what, keys):
        """Keys or layers that a reader did not take, or took and should not have."""
        self.did(what)
        if keys:
            self.keys_left += len(keys)
            self.failed = True
            self.lines.append(f"FAIL {what}: {len(keys)}, such as {', '.join(map(str, list(keys)[:3]))}"[:600])

    def agrees(self, what, said, taken):
        """Whether `loraweld check` said of a file what its reader did; `said` is None of a program without `check`."""
        if said is not None:
            self.did(what)
            wrong = said != taken
            self.failed |= wrong
            words = {True: "every key is taken", False: "keys are left over"}
            if wrong:
                self.error = self.error or f"{what}: check says that {words[said]}, but it is not so"
            self.lines.append(f"{'FAIL' if wrong else 'ok  '} {what}: check says that {words[said]}")

    def fails(self, what, reason):
        self.did(what)
        self.failed = True
        self.error = self.error or f"{what}: {reason}"
        self.lines.append(f"FAIL {what}: {reason}")

    def did(self, what):
        name = what.split(":")[0]
        if name not in self.checked:
            self.checked.append(name)
