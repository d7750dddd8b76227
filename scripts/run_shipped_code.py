"""Runs a model by the code that lies beside its weights, as on a machine without the package; for `push_to_hub.py`.

    python scripts/run_shipped_code.py FOLDER_OR_REPO AUTO_CLASS INPUTS OUTPUTS [--revision COMMIT] --trust-remote-code

INPUTS is a safetensors file with `input_ids`; OUTPUTS receives `outputs`, logits or hidden states. It runs the Python
files of FOLDER_OR_REPO, hence the flag.
"""

import argparse
import sys


# As on a machine without the package: whoever imports it, gets an ImportError.
sys.modules["modeling_griffin"] = None

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "auto_class", "inputs", "outputs"):
        parser.add_argument(name)
    parser.add_argument("--revision", default=None, help="commit to load from a repository")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the Python files of the model's folder")
    arguments = parser.parse_args(argv)
    model = getattr(transformers, arguments.auto_class).from_pretrained(
        arguments.model,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        use_safetensors=True,
        dtype="auto",
    )
    with torch.no_grad():
        outputs = model.eval()(**load_file(arguments.inputs), use_cache=False)[0]
    save_file({"outputs": outputs.contiguous()}, arguments.outputs)


if __name__ == "__main__":
    main()
