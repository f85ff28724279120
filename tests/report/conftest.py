"""Made-up records for the tests of tables, plots and pages, and a browser to open pages in."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from robustbench_deq.records.record import Record

MakeRecord = Callable[..., Record]


@pytest.fixture
def make_record() -> MakeRecord:
    """Builds a record from a few values; the rest follows from them."""

    def make(
        label: str = "joint PGD-40",
        model: str = "deq-conv",
        robust: float = 0.6875,
        cell_evals: float = 41.0,
        num_samples: int = 256,
        **changes: Any,
    ) -> Record:
        seconds = cell_evals / 10
        curve = [
            {
                "step": step,
                "cell_evals": cell_evals * step / 4,
                "cell_vjps": cell_evals * step / 4,
                "solver_steps": cell_evals * step / 2,
                "wall_seconds": seconds * step / 4,
                "robust_accuracy": min(1.0, robust + 0.02 * (4 - step)),
            }
            for step in (1, 2, 3, 4)
        ]
        base: dict[str, Any] = {
            "record_id": f"{abs(hash((label, model, robust, cell_evals))):x}",
            "created": "2025-01-31T12:00:00+00:00",
            "model": model,
            "model_sha256": "0123456789abcdef",
            "attack": "joint-pgd",
            "label": label,
            "attack_config": {"steps": 40, "random_start": False, "solver": {"name": "anderson"}},
            "threat": {"norm": "l2", "epsilon": 1.0},
            "data": {"name": "digits", "split": "test", "num_samples": num_samples, "digest": "feedc0de99"},
            "clean_accuracy": 0.875,
            "robust_accuracy": robust,
            "robust_accuracy_ci": [max(0.0, robust - 0.05), min(1.0, robust + 0.05)],
            "adversarial_loss": 0.78,
            "num_unconverged": 3,
            "num_failed": 0,
            "max_perturbation": 1.0,
            "cost": {
                "cell_evals": cell_evals,
                "cell_vjps": cell_evals - 1,
                "solver_steps": 2 * cell_evals,
                "wall_seconds": seconds,
                "peak_memory_mb": 500.0,
            },
            "curve": curve,
            "residuals": [0.5, 0.1, 0.0, None, 0.001],
            "diagnostics": {"num_audited": 1.0},
            "seed": 0,
            "batch_size": 128,
            "environment": {"torch": "2.9.0", "threads": 2, "commit": None},
        }
        return Record(**(base | changes))

    return make


class Chromium:
    """A headless browser on one page, driven over the pipe of its DevTools protocol: JSON messages that end with NUL.

    `problems` collects what the page throws, logs as an error, or asks of the network.
    """

    def __init__(self, program: str, profile: Path) -> None:
        their_input, our_output = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in os.pipe())
        our_input, their_output = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in os.pipe())
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(
            [program, *flags, "--remote-debugging-pipe", "about:blank"],
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=lambda: (os.dup2(their_input, 3), os.dup2(their_output, 4)),
        )
        for end in (their_input, their_output):
            os.close(end)
        self._input, self._output = our_input, our_output
        self._buffer, self._number, self._session = b"", 0, {}
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._output, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._input], [], [], 60)[0], "the browser is silent"
            part = os.read(self._input, 1 << 16)
            assert part, "the browser is gone"
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, values: dict[str, Any]) -> None:
        is_error = event == "Runtime.consoleAPICalled" and values["type"] in ("error", "warning", "assert")
        is_error |= event == "Log.entryAdded" and values["entry"]["level"] in ("error", "warning")
        is_request = event == "Network.requestWillBeSent" and not values["request"]["url"].startswith(
            ("file:", "data:")
        )
        if event == "Runtime.exceptionThrown" or is_error or is_request:
            self.problems.append(json.dumps(values))

    def open(self, path: Path, width: int = 1280, height: int = 900) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=path.as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key on what has the focus; `code` is the virtual key code."""
        for kind in ("keyDown", "keyUp"):
            values = {"text": text} if kind == "keyDown" and text else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **values)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def close(self) -> None:
        os.close(self._output)
        os.close(self._input)
        self._process.terminate()
        self._process.wait(timeout=30)


def find_chromium() -> str:
    """The program. Without one the test is skipped, but fails in continuous integration, which sets CI."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no chromium is installed")
    return program


@pytest.fixture
def find_browser() -> Callable[[], str]:
    return find_chromium


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(find_chromium(), tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def make_run(make_record: MakeRecord) -> Callable[..., tuple[Record, pd.DataFrame]]:
    """Builds a record with its per-sample rows from the samples that an attack broke, of eight; the last is unclean."""

    def make(name: str, broken: Iterable[int], num_samples: int = 8, **changes: Any) -> tuple[Record, pd.DataFrame]:
        sample_ids = np.arange(num_samples)
        is_clean = sample_ids < num_samples - 1
        is_robust = is_clean & ~np.isin(sample_ids, list(broken))
        samples = pd.DataFrame(
            {
                "sample_id": sample_ids,
                "label": sample_ids % 10,
                "clean_prediction": np.where(is_clean, sample_ids, sample_ids + 1) % 10,
                "adversarial_prediction": np.where(is_robust, sample_ids, sample_ids + 1) % 10,
                "is_clean_correct": is_clean,
                "is_robust": is_robust,
                "is_converged": True,
                "is_failed": False,
            }
        )
        base = {"record_id": name, "clean_accuracy": is_clean.mean(), "num_unconverged": 0, "num_samples": num_samples}
        return make_record(**(base | {"label": name, "robust": float(is_robust.mean())} | changes)), samples

    return make
