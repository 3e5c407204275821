"""Triple-loop twins of the operators: slow, obvious, and written from the formulas alone."""

import math

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


def soft_silhouette(verts, faces, rotation, translation, intrinsics, image_size, softness):
    """1 - prod(1 - sigmoid(+-d^2 / softness)) with d in units of half the image's shorter side; all in front."""
    height, width = image_size
    local = verts.double() @ rotation.T + translation
    image = [[float(x) for x in (intrinsics @ point)[:2] / point[2]] for point in local]
    mask = torch.zeros(height, width, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            x, y, clear = column + 0.5, row + 0.5, 1.0
            for face in faces.tolist():
                squared, sides = [], []
                for k in range(3):
                    (ax, ay), (bx, by) = image[face[k]], image[face[(k + 1) % 3]]
                    length = (bx - ax) ** 2 + (by - ay) ** 2
                    t = min(max(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length, 0), 1)
                    squared.append((ax + t * (bx - ax) - x) ** 2 + (ay + t * (by - ay) - y) ** 2)
                    sides.append((bx - ax) * (y - ay) - (by - ay) * (x - ax) > 0)
                logit = min(squared) * (2 / min(image_size)) ** 2 / softness
                clear *= 1 / (1 + math.exp(logit if len(set(sides)) == 1 else -logit))
            mask[row, column] = 1 - clear
    return mask


def depth_errors(prediction, target):
    """The standard errors over two lists of depths, one pixel at a time."""
    pairs = [(p, t) for p, t in zip(prediction, target) if t > 0]
    n = len(pairs)
    d = [math.log(p) - math.log(t) for p, t in pairs]
    squares, mean = sum(x * x for x in d) / n, sum(d) / n
    pairwise = sum((a - b) ** 2 for a in d for b in d) / (2 * n * n)  # the first form of Eigen's error
    ratios = [max(p / t, t / p) for p, t in pairs]
    return {
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / n,
        "sq_rel": sum((p - t) ** 2 / t for p, t in pairs) / n,
        "rmse": math.sqrt(sum((p - t) ** 2 for p, t in pairs) / n),
        "rmse_log": math.sqrt(squares),
        "log10": sum(abs(math.log10(p) - math.log10(t)) for p, t in pairs) / n,
        "silog": 100 * math.sqrt(squares - mean**2),
        "scale_invariant": pairwise,
        "delta1": sum(r < 1.25 for r in ratios) / n,
        "delta2": sum(r < 1.25**2 for r in ratios) / n,
        "delta3": sum(r < 1.25**3 for r in ratios) / n,
    }


def gradient_matching(prediction, target, scales):
    """Differences of log ratios between neighbors on grids of every 2^k-th pixel, over nested lists (H, W)."""
    total = 0.0
    for k in range(scales):
        step = 2**k
        rows, columns = range(0, len(target), step), range(0, len(target[0]), step)
        change = count = 0.0
        for r in rows:
            for c in columns:
                if target[r][c] <= 0:
                    continue
                count += 1
                own = math.log(prediction[r][c] / target[r][c])
                for other_r, other_c in ((r + step, c), (r, c + step)):
                    if other_r < len(target) and other_c < len(target[0]) and target[other_r][other_c] > 0:
                        change += abs(math.log(prediction[other_r][other_c] / target[other_r][other_c]) - own)
        total += change / max(count, 1)
    return total


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


def distance(p, q, norm):
    """Squared Euclidean (norm 2) or Manhattan (norm 1) distance of two lists of coordinates."""
    return sum((a - b) ** 2 if norm == 2 else abs(a - b) for a, b in zip(p, q))


def knn(x, y, K, norm=2):
    """Sorted distances and indices of the K nearest of y to each of x, zeros where y is too small."""
    dists, idx = [], []
    for p in x.tolist():
        order = sorted((distance(p, q, norm), j) for j, q in enumerate(y.tolist()))[:K]
        order += [(0.0, 0)] * (K - len(order))
        dists.append([d for d, _ in order])
        idx.append([j for _, j in order])
    return torch.tensor(dists, dtype=x.dtype).view(len(x), K), torch.tensor(idx, dtype=torch.int64).view(len(x), K)


def ball(x, y, K, radius):
    """The first K of y closer than radius to each of x, -1 where there are fewer."""
    rows = []
    for p in x.tolist():
        inside = [j for j, q in enumerate(y.tolist()) if distance(p, q, 2) < radius**2][:K]
        rows.append(inside + [-1] * (K - len(inside)))
    return torch.tensor(rows, dtype=torch.int64).view(len(x), K)


def farthest(points, K):
    """Indices of K points, from point 0, each the farthest from those before it."""
    rows, chosen = points.tolist(), [0]
    while len(chosen) < K:
        gaps = [min(distance(p, rows[c], 2) for c in chosen) for p in rows]
        chosen.append(gaps.index(max(gaps)))
    return torch.tensor(chosen)


def chamfer(x, y, norm=2):
    """Mean over x of the distance to y, plus mean over y of that to x."""
    there = [min(distance(p, q, norm) for q in y.tolist()) for p in x.tolist()]
    back = [min(distance(p, q, norm) for q in x.tolist()) for p in y.tolist()]
    return sum(there) / len(there) + sum(back) / len(back)


def point_triangle(point, triangle, steps=60):
    """Distance from a point to a triangle by ever finer grids of barycentric coordinates around the best place."""
    a, b, c = triangle.double()
    best, center, width = None, (0.5, 0.5), 0.5
    for _ in range(steps):
        for i in range(-2, 3):
            for j in range(-2, 3):
                v = min(max(center[0] + width * i / 2, 0.0), 1.0)
                w = min(max(center[1] + width * j / 2, 0.0), 1.0 - v)
                d = float((point.double() - a - v * (b - a) - w * (c - a)).norm())
                if best is None or d < best[0]:
                    best = (d, v, w)
        center, width = best[1:], 0.7 * width
    return best[0]


def graph_conv(x, edges, w0, b0, w1, b1, directed=False):
    """w0 x + b0 at each vertex plus w1 x + b1 of each neighbor."""
    out = [w0 @ row + b0 for row in x]
    for i, j in edges.tolist():
        out[i] = out[i] + w1 @ x[j] + b1
        if not directed:
            out[j] = out[j] + w1 @ x[i] + b1
    return torch.stack(out)


def edge_convolution(features, network, K):
    """max over the K nearest in feature space (itself among them) of network(x_i, x_j - x_i), point by point."""
    out = []
    for x in features:
        order = (features - x).square().sum(1).argsort(stable=True)[:K].tolist()
        out.append(network(torch.stack([torch.cat([x, features[j] - x]) for j in order])).amax(0))
    return torch.stack(out)


def set_abstraction(points, features, network, count, radius, K):
    """Farthest points, and for each the maximum of network(x_j, p_j - center) over the first K of its ball."""
    centers, out = farthest(points, count), []
    for center in centers:
        rows = []
        for j, point in enumerate(points):
            if float((point - points[center]).square().sum()) < radius**2 and len(rows) < K:
                offset = point - points[center]
                rows.append(offset if features is None else torch.cat([features[j], offset]))
        out.append(network(torch.stack(rows)).amax(0))
    return centers, torch.stack(out)


def timm_vit(state, images, heads):
    """timm's vision transformer as a function of its state dict: token by token and head by head in the attention."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    kernel = state["patch_embed.proj.weight"]
    patch, width = kernel.shape[-1], kernel.shape[0]
    tokens = [state["cls_token"].expand(len(images), 1, width)]
    for top in range(0, images.shape[2], patch):
        for left in range(0, images.shape[3], patch):
            square = images[:, :, top : top + patch, left : left + patch].flatten(1)
            tokens.append((square @ kernel.flatten(1).T + state["patch_embed.proj.bias"])[:, None])
    x = torch.cat(tokens, dim=1) + state["pos_embed"]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    for index in range(depth):
        block = f"blocks.{index}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        qkv = qkv.reshape(*x.shape[:2], 3, heads, width // heads)
        seen = torch.zeros_like(qkv[:, :, 0])
        for head in range(heads):
            query, key, value = (qkv[:, :, part, head] for part in range(3))
            weights = (query @ key.mT / math.sqrt(width // heads)).softmax(-1)
            seen[:, :, head] = weights @ value
        x = x + linear(seen.flatten(2), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head")


def normal_consistency(verts, faces):
    """Mean of 1 - cos of the angle between each two faces with a common edge, both wound along it."""
    terms = []
    for f, one in enumerate(faces.tolist()):
        for other in faces.tolist()[:f]:
            common = set(one) & set(other)
            if len(common) != 2:
                continue
            start, end = sorted(common)
            (p,), (q,) = set(one) - common, set(other) - common
            axis = verts[end] - verts[start]
            m = torch.linalg.cross(axis, verts[p] - verts[start])
            n = torch.linalg.cross(verts[q] - verts[start], axis)
            terms.append(1 - (m @ n) / (m.norm() * n.norm()))
    return torch.stack(terms).mean()


def laplacian_smoothing(verts, faces, method):
    """Mean distance of each vertex to the weighted mean of its neighbors; cotcurv: curvature by the area around."""
    offsets, mass, area = torch.zeros_like(verts), torch.zeros(len(verts)).to(verts), torch.zeros(len(verts)).to(verts)
    weights = {}
    for a, b, c in faces.tolist():
        for i, j, k in ((a, b, c), (b, c, a), (c, a, b)):
            u, v = verts[i] - verts[k], verts[j] - verts[k]
            double = torch.linalg.cross(u, v).norm()
            area[k] += double / 2
            pair = (min(i, j), max(i, j))
            weights[pair] = 1.0 if method == "uniform" else weights.get(pair, 0.0) + float(u @ v / double)
    for (i, j), w in weights.items():
        offsets[i] += w * (verts[j] - verts[i])
        offsets[j] += w * (verts[i] - verts[j])
        mass[i] += w
        mass[j] += w
    scale = 0.25 / area if method == "cotcurv" else 1 / mass
    return (offsets * scale[:, None]).norm(dim=1).mean()


def solid_angle_winding(verts, faces, point):
    """Sum of the faces' signed solid angles, by the spherical excess of their corner angles, over 4 pi."""
    total = 0.0
    for face in faces.tolist():
        a, b, c = (verts[i] - point for i in face)
        a, b, c = a / a.norm(), b / b.norm(), c / c.norm()
        excess = -torch.pi
        for u, v, w in ((a, b, c), (b, c, a), (c, a, b)):
            p, q = torch.linalg.cross(u, v), torch.linalg.cross(u, w)
            excess += float(torch.atan2(torch.linalg.cross(p, q).norm(), p @ q))
        total += excess * float(torch.sign(a @ torch.linalg.cross(b, c)))
    return total / (4 * torch.pi)


def cubes(occupied, lattice_point):
    """Vertices and faces counted one voxel at a time: corners of exposed squares, two triangles each."""
    exposed, corners = 0, set()
    sizes = occupied.shape
    for place in occupied.nonzero().tolist():
        for axis in range(3):
            for direction in (-1, 1):
                near = list(place)
                near[axis] += direction
                if 0 <= near[axis] < sizes[axis] and occupied[tuple(near)]:
                    continue
                exposed += 1
                for i in (0, 1):
                    for j in (0, 1):
                        corner = [place[k] + (i, j)[k - (k > axis)] if k != axis else 0 for k in range(3)]
                        corner[axis] = place[axis] + (direction > 0)
                        corners.add(lattice_point(*corner))
    return corners, 2 * exposed


def overlaps(triangle, low, high):
    """Whether a triangle meets a closed box: clip it by the six planes and see whether anything is left."""
    polygon = [corner.tolist() for corner in triangle]
    for axis in range(3):
        for sign, limit in ((1, high[axis]), (-1, -low[axis])):
            clipped = []
            for start, end in zip(polygon, polygon[1:] + polygon[:1]):
                s, e = sign * start[axis] - limit, sign * end[axis] - limit
                if s <= 0:
                    clipped.append(start)
                if (s < 0 < e) or (e < 0 < s):
                    t = s / (s - e)
                    clipped.append([p + t * (q - p) for p, q in zip(start, end)])
            polygon = clipped
    return len(polygon) > 0


def attention(query, key, value, mask, causal, scale):
    """Output and weights of attention, one query at a time; query i of T sees keys up to i + S - T of S."""
    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)
    weights = torch.zeros(*query.shape[:-1], key.shape[-2], dtype=query.dtype)
    for b in range(query.shape[0]):
        for i in range(query.shape[1]):
            scores = {}
            for j in range(key.shape[1]):
                score = scale * sum(float(query[b, i, d]) * float(key[b, j, d]) for d in range(query.shape[2]))
                if causal and j > i + key.shape[1] - query.shape[1]:
                    continue
                if mask is not None:
                    entry = (mask[b] if mask.ndim == 3 else mask)[i, j]
                    if mask.dtype == torch.bool:
                        if not entry:
                            continue
                    else:
                        score += float(entry)
                if score > -math.inf:
                    scores[j] = math.exp(score)
            for j, weight in scores.items():
                weights[b, i, j] = weight / sum(scores.values())
                out[b, i] += weights[b, i, j] * value[b, j]
    return out, weights


