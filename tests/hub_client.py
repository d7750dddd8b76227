"""A process of its own that talks to the loopback Hub: huggingface_hub reads its environment once, when it is imported.

One process runs many pieces of code, because importing PyTorch and Transformers costs seconds.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path


ROOT = Path(__file__).parents[1]
# A piece of code that most tests need; it reads the variable IDS.
LOGITS = """
import sys

import torch
from transformers import AutoModelForCausalLM

def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS).to(model.device)).logits.flatten().tolist()

def pulled_logits(*name, **arguments):
    return logits(AutoModelForCausalLM.from_pretrained(*name, trust_remote_code=True, **arguments))
"""


def environment_of(url: str, home: Path, token: str | None, package: bool) -> dict[str, str]:
    """Variables of a process that talks to the Hub at `url`, arguments as in `HubClient`."""
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and Path(entry) != ROOT]
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join([*path, *[str(ROOT), str(ROOT / "scripts")] * package]),
        **({"HF_TOKEN": token} if token else {}),
    }


class HubClient:
    """`client.run(code)` runs code in the process and returns the variable `result` that it sets, as JSON has it.

    Args:
        url: of the Hub.
        home: HF_HOME, an empty folder: caches of files and of remote code.
        token: or None.
        package: whether `modeling_griffin` can be imported.
        triton: whether Triton can.
    """

    def __init__(self, url: str, home: Path, token: str | None, package: bool, triton: bool = False):
        self.home = home
        hidden = [name for name, found in {"modeling_griffin": package, "triton": triton}.items() if not found]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *hidden],
            env=environment_of(url, home, token, package),
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def set_up(self, code: str, **arguments) -> None:
        """Runs code whose variables, `arguments` among them, every later piece of code sees."""
        answer = self._ask(code, arguments, keep=True)
        assert answer["error"] is None, answer["traceback"]

    def run(self, code: str, **arguments):
        """`arguments` become variables, gone afterwards: no test may lean on what another one left.

        Raises AssertionError with the traceback where the code raises.
        """
        answer = self._ask(code, arguments)
        assert answer["error"] is None, answer["traceback"]
        return answer["result"]

    def error(self, code: str, **arguments) -> str:
        """What the code raises, as "Class: message"."""
        answer = self._ask(code, arguments)
        assert answer["error"] is not None, f"nothing was raised; printed:\n{answer['printed']}"
        return answer["error"]

    def printed(self, code: str, **arguments) -> str:
        """What the code prints."""
        answer = self._ask(code, arguments)
        assert answer["error"] is None, answer["traceback"]
        return answer["printed"]

    def _ask(self, code: str, arguments: dict, keep: bool = False) -> dict:
        self.process.stdin.write(json.dumps([textwrap.dedent(code), arguments, keep], default=str) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the client process ended with {self.process.wait()}"
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=120)


def serve() -> None:
    """The process itself: reads [code, arguments, keep] a line, answers a line."""
    for name in sys.argv[1:]:
        sys.modules[name] = None  # installed or not: here it cannot be imported
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.remove(str(Path(__file__).parent))
    kept = {}
    for line in sys.stdin:
        code, arguments, keep = json.loads(line)
        variables = {**kept, **arguments, "result": None}
        answer = {"result": None, "error": None, "traceback": ""}
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, "<test>", "exec"), variables)
            answer["result"] = variables["result"]
            kept = variables if keep else kept
        except BaseException as error:
            answer |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        answers.write(json.dumps({**answer, "printed": printed.getvalue()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
