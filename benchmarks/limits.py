"""What large shapes need: each work on a million points or two million faces, in a process of its own. One table.

    python benchmarks/limits.py --out runs/limits

Seconds by the clock, and the most memory that the process held, all of it: Python, torch and the shape are about 500 MB
of that. Leaves table.md. Exit code 1 if a work failed or held more than --most MiB.
"""

import argparse
import subprocess
import sys
import textwrap
from pathlib import Path

from vision3dgen.experiment import environment
from vision3dgen.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
PRELUDE = """
import resource, time, torch
from vision3dgen import io, losses, metrics, ops, viz
from vision3dgen.structures import GridSpec, Pointclouds
torch.manual_seed(0)
mesh = ops.torus(0.3, 1.0, 1000, 1000)
assert mesh.faces_packed().shape == (2_000_000, 3)
x, y = torch.rand(2, 1, 1_000_000, 3)
folder = __import__("tempfile").mkdtemp()
began = time.monotonic()
"""
EPILOGUE = """
print(time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
WORKS = {
    "nothing: the mesh and two clouds": "",
    "sample 1e6 points with normals of 2e6 faces": "ops.sample_points_from_meshes(mesh, 1_000_000, True)",
    "chamfer of 1e6 and 1e6 points": "losses.chamfer_distance(x, y)",
    "the same with its gradient": """
        x.requires_grad_()
        losses.chamfer_distance(x, y).loss.backward()""",
    "16 nearest of 1e6 points": "ops.knn_points(x, y, K=16)",
    "F1, Chamfer and normals of 1e6 sampled points": """
        a, normals = ops.sample_points_from_meshes(mesh, 1_000_000, True)
        b, others = ops.sample_points_from_meshes(mesh, 1_000_000, True)
        found = metrics.surface_distances(a[0], normals[0], b[0], others[0])
        metrics.f_score(found, [0.01], comparator="<", squared=False)
        metrics.chamfer(found, squared=True, combine="sum")""",
    "farthest 2048 of 1e6 points": "ops.sample_farthest_points(x, K=2048)",
    "surface voxels of 2e6 faces, 256^3": """
        ops.voxelize(mesh, GridSpec.cube(256, -1.4, 1.4), "surface")""",
    "solid voxels of 2e6 faces, 128^3": """
        ops.voxelize(mesh, GridSpec.cube(128, -1.4, 1.4), "solid")""",
    "winding number of 1e5 points and 2e6 faces": """
        ops.winding_number(mesh, 2.8 * torch.rand(100_000, 3) - 1.4)""",
    "signed distance of 1e5 points and 2e6 faces": """
        ops.signed_distance(mesh, 2.8 * torch.rand(100_000, 3) - 1.4)""",
    "marching cubes at 256^3": """
        axis = torch.linspace(-1, 1, 256)
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        ops.marching_cubes((0.8 - (x * x + y * y + z * z).sqrt())[None], 0.0)""",
    "Laplacian smoothing loss of 2e6 faces": "losses.mesh_laplacian_smoothing(mesh)",
    "OBJ of 2e6 faces, written and read": """
        verts, faces = mesh.get_mesh_verts_faces(0)
        io.save_obj(folder + "/a.obj", verts, faces)
        io.load_mesh(folder + "/a.obj")""",
    "PLY of 2e6 faces, written and read": """
        io.save_mesh(folder + "/a.ply", mesh)
        io.load_mesh(folder + "/a.ply")""",
    "picture of 2e6 faces, built-in renderer": """
        viz.render(mesh, size=(256, 256), renderer="builtin")""",
    "picture of 2e6 faces, Open3D": """
        viz.render(mesh, size=(256, 256), renderer="open3d")""",
    "picture of 1e6 points, built-in renderer": """
        viz.render(Pointclouds([x[0]]), size=(256, 256), renderer="builtin")""",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most", type=float, default=4096, help="MiB that a process may hold (default: 4096)")
    parser.add_argument("--only", nargs="+", default=[""], help="works whose name has one of these in it")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    known = environment()
    lines = [f"{known['device']}, {known['threads']} thread(s), torch {known['torch']}", ""]
    lines += ["| work | s | most memory, MiB |", "|---|--:|--:|"]
    sound = True
    for name, work in WORKS.items():
        if not any(part in name for part in options.only):
            continue
        script = PRELUDE + textwrap.dedent(work) + EPILOGUE
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            lines.append(f"| {name} | failed | - |")
            sound = False
        else:
            seconds, memory = map(float, done.stdout.split()[-2:])
            lines.append(f"| {name} | {seconds:.1f} | {memory:.0f} |")
            sound = sound and memory <= options.most
        print(lines[-1], flush=True)
    with atomic_write(options.out / "table.md") as file:
        file.write(("\n".join(lines) + "\n").encode())
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
