"""Surfaces of scalar fields: marching cubes, and adaptive extraction from any field function.

A sample is above the level when its value is `>=` it, as in `cubify` and PyTorch3D. `marching_cubes` has PyTorch3D's
orientation, normals point to larger values, as signed distances want it; `isosurface` and `extract_surface` are told
which side is inside, and their normals point outward.

References: Lorensen & Cline, Marching Cubes, 1987; the 256 cases in the form P. Bourke and C. Bloyd put in the public
domain (Polygonising a scalar field, 1994); Mescheder et al., Occupancy Networks, 2019, section 3.3 (multiresolution
isosurface extraction).
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision3dgen.checks import check_choice, check_numbers, check_shape
from vision3dgen.structures import GridSpec, Meshes

# Triangles of each case, three hexadecimal digits per triangle, one word per case. A case is a number with bit
# x + 2 y + 4 z set when the corner (x, y, z) of the cell is above the level. A digit is an edge: axis * 4 + low + 2 *
# high, where low and high are the edge's offsets along the two other axes, in the order x < y < z.
# On a face whose diagonals disagree, the corners below the level are cut off; the rule looks at that face alone, so
# both cells agree. No diagonal of a polygon lies in a face of its cell. Hence each edge of the surface has two
# triangles and each vertex one fan of them, whatever the field: closed fields give closed manifolds.
_CASES = """
- 084 059 984594 14a 108a18 15919a0494a9 15919aa98 51b 41b4b850b08b 01b90b 41b4b88b9 54ab5a 50858bb8a 04a0a99ab
98b8ab 826 026406 805856925265 926965564 6a1612481821 6a1612210 5a156a596269048 16a561526592 51b268 02b0b526b1b464b
0160681b6269b96 2b924b2641b4 ab2a26b52824542 5ab52a50226a 04892a9aba26 6926a9ab9 972 284247094974 572052 284247745
9724a1 8a7872a17970107 57a5a172a4a020a 2572a528aa15 b72b21952512 8728b784b1b4095 b72b21120 2b78b281b841
5425294a272bab2 509b78b8a872 4204b24ab72b 2b728b8ab 897687 097074476 805856657 574764 891814971a16761 976961910a16
04815a56a576 16a156576 76171b681519891 09541747671b b01b60b76680 b41b74764 7ab76a549489 b6ab76950 6b76ab480 6b7ab6
a63 a40a03860630 05963a 45343a593638983 314634 863830031 469490639591319 531583598638 3b53561a5a65 0b503b08363841a
b96b63906a61016 41a86b8b9b63 3b5356654 86308303b0b5 04606b0b9b63 3863b8b98 a823a2 a40a03302 2352593a5058a85
92393494543a 482421123 021123 804925215231 915921231 a85a51825b53235 41a50b03b023 92bb2380181a 3923b91a4
b54b42b23824 53b503023 93b923804 93b239 62969a7393a9 9409a497a3a7286 20a2a605a3a757a 28673474543a 319397149296469
862093031397 042246157173 715731628 529562516a61b73 0951a4286b73 b731a21202a6 862a4173b b73952562546 095286b73
60462073b 28673b 73a7a99a8 73a97a9a4940 0a807a0573a7 a73a47457 489493431397 709730310 173157048 715317 73b95a9a8a51
950b7341a 1801a83b7 b731a4 948954b73 509b73 048b73 73b 7b3 084b37 7907035b0b30 983937843b35453 a37a74b17147
10717b08737a8a7 9379a390a4a05b1 5b17939a398a 751371 138184378085758 790703301 498439413379 a37a74475 08a0a707537a
7a39a794a904 7a379a98a 36838b2787b8 64b6b340b7b202b 068036053b35927 9275b65646b3 8148b182b7b26a3 a36b17127102
36a92704815b 5b1792a36 758782518683138 164136025275 927806036013 341364279 36a278748754 25027536a 92780436a 79236a
9b3293 9b4940b34842324 5b3530032 b45b24b32842 32434a29414b9b4 8328a39b0b10 5b104303234a a28a32b15 951912213
950281213184 012132 428412132 9329439544a3 2a328a095 a04a30320 a2832a 36838bb89 0640b609bb36 8360380b305b 35b365645
6a34818b189b b09b10a36 04815b6a3 15ba36 513538589683 436413509 836803013 341643 4954896a3 0956a3 8046a3 a36 67ba6b
6706087b040aba0 ba0b05a60907670 5b44ba798786 b14b47746 b10b06b67608 15b049479467 7867985b1 1a6165567 1a4506567608
967916901a61 879867a41 547746 850865675 079047467 879678 27b2b88ba 40242b4ba7b2 7925b0b80ba8 5a45ba792 27b82b8b1814
b27b12102 80492715b 9275b1 27525a2a8a51 52750241a 81a801927 92741a 248274754 527025 048927 927 62969aa9b
2860949a49ba 5ba5a25202a6 a5ba45862 29b2b424614b 0b109b286 06204615b 5b1286 1a6516562529 50941a286 61a621201 41a862
962956546 950286 062460 862 9b88ba 0a409a9ba 5805b8ba8 5a4ba5 4b148b89b 0b19b0 5b1048 5b1 1951a9a89 09541a 180a81
1a4 948549 095 048 -
"""


class _Table(NamedTuple):
    size: Int[Tensor, " 256"]  # triangles of a case
    first: Int[Tensor, " 256"]  # its first row in triangles
    triangles: Int[Tensor, "T 3"]  # edges, as in _CASES


@cache
def _table(device: torch.device) -> _Table:
    words = [word.strip("-") for word in _CASES.split()]
    count = torch.tensor([len(word) // 3 for word in words], device=device)
    triangles = torch.tensor([int(digit, 16) for digit in "".join(words)], device=device).view(-1, 3)
    return _Table(count, count.cumsum(0) - count, triangles)


def marching_cubes(
    vol_batch: Float[Tensor, "N D H W"], isolevel: float | None = None, return_local_coords: bool = True
) -> tuple[list[Float[Tensor, "V 3"]], list[Int[Tensor, "F 3"]]]:
    """Triangle meshes of the isosurfaces of a batch of volumes, vertices by linear interpolation along cell edges.

    Normals (right-hand rule) point to larger values. Returns N vertex tensors (x, y, z) and N face tensors. `isolevel`
    None means the middle between a volume's smallest and largest value. With `return_local_coords` the first and last
    sample along an axis lie at -1 and 1, else at 0 and size - 1. Vertices are differentiable in the volume, float32 for
    half-precision volumes. A level outside the range of a volume gives empty tensors. Raises ValueError for NaN, and
    for infinity next to the surface.

    Differs: differentiable; empty results are empty tensors, not empty lists; a vertex keeps at least 1e-5 of a cell
    edge (or four units in the last place of the largest index, if more) from the edge's ends, so that samples equal to
    the level give small triangles and never holes.
    """
    size = check_shape(vol_batch=(vol_batch, "N D H W"))
    check_numbers(vol_batch=vol_batch)
    verts, faces = [], []
    for index, volume in enumerate(vol_batch):
        if volume.dtype in (torch.float16, torch.bfloat16):
            volume = volume.float()
        level = isolevel
        if level is None:
            level = float((volume.detach().amax() + volume.detach().amin()) / 2) if volume.numel() else 0.0
        if math.isnan(level):
            raise ValueError(f"isolevel must be a number, got {isolevel} for member {index}")
        member_verts, member_faces = _polygonize(volume, level)
        if not bool(torch.isfinite(member_verts).all()):
            bad = int((~torch.isfinite(member_verts).all(1)).nonzero()[0])
            where = member_verts[bad].tolist()
            raise ValueError(f"vol_batch must be finite around the surface, got a vertex {where} in member {index}")
        if return_local_coords:
            last = member_verts.new_tensor([size["W"] - 1, size["H"] - 1, size["D"] - 1])
            member_verts = member_verts * (2 / last.clamp_min(1)) - 1
        verts.append(member_verts)
        faces.append(member_faces)
    return verts, faces


def _polygonize(volume: Float[Tensor, "D H W"], level: float) -> tuple[Float[Tensor, "V 3"], Int[Tensor, "F 3"]]:
    """Vertices in sample coordinates (x, y, z), numbered as the faces first name them, and faces in cell order."""
    volume = volume.contiguous()
    depth, height, width = volume.shape
    device = volume.device
    table = _table(device)
    code = (volume.detach() >= level).view(torch.uint8)
    for axis, bits in ((2, 1), (1, 2), (0, 4)):  # after the three, bit x + 2 y + 4 z of a sample is its neighbor's
        code.movedim(axis, 0)[:-1].bitwise_or_((code << bits).movedim(axis, 0)[1:])
    code = code.view(-1)
    # Samples that are not surrounded by their own kind: the first corners of active cells, and at the far borders those
    # that own an edge of one.
    active = (code + 1 > 1).nonzero().squeeze(1)  # uint8: 255 wraps to 0
    z, y, x = active // (height * width), active // width % height, active % width
    case = torch.where((z < depth - 1) & (y < height - 1) & (x < width - 1), code[active], 0).long()

    count = table.size[case]
    owner = torch.repeat_interleave(active, count)  # the cell of each triangle
    row = torch.repeat_interleave(table.first[case] - (count.cumsum(0) - count), count)
    edges = table.triangles[row + torch.arange(len(row), device=device)]  # (F, 3)
    stride = torch.tensor([1, width, height * width], device=device)
    digit = torch.arange(12, device=device)
    others = torch.tensor([[1, 2], [0, 2], [0, 1]], device=device)[digit >> 2]
    offset = (digit & 1) * stride[others[:, 0]] + (digit >> 1 & 1) * stride[others[:, 1]]
    # An edge is known by its lower sample, numbered among the active ones, and its axis.
    position = torch.empty(volume.numel(), dtype=torch.int32, device=device)
    position[active] = torch.arange(len(active), dtype=torch.int32, device=device)
    names = (position[owner[:, None] + offset[edges]] * 3 + (edges >> 2)).view(-1)  # (3 F)
    places = torch.arange(len(names), device=device)
    first = torch.full((3 * len(active),), len(names), device=device).scatter_reduce_(0, names, places, "amin")[names]
    fresh = first == places
    faces = (fresh.cumsum(0) - 1)[first].view(-1, 3)

    lower, direction = names[fresh] // 3, names[fresh] % 3  # (V)
    sample = active[lower]
    flat = volume.reshape(-1)
    start, end = flat[sample], flat[sample + stride[direction]]
    margin = max(1e-5, 4 * torch.finfo(volume.dtype).eps * max(volume.shape))
    fraction = ((level - start) / (end - start)).clamp(margin, 1 - margin)
    along = torch.nn.functional.one_hot(direction, 3).to(volume.dtype)
    corner = torch.stack([x[lower], y[lower], z[lower]], dim=1).to(volume.dtype)
    return corner + along * fraction[:, None], faces


def isosurface(
    values: Float[Tensor, "B D H W"],
    grid: GridSpec,
    *,
    level: float,
    inside: Literal["above", "below"] = "above",
    closed: bool = True,
) -> Meshes:
    """Isosurfaces of sampled fields in world coordinates, by marching cubes.

    `values` are samples at `grid`'s positions. `inside` "above" suits occupancies, densities and logits, "below" signed
    distances; normals point outward in both. With `closed`, surfaces that leave the grid are cut at its outermost
    samples and capped there. Differentiable in `values`.
    """
    check_shape(values=(values, "B D H W"))
    check_choice("inside", inside, ("above", "below"))
    if tuple(values.shape[1:]) != tuple(grid.shape):
        raise ValueError(f"values must have the grid's shape {tuple(grid.shape)}, got {tuple(values.shape[1:])}")
    outward = -1 if inside == "above" else 1  # the sign of the field's slope along the normal
    if closed:
        # so far beyond the level that the cap's vertices fall onto the outermost samples
        span = float((values.detach() - level).abs().max()) if values.numel() else 0.0
        values = torch.nn.functional.pad(values, (1,) * 6, value=level + outward * 1e6 * (span + 1))
    verts, faces = marching_cubes(values, level, return_local_coords=False)
    if inside == "above":
        faces = [member.flip(1) for member in faces]
    return Meshes([grid.to_world(member - int(closed)) for member in verts], faces)


class Extraction(NamedTuple):
    """What `extract_surface` found, and what it cost."""

    mesh: Meshes  # one member, world coordinates
    evaluations: int  # points the field was asked for


def extract_surface(
    field: Callable[[Tensor], Tensor],
    grid: GridSpec | tuple[float, float],
    *,
    level: float,
    resolution0: int = 32,
    upsampling_steps: int = 2,
    inside: Literal["above", "below"] = "above",
    closed: bool = True,
    differentiable: bool = False,
    chunk: int = 65536,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Extraction:
    """Isosurface of a field function, evaluated densely at first and then only where the surface passes.

    field: points (N, 3) to values (N,), asked for at most `chunk` points at once. grid: the coarse samples, or
    (low, high) for `resolution0` cells along each edge of the cube [low, high]^3. Each of the `upsampling_steps` halves
    the spacing inside cells whose samples disagree, and goes on into neighboring cells for as long as the surface
    does; the result equals dense evaluation at the finest spacing unless a whole component fits between coarse samples.
    `inside` and `closed` as in `isosurface`. `differentiable` gives vertices the gradient of the level set in whatever
    `field` depends on, dv = -grad f / |grad f|^2 df (Niemeyer et al., 2020, equation 6).

    Differs from Occupancy Networks' extraction: cells next to the surface are visited until it stops, so it has no
    cracks; vertices at sample positions, without a half-cell shift.
    """
    check_choice("inside", inside, ("above", "below"))
    if upsampling_steps < 0 or chunk < 1:
        raise ValueError(f"upsampling_steps must be >= 0 and chunk >= 1, got {upsampling_steps} and {chunk}")
    samples = grid if isinstance(grid, GridSpec) else GridSpec.cube(resolution0 + 1, *grid, align="corner")
    if min(samples.shape) < 2:
        raise ValueError(f"grid must have at least 2 samples along each axis, got shape {tuple(samples.shape)}")
    x, y, z = samples.to_world(torch.zeros(3, dtype=torch.float64)).tolist()
    samples = GridSpec((x, y, z), samples.spacing, samples.shape, "corner")

    def evaluate(where: Bool[Tensor, "D H W"]) -> Float[Tensor, " N"]:
        index = where.nonzero().flip(1).double()  # (N, 3) x, y, z
        points = samples.to_world(index).to(dtype)
        return torch.cat([_ask(field, piece).to(dtype) for piece in points.split(chunk)])

    with torch.no_grad():
        known = torch.ones(samples.shape, dtype=torch.bool, device=device)
        values = evaluate(known).view(samples.shape)
        evaluations = values.numel()
        for _ in range(upsampling_steps):
            cells = [size - 1 for size in samples.shape]
            x, y, z = (step / 2 for step in samples.spacing)
            depth, height, width = (2 * size + 1 for size in cells)
            samples = GridSpec(samples.origin, (x, y, z), (depth, height, width), "corner")
            # A sample never asked for gets the value of a corner of its cell, whose corners are all on one side.
            for axis in range(3):
                values = values.repeat_interleave(2, axis).narrow(axis, 0, samples.shape[axis])
            evaluated = torch.zeros(samples.shape, dtype=torch.bool, device=device)
            evaluated[::2, ::2, ::2] = known
            visited = torch.zeros(cells, dtype=torch.bool, device=device)
            while bool((active := _mixed(values >= level) & ~visited).any()):
                missing = _samples_of(active) & ~evaluated
                if bool(missing.any()):
                    values[missing] = evaluate(missing)
                    evaluations += int(missing.sum())
                    evaluated |= missing
                visited |= active
            known = evaluated
    mesh = isosurface(values[None], samples, level=level, inside=inside, closed=closed)
    if differentiable and mesh.verts_packed().numel():
        mesh = mesh.update_padded(_attach_gradient(field, mesh.verts_packed(), chunk)[None])
    return Extraction(mesh, evaluations)


def _ask(field: Callable[[Tensor], Tensor], points: Float[Tensor, "N 3"]) -> Float[Tensor, " N"]:
    values = field(points)
    if values.shape != points.shape[:1]:
        raise ValueError(f"field must return one value per point, ({len(points)},), got {tuple(values.shape)}")
    bad = torch.isnan(values)
    if bool(bad.any()):
        raise ValueError(f"field must not return NaN, it did at point {points[bad][0].tolist()}")
    return values


def _mixed(above: Bool[Tensor, "D H W"]) -> Bool[Tensor, "d h w"]:
    """Cells two sample spacings wide whose 27 samples are not all on one side."""
    every = some = above
    for axis in range(3):
        thirds = [slice(k, above.shape[axis] - 2 + k, 2) for k in range(3)]
        low, middle, high = (tuple(third if a == axis else slice(None) for a in range(3)) for third in thirds)
        every = every[low] & every[middle] & every[high]
        some = some[low] | some[middle] | some[high]
    return some & ~every


def _samples_of(cells: Bool[Tensor, "d h w"]) -> Bool[Tensor, "D H W"]:
    """The 27 samples of each marked cell, of cells as in `_mixed`."""
    samples = cells
    for axis in range(3):
        shape = list(samples.shape)
        shape[axis] = 2 * shape[axis] + 1
        wider = samples.new_zeros(shape)
        for k in range(3):
            third = slice(k, shape[axis] - 2 + k, 2)
            wider[tuple(third if a == axis else slice(None) for a in range(3))] |= samples
        samples = wider
    return samples


def _attach_gradient(
    field: Callable[[Tensor], Tensor], verts: Float[Tensor, "V 3"], chunk: int
) -> Float[Tensor, "V 3"]:
    """The same vertices, with the gradient of the level set through them."""
    pieces = []
    for piece in verts.detach().split(chunk):
        with torch.enable_grad():
            piece = piece.requires_grad_()
            values = _ask(field, piece)
            (slope,) = torch.autograd.grad(values.sum(), piece, retain_graph=True)
            # where the field is flat the surface's motion is undefined: such vertices stay
            squared = slope.square().sum(1, keepdim=True)
            step = torch.where(squared > 0, slope / squared.clamp_min(torch.finfo(slope.dtype).tiny), 0)
            pieces.append(piece.detach() - step * (values - values.detach())[:, None])
    return torch.cat(pieces)
