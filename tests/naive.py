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


def surface_metrics(pred, target, pred_normals, target_normals, squared, combine, threshold, strict):
    """Chamfer, precision, recall, F1 and absolute normal consistency by double loops over Python numbers."""
    sides = []
    for points, normals, others, other_normals in (
        (pred, pred_normals, target, target_normals),
        (target, target_normals, pred, pred_normals),
    ):
        total, hits, cosines = 0.0, 0, 0.0
        for p, n in zip(points.tolist(), normals.tolist()):
            every = [sum((a - b) ** 2 for a, b in zip(p, q)) for q in others.tolist()]
            nearest = every.index(min(every))
            value = every[nearest] if squared else every[nearest] ** 0.5
            total += value
            hits += value < threshold if strict else value <= threshold
            cosines += abs(sum(a * b for a, b in zip(n, other_normals[nearest].tolist())))
        sides.append((total / len(points), hits / len(points), cosines / len(points)))
    (accuracy, precision, forward), (completeness, recall, backward) = sides
    chamfer = accuracy + completeness if combine == "sum" else (accuracy + completeness) / 2
    f1 = 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0
    return chamfer, precision, recall, f1, (forward + backward) / 2


def voxel_iou(pred, target, threshold):
    """Intersection over union by a triple loop, occupied at probabilities >= threshold."""
    both = either = 0
    for z in range(pred.shape[0]):
        for y in range(pred.shape[1]):
            for x in range(pred.shape[2]):
                a, b = bool(pred[z, y, x] >= threshold), bool(target[z, y, x])
                both, either = both + (a and b), either + (a or b)
    return both / either if either else 1.0


def voxel_iou_loop(a, b):
    """Intersection over union of two boolean grids; two empty ones agree."""
    both = either = 0
    for x, y in zip(a.flatten().tolist(), b.flatten().tolist()):
        both += bool(x) and bool(y)
        either += bool(x) or bool(y)
    return both / either if either else 1.0
