"""What test_train_launch.py starts by `accelerate launch`: says what runs, or why train.py would refuse it.

`launch_program.py [--stand-in] [use_cpu as JSON]`; --stand-in as in train_program.py.
"""

import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from training.launch import check_launch, check_processes, choose_device, describe, read_request  # noqa: E402
from training.ranks import leave_together  # noqa: E402


if "--stand-in" in sys.argv:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *arguments, **more: ("gloo", DistributedType.MULTI_GPU)
words = [word for word in sys.argv[1:] if word != "--stand-in"]
try:
    request = read_request()
    settings = choose_device({"use_cpu": json.loads(words[0])} if words else {}, request)
    check_processes(PartialState(cpu=settings["use_cpu"]), request)
    accelerator = Accelerator(cpu=settings["use_cpu"])
    check_launch(accelerator)
    accelerator.wait_for_everyone()
    said = f"runs: {describe(accelerator)}"
except ValueError as error:
    said = f"refused: {error}"
sys.stdout.write(said + "\n")  # at once: two processes speak
sys.stdout.flush()
leave_together()
