"""What test_train_launch.py starts by `accelerate launch`: train.py several times in the same processes, watched.

`train_program.py [--stand-in] RUNS.json`, a list of {"name", "argv", "accelerate": another launcher's file or absent}.
With --stand-in accelerate's FSDP2 runs on CPUs: the backend is gloo, the device a CPU, and what runs is called
MULTI_GPU, as beside GPUs. All else is accelerate's, Trainer's and train.py's own code.
"""

import json
import os
import sys
from pathlib import Path

import _script_helpers  # noqa: F401  (puts scripts/ on the path)
import train
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from training.ranks import leave_together

from modeling_griffin.rg_lru import RGLRU, Decay


def stand_in_for_gpus():
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *arguments, **more: ("gloo", DistributedType.MULTI_GPU)


def take_environment(file: str):
    """What `accelerate launch --config_file file` would put into it; accelerate's own code reads the file."""
    arguments = launch_command_parser().parse_args(["--config_file", file, "--main_process_port", "0", "train.py"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    taken = ("FSDP_", "ACCELERATE_USE", "ACCELERATE_MIXED")
    os.environ.update({name: value for name, value in environment.items() if name.startswith(taken)})


class Watch:
    """Of a run: what the optimizer's groups hold before the first step, and the dtypes in which the RG-LRU works."""

    def __init__(self):
        self.groups, self.dtypes = None, {"decay": set(), "x": set()}

    def see_groups(self, trainer):
        if self.groups is None:
            names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
            groups = trainer.optimizer.param_groups
            self.groups = [[group["weight_decay"], [names[id(p)] for p in group["params"]]] for group in groups]

    def results(self, name, trainer) -> dict:
        dtypes = {key: sorted(seen) for key, seen in self.dtypes.items()}
        return {"name": name, "groups": self.groups, "dtypes": dtypes, "step": trainer.state.global_step}


def watch(watched: list):
    grad_norm, decay, unit = train.GriffinTrainer._get_grad_norm, Decay.forward, RGLRU.forward

    def see_grad_norm(self, *arguments, **more):
        watched[-1].see_groups(self)
        return grad_norm(self, *arguments, **more)

    def see_decay(self, *arguments):
        watched[-1].dtypes["decay"].add(str(self.lambda_bias.dtype))
        return decay(self, *arguments)

    def see_unit(self, x, *arguments):
        if self.training:
            watched[-1].dtypes["x"].add(str(x.dtype))
        return unit(self, x, *arguments)

    train.GriffinTrainer._get_grad_norm, Decay.forward, RGLRU.forward = see_grad_norm, see_decay, see_unit


def main(runs: Path) -> None:
    watched, results = [], []
    watch(watched)
    for run in json.loads(runs.read_text()):
        if "accelerate" in run:
            take_environment(run["accelerate"])
        watched.append(Watch())
        trainer, _ = train.run(run["argv"])
        results.append(watched[-1].results(run["name"], trainer))
    if trainer.is_world_process_zero():
        runs.with_suffix(".results").write_text(json.dumps(results))
    leave_together()


if __name__ == "__main__":
    if "--stand-in" in sys.argv:
        stand_in_for_gpus()
    main(Path(sys.argv[-1]))