def bleu(candidates, references, order, add_one):
    """BLEU of a corpus with clipped counts and the closest reference's length, n-gram by n-gram."""
    product, own, closest = 1.0, 0, 0
    for n in range(1, order + 1):
        matched = total = 0
        for candidate, known in zip(candidates, references):
            runs = [tuple(candidate[i : i + n]) for i in range(len(candidate) - n + 1)]
            total += len(runs)
            for run in set(runs):
                most = 0
                for reference in known:
                    most = max(most, sum(tuple(reference[i : i + n]) == run for i in range(len(reference))))
                matched += min(sum(other == run for other in runs), most)
        if add_one and n > 1:
            matched, total = matched + 1, total + 1
        if matched == 0:
            return 0.0
        product *= (matched / total) ** (1 / order)
    for candidate, known in zip(candidates, references):
        own += len(candidate)
        best = None
        for reference in known:
            gap = abs(len(reference) - len(candidate))
            if (
                best is None
                or gap < abs(best - len(candidate))
                or (gap == abs(best - len(candidate)) and len(reference) < best)
            ):
                best = len(reference)
        closest += best
    return product * (1 if own > closest else math.exp(1 - closest / own))


def nearest_neighbors(train, labels, queries, k, metric, classes):
    """Predicted classes and neighbor indices by loops over pixels; ties as documented."""
    predicted, neighbors = [], []
    for query in queries.flatten(1).tolist():
        distances = []
        for row in train.flatten(1).tolist():
            if metric == "l1":
                distance = sum(abs(a - b) for a, b in zip(query, row))
            elif metric == "l2":
                distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(query, row)))
            else:
                dot = sum(a * b for a, b in zip(query, row))
                distance = 1 - dot / math.sqrt(sum(a * a for a in query)) / math.sqrt(sum(b * b for b in row))
            distances.append(round(distance, 9))
        order = sorted(range(len(train)), key=lambda index: (distances[index], index))[:k]
        votes = [[int(labels[index]) for index in order].count(label) for label in range(classes)]
        tied = [label for label in range(classes) if votes[label] == max(votes)]
        predicted.append(next(int(labels[index]) for index in order if int(labels[index]) in tied))
        neighbors.append(order)
    return predicted, neighbors


