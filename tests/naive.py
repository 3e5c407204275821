"""Triple-loop twins of the operators: slow, obvious, and written from the formulas alone."""

import torch


def raycast(verts, faces, rotation, translation, intrinsics, image_size):
    """Depth and index of the first face met by the ray through each pixel's center (Moller-Trumbore)."""
    height, width = image_size
    depth, index = torch.zeros(height, width, dtype=torch.float64), torch.full((height, width), -1)
    local = verts.double() @ rotation.T + translation
    for row in range(height):
        for column in range(width):
            pixel = torch.tensor([column + 0.5, row + 0.5, 1.0], dtype=torch.float64)
            ray = torch.linalg.inv(intrinsics) @ pixel
            for f, face in enumerate(faces.tolist()):
                a, b, c = local[face]
                normal = torch.linalg.cross(ray, c - a)
                determinant = (b - a) @ normal
                if abs(determinant) < 1e-14:
                    continue
                u = (-a @ normal) / determinant
                side = torch.linalg.cross(-a, b - a)
                v, t = (ray @ side) / determinant, ((c - a) @ side) / determinant
                if min(u, v, 1 - u - v) >= 0 and t > 0 and (index[row, column] < 0 or t < depth[row, column]):
                    depth[row, column], index[row, column] = t, f
    return depth, index
