"""A stand-in for GPUs, under which accelerate's FSDP2 runs on CPUs: gloo, the device a CPU, and what runs is called
MULTI_GPU, as beside GPUs. All else is accelerate's, Trainer's and train.py's own code.
"""

import os

import _script_helpers  # noqa: F401  (puts scripts/ on the path)
from accelerate.state import PartialState
from accelerate.utils import DistributedType


os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
PartialState._prepare_backend = lambda self, *arguments, **more: ("gloo", DistributedType.MULTI_GPU)

if __name__ == "__main__":
    import train

    train.main()