def hinge(scores, labels, margin):
    """Weston and Watkins' loss of each item and the gradient of their sum, from the formula."""
    losses, gradient = [], torch.zeros_like(scores)
    for i, (row, label) in enumerate(zip(scores.tolist(), labels.tolist())):
        total = 0.0
        for j, score in enumerate(row):
            violation = score - row[label] + margin
            if j != label and violation > 0:
                total += violation
                gradient[i, j] += 1
                gradient[i, label] -= 1
        losses.append(total)
    return torch.tensor(losses, dtype=scores.dtype), gradient


def logistic_mixture(parameters, values, levels, mixtures):
    """The probability of a pixel of three channels, from the cumulative distributions at the ends of each bin."""

    def sigmoid(z):
        return 1 / (1 + math.exp(-z)) if z > 0 else math.exp(z) / (1 + math.exp(z))

    logits = parameters[:mixtures]
    means, log_scales, coefficients = (
        [parameters[mixtures * (start + c) : mixtures * (start + c + 1)] for c in range(3)] for start in (1, 4, 7)
    )
    x = [2 * v / (levels - 1) - 1 for v in values]
    total = 0.0
    for k in range(mixtures):
        red_green, red_blue, green_blue = (math.tanh(coefficients[pair][k]) for pair in range(3))
        centers = [
            means[0][k],
            means[1][k] + red_green * x[0],
            means[2][k] + red_blue * x[0] + green_blue * x[1],
        ]
        p = math.exp(logits[k]) / sum(math.exp(logit) for logit in logits)
        for c in range(3):
            scale = math.exp(max(log_scales[c][k], -7))
            high = 1.0 if values[c] == levels - 1 else sigmoid((x[c] + 1 / (levels - 1) - centers[c]) / scale)
            low = 0.0 if values[c] == 0 else sigmoid((x[c] - 1 / (levels - 1) - centers[c]) / scale)
            p *= high - low
        total += p
    return total


