"""Serves a model over HTTP with the interface of OpenAI's: `python scripts/serve.py build/demo/model --port 8000`.

The server is Transformers' own (`pip install '.[serve]'`); requests run side by side.
"""

import argparse
import importlib

import spoken
from command_line import Parser
from training.hub_ids import require_model


NEEDED = ("fastapi", "openai", "uvicorn")  # of the extra [serve]; Transformers would end in an error of its own


def read_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        __file__,
        description="Serves a model over HTTP with the interface of OpenAI's.",
        epilog="All other options are those of `transformers serve --help`: --host, --port, --device, --dtype, ...",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a folder or Hub id of a Griffin with its tokenizer")
    parser.add_argument("--max_rows", type=int, default=32, help="requests that run at once; the others wait")
    arguments, others = parser.parse_known_args(argv)
    if arguments.max_rows < 1:
        parser.error(f"--max_rows = {arguments.max_rows}: allowed are whole numbers from 1")
    return arguments, others


def main(argv: list[str] | None = None) -> None:
    arguments, others = read_arguments(argv)
    try:
        require_model("MODEL", arguments.model)
    except ValueError as error:
        spoken.stop(__file__, error)
    for needed in NEEDED:
        importlib.import_module(needed)
    from modeling_griffin.serving.server import serve

    serve(arguments.model, others, arguments.max_rows)


if __name__ == "__main__":
    main()
