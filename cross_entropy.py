"""Cross-entropy of a linear head without float32 logits of the whole batch.

The head is the largest single product of the model: 32,768 logits for each token. Compiled, the
float32 cast and the softmax fuse into its kernels and only 16-bit logits are stored. Eager, a chunk
of tokens at a time is enough, with the gradients made while its logits are there: measured on a
CPU against plain cross-entropy and F.linear_cross_entropy in LOG.md.
"""

import torch
import torch.nn.functional as F

from sampling import sample

IGNORE_INDEX = -100  # target of a position without a label
CHUNK = 256  # tokens whose logits exist at once; 32 MiB of float32


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, sample_targets: bool = False
) -> torch.Tensor:
    """Summed cross-entropy, in nats, of logits x @ weight.T against targets.

    x (N, C), weight (V, C), targets (N,) with IGNORE_INDEX where there is no label. With
    `sample_targets` each label is replaced by one drawn from softmax(logits), as the
    Gauss-Newton-Bartlett estimator needs (Sophia, 2305.14342, section 2.3).
    """
    if not torch.compiler.is_compiling():
        return ChunkedCrossEntropy.apply(x, weight, targets, sample_targets)
    logits = F.linear(x, weight)
    if sample_targets:
        targets = torch.where(targets == IGNORE_INDEX, targets, sample(logits.detach()))
    return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE_INDEX)


class ChunkedCrossEntropy(torch.autograd.Function):
    """d loss / d logits = softmax(logits) - onehot(target), made in the forward pass by chunks.

    Nothing is recomputed, and positions without a label cost nothing.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, sample_targets):
        labelled = (targets != IGNORE_INDEX).nonzero()[:, 0]
        needs_gradient = x.requires_grad
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.zeros_like(x) if needs_gradient else None
        dweight = torch.zeros_like(weight) if needs_gradient else None
        for chunk in labelled.split(CHUNK):
            x_chunk = x[chunk]
            logits = F.linear(x_chunk, weight).float()  # (chunk, V)
            target = (sample(logits) if sample_targets else targets[chunk])[:, None]
            largest, at = logits.max(dim=-1, keepdim=True)
            target_logit = logits.gather(1, target)
            probabilities = logits.softmax(dim=-1)
            # logsumexp = max - log p(max): exact, as p(max) is never small, unlike p(target)
            logsumexp = largest - probabilities.gather(1, at).log()
            loss += (logsumexp - target_logit).sum()
            if needs_gradient:
                dlogits = probabilities
                dlogits.scatter_add_(1, target, torch.full_like(largest, -1.0))
                dlogits = dlogits.to(x.dtype)
                dx[chunk] = F.linear(dlogits, weight.t()).to(dx.dtype)
                dweight += F.linear(dlogits.t(), x_chunk.t())
        ctx.save_for_backward(dx, dweight)
        return loss

    @staticmethod
    def backward(ctx, gradient):
        dx, dweight = ctx.saved_tensors
        return dx * gradient, dweight * gradient, None, None