def lstm(gates, cell):
    """One step of an LSTM on vectors: gates input, forget, output, candidate."""
    i, f, o, g = gates.chunk(4)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def row_lstm(layer, x):
    """A Row LSTM at one place after another, zeros outside of the image."""
    weight, bias = layer.input_to_state.masked_weight(), layer.input_to_state.bias
    above, half = layer.state_to_state.weight, layer.side
    out = torch.zeros(1, layer.hidden, *x.shape[2:], dtype=x.dtype)
    cells = torch.zeros_like(out)
    for row in range(x.shape[2]):
        for column in range(x.shape[3]):
            gates = bias.clone()
            for offset in range(-half, half + 1):
                place = column + offset
                if not 0 <= place < x.shape[3]:
                    continue
                if offset <= 0:
                    gates = gates + weight[:, :, 0, half + offset] @ x[0, :, row, place]
                hidden = out[0, :, row - 1, place] if row else layer.hidden_start
                gates = gates + above[:, :, half + offset] @ hidden
            cell = cells[0, :, row - 1, column] if row else layer.cell_start
            out[0, :, row, column], cells[0, :, row, column] = lstm(gates, cell)
    return out


def diagonal_bilstm(layer, x):
    """Both directions of a Diagonal BiLSTM at one place after another; the second is added one row below."""
    total = torch.zeros(1, layer.left_to_right.hidden, *x.shape[2:], dtype=x.dtype)
    height, width = x.shape[2:]
    for number, part in enumerate((layer.left_to_right, layer.right_to_left)):
        weight, bias = part.input_to_state.masked_weight()[:, :, 0, 0], part.input_to_state.bias
        zero = torch.zeros(part.hidden, dtype=x.dtype)
        hidden, cells = {}, {}
        for row in range(height):
            for column in range(width) if number == 0 else reversed(range(width)):
                side = (row, column - 1 if number == 0 else column + 1)
                before = torch.cat([hidden.get(side, zero), hidden.get((row - 1, column), zero)])
                gates = weight @ x[0, :, row, column] + bias + part.state_to_state.weight @ before
                hidden[row, column], cells[row, column] = lstm(gates, cells.get(side, zero))
                if row + number < height:
                    total[0, :, row + number, column] += hidden[row, column]
    return total


