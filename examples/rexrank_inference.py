"""ReXrank's `inference.py`: write the reports of a JSON file of studies, into the same file with `model_prediction`.

python examples/rexrank_inference.py in.json out.json images --model runs/quickstart

A submission to ReXrank holds this script under the name `inference.py`.
"""

from __future__ import annotations

import argparse
import sys

from otdrg.cli import main as otdrg


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for place, name in enumerate(("input_json_file", "save_json_file", "img_root_dir")):
        parser.add_argument(f"place{place}", nargs="?", metavar=name)
        parser.add_argument(f"--{name}", help=f"in place of argument {place + 1}")
    parser.add_argument("--model", default="org/otdrg", help="folder of a run or a model, or its name on the Hub")
    options = parser.parse_args()
    source, output, images = (
        options.input_json_file or options.place0,
        options.save_json_file or options.place1,
        options.img_root_dir or options.place2,
    )
    if images is None:
        parser.error("expected in.json, out.json and the folder of the images")
    files = ["--studies", source, "--output", output, "--image-root", images]
    return otdrg(["generate", options.model, "--format", "rexrank", *files, "--batch-size", "8"])


if __name__ == "__main__":
    sys.exit(main())
