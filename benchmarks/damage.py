"""Do occupancies survive damaged meshes? Inside tests of broken copies against those of the whole mesh.

Generated shapes, and the closed meshes of a folder where one is given, lose, turn over, double or shake a share of
their faces (`datasets.damage`), go through what preparation does (repair, then the winding number of points of the
cube around the shape), and are compared with the whole mesh: the share of points on which both agree, and the IoU of
what is inside. Leaves table.md and, a line for each mesh and damage, damage.jsonl. Exit code 1 if the mean agreement
of a damage of up to 2 % of the faces is not above 98 %.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from vision3dgen.datasets import DAMAGES, damage, make_shape
from vision3dgen.datasets.objects import CATEGORIES
from vision3dgen.datasets.prepared import BETA
from vision3dgen.files import atomic_write
from vision3dgen.io import load_mesh
from vision3dgen.ops import winding_number
from vision3dgen.ops.repair import repair
from vision3dgen.structures import Frame, Meshes

SHARES = (0.005, 0.01, 0.02, 0.05)
LEAST = 0.98  # mean agreement, up to shares of MOST
MOST = 0.02


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", type=int, default=200, help="generated ones, of all categories (default: 200)")
    parser.add_argument("--meshes", type=Path, help="folder of mesh files; those that are not closed are left out")
    parser.add_argument("--points", type=int, default=10_000, help="for each mesh (default: 10000)")


def run(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    groups = {"generated": generated(options.shapes)}
    if options.meshes is not None:
        groups["of the folder"] = closed(options.meshes)
    records: list[dict[str, Any]] = []
    for group, meshes in groups.items():
        for number, (name, mesh) in enumerate(meshes.items()):
            records += [{"group": group, "mesh": name, **found} for found in compared(mesh, options.points, number)]
    text, sound = table(records)
    print(text)
    with atomic_write(options.out / "table.md") as file:
        file.write(text.encode())
    with atomic_write(options.out / "damage.jsonl") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())
    return 0 if sound else 1


def generated(count: int) -> dict[str, Meshes]:
    names = [*CATEGORIES.values()]
    found = {}
    for number in range(count):
        shape = make_shape(names[number % len(names)], seed=10_000 + number)
        found[f"{names[number % len(names)]} {number}"] = placed(shape.vertices, shape.faces)
    return found


def closed(folder: Path) -> dict[str, Meshes]:
    """The meshes of a folder that repair leaves without a boundary."""
    found = {}
    for path in sorted(folder.iterdir()):
        mesh = load_mesh(path, materials=False)
        mended = repair(placed(mesh.verts_packed().numpy(), mesh.faces_packed().numpy()))
        if mended.report.boundary_edges == 0:
            found[path.name] = mended.mesh
    return found


def placed(vertices: np.ndarray, faces: np.ndarray) -> Meshes:
    """In the canonical frame, in float64."""
    mesh = Meshes([torch.from_numpy(np.asarray(vertices, np.float64))], [torch.from_numpy(np.asarray(faces, np.int64))])
    return Frame.longest_edge(mesh.verts_packed()).normalize(mesh)


def compared(mesh: Meshes, points: int, seed: int) -> list[dict[str, Any]]:
    """Agreement and IoU for each damage."""
    generator = torch.Generator().manual_seed(seed)
    queries = 1.1 * (torch.rand(points, 3, generator=generator, dtype=torch.float64) - 0.5)
    truth = winding_number(mesh, queries).abs() > 0.5
    found = []
    for kind in DAMAGES:
        for share in SHARES:
            broken = repair(damage(mesh, kind, share, generator=generator)).mesh
            inside = winding_number(broken, queries, beta=BETA).abs() > 0.5
            union = int((inside | truth).sum())
            overlap = int((inside & truth).sum()) / union if union else 1.0
            agreement = float((inside == truth).double().mean())
            found.append({"damage": kind, "share": share, "agreement": agreement, "iou": overlap})
    return found


def table(records: list[dict[str, Any]]) -> tuple[str, bool]:
    lines = ["| meshes | damage | share of faces | agreement, mean | least | IoU, mean | least |"]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    sound = True
    for group in dict.fromkeys(record["group"] for record in records):
        count = len({record["mesh"] for record in records if record["group"] == group})
        for kind in DAMAGES:
            for share in SHARES:
                own = [r for r in records if (r["group"], r["damage"], r["share"]) == (group, kind, share)]
                agreement, overlap = [r["agreement"] for r in own], [r["iou"] for r in own]
                sound = sound and (share > MOST or fmean(agreement) > LEAST)
                lines.append(
                    f"| {count} {group} | {kind} | {share:.1%} | {fmean(agreement):.4f} | {min(agreement):.4f} | "
                    f"{fmean(overlap):.4f} | {min(overlap):.4f} |"
                )
    return "\n".join(lines) + "\n", sound


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