def nearest_codes(maps, codebook):
    """The number of the code with the least squared distance at each place of (B, D, H, W), the first of equals."""
    batch, _, height, width = maps.shape
    codes = torch.zeros(batch, height, width, dtype=torch.int64)
    for b in range(batch):
        for row in range(height):
            for column in range(width):
                distances = [float((code - maps[b, :, row, column]).square().sum()) for code in codebook]
                codes[b, row, column] = distances.index(min(distances))
    return codes


def polynomial_mmd(x, y):
    """Unbiased squared MMD of the kernel (a.b / D + 1)^3, by double loops over pairs of different rows."""

    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b)) / len(a) + 1) ** 3

    total = 0.0
    for rows in (x, y):
        pairs = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        total += sum(pairs) / len(pairs)
    across = [kernel(a, b) for a in x for b in y]
    return total - 2 * sum(across) / len(across)


def manifold(real, generated, nearest):
    """Precision, recall, density and coverage from their definitions."""

    def distance(a, b):
        return math.sqrt(sum((float(p) - float(q)) ** 2 for p, q in zip(a, b)))

    def reach(rows):
        return [sorted(distance(a, b) for j, b in enumerate(rows) if j != i)[nearest - 1] for i, a in enumerate(rows)]

    reach_real, reach_generated = reach(real), reach(generated)
    counts = [sum(distance(g, r) <= reach_real[i] for i, r in enumerate(real)) for g in generated]
    precision = sum(count > 0 for count in counts) / len(generated)
    density = sum(counts) / (nearest * len(generated))
    recall = sum(any(distance(r, g) <= reach_generated[j] for j, g in enumerate(generated)) for r in real) / len(real)
    coverage = sum(any(distance(r, g) <= reach_real[i] for g in generated) for i, r in enumerate(real)) / len(real)
    return precision, recall, density, coverage


def local_cell(point, axes, resolution, padding):
    """The index of the cell of a point along each axis of a plane or grid, by the authors' formula."""
    margin = 1e-3 if len(axes) == 3 else 1e-5
    index = []
    for axis in axes:
        at = float(point[axis]) / (1 + padding + margin) + 0.5
        at = 1 - margin if at >= 1 else max(at, 0.0)
        index.append(int(at * resolution))
    return tuple(index)


