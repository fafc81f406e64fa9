"""The ops alone, in a model of your own: a causal Transformer over sessions (SASRec's shape).

    python examples/ops_in_your_model.py

A catalogue of 20,000 items in which every item has one likely successor. Neither the loss nor the
evaluation ever holds the sessions x items scores. About half a minute on a laptop's CPU.
"""

from __future__ import annotations

import torch
from torch import nn

import t4r_fast

ITEMS, WIDTH, LENGTH, SESSIONS = 20_000, 64, 10, 256


def sessions(n: int, generator: torch.Generator) -> torch.Tensor:
    """(n, LENGTH) ids: mostly a fixed walk over the first 500 items, sometimes a jump."""
    ids = torch.randint(1, 501, (n, LENGTH), generator=generator)
    jump = torch.rand(n, LENGTH, generator=generator) < 0.2
    for i in range(1, LENGTH):
        follow = ids[:, i - 1] * 7 % 500 + 1
        ids[:, i] = torch.where(jump[:, i], ids[:, i], follow)
    return ids


class NextItem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, WIDTH)
        nn.init.normal_(self.items.weight, std=0.05)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1)
        self.future = nn.Transformer.generate_square_subsequent_mask(LENGTH - 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = t4r_fast.sequence_embedding([ids], [self.items.weight])
        return self.body(x, mask=self.future, is_causal=True)


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = NextItem()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    for step in range(60):
        ids = sessions(SESSIONS, generator)
        hidden = model(ids[:, :-1]).flatten(0, 1)
        loss = t4r_fast.tied_softmax_loss(hidden, model.items.weight, ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")

    ids = sessions(1000, generator)
    with torch.no_grad():
        last = model(ids[:, :-1])[:, -1]
        rank = t4r_fast.target_rank(last, model.items.weight, ids[:, -1])
        metrics = t4r_fast.ranking_metrics(rank, [10])
        scores, best = t4r_fast.item_topk(last[:1], model.items.weight, 3, padding_idx=0)
    print(f"recall@10 {metrics.recall.mean():.3f}  ndcg@10 {metrics.ndcg.mean():.3f}")
    print(f"after {ids[0, -2]}: {best[0].tolist()} with scores {scores[0].tolist()}")


if __name__ == "__main__":
    main()
