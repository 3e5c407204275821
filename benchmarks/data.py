"""Data at ShapeNet's size: what a loader gives, what damage does to occupancies, kills to preparation, and its rate.

python benchmarks/data.py loader --out runs/data
python benchmarks/data.py damage --out runs/damage --meshes scans/
python benchmarks/data.py kills --out runs/kills
python benchmarks/data.py prepare --out runs/prepare
"""

import argparse
import sys

import damage
import kills
import loading
import prepare

COMMANDS = {"loader": loading, "damage": damage, "kills": kills, "prepare": prepare}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=module.__doc__))
    options = parser.parse_args()
    return COMMANDS[options.command].run(options)


if __name__ == "__main__":
    sys.exit(main())