def cell_means(features, points, axes, resolution, padding):
    """(C, *cells), the first axis last: the mean of the features of the points of each cell, 0 where there are none."""
    members = {}
    for feature, point in zip(features, points):
        members.setdefault(local_cell(point, axes, resolution, padding)[::-1], []).append(feature)
    out = torch.zeros(features.shape[1], *(resolution,) * len(axes), dtype=features.dtype)
    for cell, rows in members.items():
        out[(slice(None), *cell)] = sum(rows) / len(rows)
    return out


def cell_maxima(features, points, axes, resolution, padding):
    """For each point the maximum of each channel over the points of its cell."""
    cells = [local_cell(point, axes, resolution, padding) for point in points]
    rows = []
    for cell in cells:
        own = [feature for feature, other in zip(features, cells) if other == cell]
        rows.append([max(float(feature[c]) for feature in own) for c in range(features.shape[1])])
    return torch.tensor(rows, dtype=features.dtype)


def box_overlap(a, b):
    """Intersection over union, and the generalized one, of two boxes (x0, y0, x1, y1) as Python numbers."""
    sides = [max(box[2 + axis] - box[axis], 0.0) for box in (a, b) for axis in (0, 1)]
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    union = sides[0] * sides[1] + sides[2] * sides[3] - shared
    around = max(max(a[2], b[2]) - min(a[0], b[0]), 0.0) * max(max(a[3], b[3]) - min(a[1], b[1]), 0.0)
    iou = shared / union if union > 0 else 0.0
    return iou, iou - ((around - union) / around if around > 0 else 0.0)


def nms(boxes, scores, threshold, groups=None):
    """Indices kept by going through the boxes from the highest score down."""
    kept = []
    for index in sorted(range(len(boxes)), key=lambda i: (-float(scores[i]), i)):
        rivals = [other for other in kept if groups is None or int(groups[other]) == int(groups[index])]
        if all(box_overlap(boxes[other].tolist(), boxes[index].tolist())[0] <= threshold for other in rivals):
            kept.append(index)
    return kept


def soft_nms(boxes, scores, threshold, method, sigma, least):
    """Indices and scores by taking the highest of a shrinking list and lowering the rest."""
    left, taken = {i: float(s) for i, s in enumerate(scores) if float(s) >= least}, []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        taken.append((best, left.pop(best)))
        for other in list(left):
            overlap = box_overlap(boxes[best].tolist(), boxes[other].tolist())[0]
            if method == "gaussian":
                left[other] *= math.exp(-(overlap**2) / sigma)
            elif overlap > threshold:
                left[other] *= 1 - overlap
            if left[other] < least:
                del left[other]
    return taken


def _bilinear(image, y, x):
    """A value between pixels whose centers are whole numbers; 0 more than a pixel outside, else the border's."""
    height, width = image.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = math.floor(y), math.floor(x)
    value = 0.0
    for row, down in ((top, 1 - (y - top)), (min(top + 1, height - 1), y - top)):
        for column, across in ((left, 1 - (x - left)), (min(left + 1, width - 1), x - left)):
            value += down * across * float(image[row, column])
    return value


def roi_align(maps, regions, size, scale, ratio, aligned):
    """Every sample of every bin of every channel of every region, one after the other."""
    height, width = size
    pooled = torch.zeros(len(regions), maps.shape[1], height, width, dtype=torch.float64)
    for r, region in enumerate(regions.tolist()):
        x0, y0, x1, y1 = (value * scale - (0.5 if aligned else 0.0) for value in region[1:])
        wide, tall = (x1 - x0, y1 - y0) if aligned else (max(x1 - x0, 1.0), max(y1 - y0, 1.0))
        bin_w, bin_h = wide / width, tall / height
        count_y, count_x = (ratio, ratio) if ratio > 0 else (math.ceil(bin_h), math.ceil(bin_w))
        for c in range(maps.shape[1]):
            image = maps[int(region[0]), c]
            for i in range(height):
                for j in range(width):
                    total = 0.0
                    for a in range(count_y):
                        for b in range(count_x):
                            y = y0 + i * bin_h + (a + 0.5) * bin_h / count_y
                            x = x0 + j * bin_w + (b + 0.5) * bin_w / count_x
                            total += _bilinear(image, y, x)
                    pooled[r, c, i, j] = total / max(count_y * count_x, 1)
    return pooled


