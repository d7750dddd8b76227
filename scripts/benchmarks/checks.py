"""What parts of benchmark_generation.py share: prompts, and whether tokens are the argmax."""

import torch


OURS = "griffin"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # of the largest logit


def random_ids(model: torch.nn.Module, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, model.config.vocab_size, (rows, length), generator=generator).to(model.device)


@torch.no_grad()
def shortfall(what: str, model: torch.nn.Module, sequences: torch.Tensor, prompt: int) -> float:
    """How far below the argmax a token after the prompt is at most, of the largest logit; SystemExit if far.

    In 16 bits two tokens may be as likely as can be told: then this, and not equality, is what can be asked for.
    """
    logits = model(sequences, use_cache=False).logits[:, prompt - 1 : -1].float()
    chosen = logits.gather(2, sequences[:, prompt:, None])[..., 0]
    error = ((logits.max(-1).values - chosen).max() / logits.abs().max()).item()
    if not error <= TOLERANCE[model.dtype]:
        raise SystemExit(f"{what}: a token is {error:.1e} below the argmax: nothing is timed")
    return error
