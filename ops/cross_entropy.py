"""Cross-entropy of a linear head without float32 logits of the whole batch.

The head is the largest single product of the model: 32,768 logits for each token. In 16 bits and
compiled, the float32 cast and the softmax fuse into its kernels and only 16-bit logits are stored.
Otherwise the tokens are processed in chunks, and the gradients are computed in the forward pass
while a chunk's logits exist: measured on a CPU against plain cross-entropy and
F.linear_cross_entropy in LOG.md.
"""

import torch
import torch.nn.functional as F

from ops.sampling import draw, sample

IGNORE_INDEX = -100  # target of a position without a label
MIN_CHUNK, MAX_CHUNK = 128, 512  # tokens whose logits exist at once; 64 MiB of float32 at most


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, sample_targets: bool = False
) -> torch.Tensor:
    """Summed cross-entropy, in nats, of logits x @ weight.T against targets.

    x (N, C), weight (V, C), targets (N,) with IGNORE_INDEX where there is no label. With
    `sample_targets` each label is replaced by one drawn from softmax(logits), as the
    Gauss-Newton-Bartlett estimator needs (Sophia, 2305.14342, section 2.3).
    """
    if not (torch.compiler.is_compiling() and torch.is_autocast_enabled(x.device.type)):
        return chunked_cross_entropy(x, weight, targets, sample_targets)
    logits = F.linear(x, weight)
    if sample_targets:
        targets = torch.where(targets == IGNORE_INDEX, targets, sample(logits.detach()))
    return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE_INDEX)


class ChunkedCrossEntropy(torch.autograd.Function):
    """d loss / d logits = softmax(logits) - onehot(target), computed in the forward pass by chunks.

    Nothing is recomputed, and positions without a label cost nothing. A chunk has as many tokens as
    the model is wide, up to MAX_CHUNK: each one reads and writes the whole gradient of the weight.
    All chunks share two buffers: on a CPU, page faults in new memory of this size cost more than
    the softmax that fills it.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, sample_targets):
        label_rows = (targets != IGNORE_INDEX).nonzero()[:, 0]
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype  # of the products
        if dtype == torch.float16:  # the gradients, not scaled yet, would leave its range
            dtype = torch.float32
        head = weight.to(dtype)
        chunks = label_rows.split(min(max(MIN_CHUNK, x.shape[1]), MAX_CHUNK))
        shape = (len(chunks[0]), weight.shape[0])  # the first chunk is the largest
        buffers = [torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2)]
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.zeros_like(x) if x.requires_grad else None
        dweight = torch.zeros_like(weight) if x.requires_grad else None
        with torch.autocast(device, enabled=False):  # the types are as chosen above
            for chunk in chunks:
                x_chunk = x[chunk].to(dtype)
                logits, probabilities = (buffer[: len(chunk)] for buffer in buffers)  # (chunk, V)
                if dtype == torch.float32:
                    torch.mm(x_chunk, head.t(), out=logits)
                else:
                    logits.copy_(x_chunk @ head.t())
                torch.softmax(logits, dim=-1, out=probabilities)
                target = (draw(probabilities) if sample_targets else targets[chunk])[:, None]
                # logsumexp = max - log p(max): exact, as p(max) is never small, unlike p(target)
                maxima = logits.amax(dim=-1, keepdim=True)
                logsumexp = maxima - probabilities.amax(dim=-1, keepdim=True).log()
                loss += (logsumexp - logits.gather(1, target)).sum()
                if x.requires_grad:
                    probabilities.scatter_add_(1, target, torch.full_like(maxima, -1.0))
                    dlogits = probabilities.to(dtype)
                    dx[chunk] = (dlogits @ head).to(x.dtype)
                    if dtype == weight.dtype:  # in place: no temporary of its size
                        dweight.addmm_(dlogits.t(), x_chunk)
                    else:
                        dweight += dlogits.t() @ x_chunk
        ctx.gradients = dx, dweight
        return loss

    @staticmethod
    def backward(ctx, gradient):
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy is differentiated only once: call it again")
        (dx, dweight), ctx.gradients = ctx.gradients, None
        return dx.mul_(gradient), dweight.mul_(gradient), None, None  # in place: no new memory


@torch.compiler.disable  # the number of labels decides its loop
def chunked_cross_entropy(x, weight, targets, sample_targets):
    return ChunkedCrossEntropy.apply(x, weight, targets, sample_targets)