def roi_pool(maps, regions, size, scale):
    """The largest pixel of every bin, 0 for a bin without one."""
    height, width = size
    pooled = torch.zeros(len(regions), maps.shape[1], height, width, dtype=torch.float64)
    for r, region in enumerate(regions.tolist()):
        # halves away from zero
        x0, y0, x1, y1 = (math.copysign(math.floor(abs(value * scale) + 0.5), value) for value in region[1:])
        wide, tall = max(x1 - x0 + 1, 1), max(y1 - y0 + 1, 1)
        for i in range(height):
            for j in range(width):
                rows = range(math.floor(i * tall / height) + int(y0), math.ceil((i + 1) * tall / height) + int(y0))
                columns = range(math.floor(j * wide / width) + int(x0), math.ceil((j + 1) * wide / width) + int(x0))
                rows = [y for y in rows if 0 <= y < maps.shape[2]]
                columns = [x for x in columns if 0 <= x < maps.shape[3]]
                for c in range(maps.shape[1]):
                    values = [float(maps[int(region[0]), c, y, x]) for y in rows for x in columns]
                    pooled[r, c, i, j] = max(values, default=0.0)
    return pooled


def paste_mask(mask, box, size):
    """One mask in a border of zeros, resized to its grown box pixel by pixel, and put into an image."""
    rows, columns = mask.shape
    padded = torch.zeros(rows + 2, columns + 2, dtype=torch.float64)
    padded[1:-1, 1:-1] = mask
    x0, y0, x1, y1 = box
    half_x, half_y = (x1 - x0) / 2 * (columns + 2) / columns, (y1 - y0) / 2 * (rows + 2) / rows
    left, right = int((x0 + x1) / 2 - half_x), int((x0 + x1) / 2 + half_x)
    top, bottom = int((y0 + y1) / 2 - half_y), int((y0 + y1) / 2 + half_y)
    wide, tall = max(right - left + 1, 1), max(bottom - top + 1, 1)
    image = torch.zeros(size, dtype=torch.float64)
    for y in range(tall):
        for x in range(wide):
            if 0 <= top + y < size[0] and 0 <= left + x < size[1]:
                at_y = min(max((y + 0.5) * (rows + 2) / tall - 0.5, 0), rows + 1)
                at_x = min(max((x + 0.5) * (columns + 2) / wide - 0.5, 0), columns + 1)
                image[top + y, left + x] = _bilinear(padded, at_y, at_x)
    return image


def assign(boxes, objects, positive, negative, nearest):
    """The number of the object of each box, -1 background, -2 ignored, from one overlap at a time."""
    overlaps = [[box_overlap(box.tolist(), thing.tolist())[0] for thing in objects] for box in boxes]
    assigned = []
    for row in overlaps:
        best = max(row, default=0.0)
        own = row.index(best) if row else -1
        is_nearest = nearest and any(
            value > 0 and value == max(other[k] for other in overlaps) for k, value in enumerate(row)
        )
        assigned.append(own if row and (best >= positive or is_nearest) else -1 if best < negative else -2)
    return assigned


def average_precision(images, threshold, recalls):
    """AP of one class at one threshold by PASCAL VOC's rule, with nothing but loops.

    images: (detections [(score, box)], truths [(box, difficult)]) each. recalls: 11, or None for the area.
    """

    def iou(a, b):
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    everything = [(score, box, image) for image, (found, _) in enumerate(images) for score, box in found]
    objects = sum(not difficult for _, truths in images for _, difficult in truths)
    taken, curve, tp, fp = set(), [], 0, 0
    for _, box, image in sorted(everything, key=lambda one: -one[0]):
        best, which = 0.0, None
        for number, (truth, _) in enumerate(images[image][1]):
            if iou(box, truth) > best:
                best, which = iou(box, truth), number
        if which is not None and best >= threshold:
            if images[image][1][which][1]:
                continue
            if (image, which) not in taken:
                taken.add((image, which))
                tp += 1
            else:
                fp += 1
        else:
            fp += 1
        curve.append((tp, tp / objects, tp / (tp + fp)))
    if recalls is not None:
        at = [k / (recalls - 1) for k in range(recalls)]
        return sum(max([p for _, r, p in curve if r >= level], default=0.0) for level in at) / recalls
    area = 0.0
    for number in range(1, tp + 1):
        area += max(p for t, _, p in curve if t >= number) / objects
    return area


