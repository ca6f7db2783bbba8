"""Launch every kernel once, forward and backward, at small odd sizes: what compute-sanitizer watches."""

import torch
from ops import problems

from fastbert.backends import select


def main() -> None:
    with torch.device("cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            made = [make(dtype=dtype) for make in problems.MAKERS.values()]
            made.append(problems.attention([140, 3, 0, 70], heads=2, size=40, dtype=dtype, p=0.1))
            made.append(problems.layer_norm((5, 1023), dtype))
            made.append(problems.bias_dropout_residual_layer_norm((5, 8200), dtype))
            made.append(problems.embedding_layer_norm(200, 100, dtype))
            for problem in made:
                size = 40 if problem.op == "attention" else None
                request = select.Request("cuda", dtype, problem.dropout_p, size)
                for row in select.table(problem.op).explain(request):
                    if not row.reasons and row.implementation not in ("reference", "torch", "composed"):
                        run(problem, row.implementation)
    torch.cuda.synchronize()
    print("every kernel has run")


def padded(x: torch.Tensor) -> torch.Tensor:
    """``x`` in memory of a multiple of 16 bytes.

    ptxas reads four aligned numbers at once where three of them are wanted. That can't fault, since the first of them
    is there; in memory that ends with the third, memcheck says that it does.
    """
    count = -(-x.nbytes // 16) * 16 // x.element_size()
    return x.new_zeros(count)[: x.numel()].view(x.shape).copy_(x)


def run(problem: problems.Problem, impl: str) -> None:
    leaves = {name: padded(x.detach()).requires_grad_() for name, x in problem.tensors.items()}
    output = problem.actual(**leaves, impl=impl)
    torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output) if problem.dy is None else problem.dy)


if __name__ == "__main__":
    main()
