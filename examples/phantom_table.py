"""Write phantoms (drawn chest radiographs with their reports) as a table, the input of `otdrg prepare csv`.

python examples/phantom_table.py example
otdrg prepare csv --table example/reports.csv --images example/images --output example/studies
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from otdrg.studies.phantom import make_phantom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="new folder for reports.csv and images/")
    parser.add_argument("--studies", type=int, default=100, help="number of studies (default: 100)")
    parser.add_argument("--seed", type=int, default=7, help="another seed gives other studies (default: 7)")
    options = parser.parse_args()
    images = options.folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    with (options.folder / "reports.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "study_id", "patient_id", "view", "report"])
        for index in range(options.studies):
            phantom = make_phantom(options.seed, index)
            for image, view in zip(phantom.images, phantom.views, strict=True):
                name = f"{phantom.id}_{view}.png"
                image.save(images / name)
                table.writerow([name, phantom.id, phantom.id, view, phantom.report])


if __name__ == "__main__":
    main()