def panoptic_matches(found, found_labels, true, true_labels, crowd):
    """Matches (class, IoU), classes missed and classes wrong of one image, pixel by pixel; 0 is no segment."""

    def pixels(grid, number):
        return {(i, j) for i, row in enumerate(grid) for j, value in enumerate(row) if value == number}

    void = pixels(true, 0)
    matched, missed, wrong, used = [], [], [], set()
    for t, label in enumerate(true_labels, start=1):
        segment = pixels(true, t)
        if not segment or crowd[t - 1]:
            continue
        for f, found_label in enumerate(found_labels, start=1):
            other = pixels(found, f)
            union = (segment | other) - (other & void)
            if found_label == label and union and len(segment & other) / len(union) > 0.5:
                matched.append((label, len(segment & other) / len(union)))
                used.add(f)
                break
        else:
            missed.append(label)
    for f, label in enumerate(found_labels, start=1):
        other = pixels(found, f)
        if not other or f in used:
            continue
        crowds = [pixels(true, t) for t, own in enumerate(true_labels, start=1) if own == label and crowd[t - 1]]
        if len(other & set().union(void, *crowds)) <= len(other) / 2:
            wrong.append(label)
    return matched, missed, wrong


def graph_segments(image, scale, smallest):
    """Felzenszwalb and Huttenlocher by the definition: Int(C) is the heaviest edge of C's minimum spanning tree."""
    channels, height, width = image.shape
    edges = []
    for number, (dy, dx) in enumerate(((0, 1), (1, 0), (1, 1), (1, -1))):
        for y in range(height):
            for x in range(width):
                if 0 <= y + dy < height and 0 <= x + dx < width:
                    difference = math.sqrt(
                        sum(
                            (255 * float(image[c, y, x]) - 255 * float(image[c, y + dy, x + dx])) ** 2
                            for c in range(channels)
                        )
                    )
                    edges.append((difference, number, len(edges), (y, x), (y + dy, x + dx)))
    edges.sort(key=lambda edge: (edge[0], edge[2]))
    of = {(y, x): {(y, x)} for y in range(height) for x in range(width)}

    def heaviest(component):
        inside, total = {pixel: {pixel} for pixel in component}, 0.0
        for weight, _, _, a, b in edges:
            if a in component and b in component and inside[a] is not inside[b]:
                total = weight
                joined = inside[a] | inside[b]
                for pixel in joined:
                    inside[pixel] = joined
        return total

    def join(a, b):
        joined = of[a] | of[b]
        for pixel in joined:
            of[pixel] = joined

    for weight, _, _, a, b in edges:
        if of[a] is not of[b] and weight <= min(heaviest(c) + scale / len(c) for c in (of[a], of[b])):
            join(a, b)
    for _, _, _, a, b in edges:
        if of[a] is not of[b] and min(len(of[a]), len(of[b])) < smallest:
            join(a, b)
    numbers = {}
    return [[numbers.setdefault(id(of[y, x]), len(numbers)) for x in range(width)] for y in range(height)]


def edge_box_scores(contours, boxes, kappa):
    """Equations 2 to 4 of edge boxes, with all paths between groups tried one edge at a time."""
    strength, group, weights, affinity = contours
    height, width = group.shape
    scores = []
    for x0, y0, x1, y1 in boxes:
        pixels = {number: [] for number in range(len(weights))}
        for y in range(height):
            for x in range(width):
                if group[y, x] >= 0:
                    pixels[group[y, x]].append(x0 <= x < x1 and y0 <= y < y1)
        crossing = [number for number, inside in pixels.items() if any(inside) and not all(inside)]
        total = 0.0
        for number, inside in pixels.items():
            if all(inside):
                total += (1 - max([float(affinity[other, number]) for other in crossing], default=0.0)) * weights[
                    number
                ]
        quarter_x, quarter_y = (x1 - x0) / 4, (y1 - y0) / 4
        for y in range(height):
            for x in range(width):
                if round(x0 + quarter_x) <= x < round(x1 - quarter_x) and round(y0 + quarter_y) <= y < round(
                    y1 - quarter_y
                ):
                    total -= strength[y, x]
        scores.append(total / (2 * (x1 - x0 + y1 - y0) ** kappa))
    return scores
