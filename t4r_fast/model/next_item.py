"""Next-item prediction behind the body: loss, rank, best items, and scores that are formed only
when somebody looks at them.

A model's output carries its predictions, N x V numbers that training and evaluation never need:
the loss, the rank of the target and the best k come from the hidden states by fused ops. LazyLogits
holds the factors. Used as a tensor (by any torch function, operator or tensor attribute) it becomes
one; topk alone does without.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from t4r_fast.model.sessions import whole_blocks
from t4r_fast.ops._table import up_to_date
from t4r_fast.ops.item_topk import MAX_K, item_topk
from t4r_fast.ops.sampled_softmax_loss import sampled_softmax_loss
from t4r_fast.ops.target_rank import TargetRank, target_rank
from t4r_fast.ops.tied_softmax_loss import REDUCTIONS, tied_softmax_loss


def best_items(
    hidden: torch.Tensor,
    items: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    exclude: torch.Tensor | None = None,
    log_probabilities: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores, ids) of item_topk; with log_probabilities scores less the log-sum-exp of all items,
    excluded ones too, which costs a second pass over them. Nothing N x V is formed."""
    scores, ids = item_topk(hidden, items, k, bias=bias, temperature=temperature, exclude=exclude)
    if log_probabilities:
        any_item = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        with torch.no_grad():
            _, total = tied_softmax_loss(
                hidden,
                items,
                any_item,
                bias=bias,
                temperature=temperature,
                reduction="none",
                return_lse=True,
            )
        scores = scores - total.unsqueeze(1)
    return scores, ids


class NextItem(NamedTuple):
    """What scores the items: z = (hidden @ items.T + bias) / temperature, and the loss on them.

    items              (V, D)
    bias               (V,) or None
    temperature        > 0
    padding_idx        the id of padding; rows with this label have no target
    log_probabilities  scores are log-softmax'ed, as those of releases up to 23.02
    reduction          "mean" or "sum" over the rows that have a target
    label_smoothing    0 to 1
    sampler            how training draws negatives, see sampled_softmax_loss; None: all items
    negatives          how many
    sparse             whether gradients of sampled items are sparse tensors
    """

    items: torch.Tensor
    bias: torch.Tensor | None = None
    temperature: float = 1.0
    padding_idx: int = 0
    log_probabilities: bool = False
    reduction: str = "mean"
    label_smoothing: float = 0.0
    sampler: str | None = None
    negatives: int = 0
    sparse: bool = False

    def logits(self, hidden: torch.Tensor, labels: torch.Tensor) -> LazyLogits:
        """The scores of the rows of hidden (M, D), not formed."""
        return LazyLogits(
            hidden,
            self.items,
            labels,
            bias=self.bias,
            temperature=self.temperature,
            padding_idx=self.padding_idx,
            log_probabilities=self.log_probabilities,
        )

    def loss(
        self, logits: LazyLogits, training: bool, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross-entropy of the labels, (); in training on sampled items where there is a sampler.

        rows  int64, where labels stand, then -1; None: everywhere

        In evaluation without gradients the ranks come out of the same pass, and stay in `logits`.
        """
        if training and self.sampler is not None:
            return sampled_softmax_loss(
                logits.hidden,
                logits.items,
                logits.labels,
                num_negatives=self.negatives,
                sampler=self.sampler,
                bias=logits.bias,
                rows=rows,
                temperature=self.temperature,
                ignore_index=self.padding_idx,
                reduction=self.reduction,
                low=self.padding_idx + 1,
                sparse=self.sparse,
            )
        if not training and not self.label_smoothing and not torch.is_grad_enabled():
            return logits.target_rank_and_loss(self.reduction)[1]
        loss = tied_softmax_loss(
            logits.hidden,
            logits.items,
            logits.labels,
            bias=logits.bias,
            rows=rows,
            temperature=self.temperature,
            label_smoothing=self.label_smoothing,
            ignore_index=self.padding_idx,
            reduction=self.reduction,
        )
        assert isinstance(loss, torch.Tensor)  # no lse was asked for
        return loss

    def recommend(
        self, hidden: torch.Tensor, k: int | None, exclude: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """(scores, ids) of the best k items, or without k the scores of all, (M, V).

        exclude  (M, S) int64, ids that are left out, scored -inf; negative ones stand for none
        """
        if k is not None:
            return best_items(
                hidden,
                self.items,
                k,
                bias=self.bias,
                temperature=self.temperature,
                exclude=exclude,
                log_probabilities=self.log_probabilities,
            )
        # in whole blocks the bits of a row do not depend on the others
        rows = hidden.shape[0]  # not len(), which an exporter takes for a constant
        whole = torch.nn.functional.pad(hidden, (0, 0, 0, whole_blocks(rows) - rows))
        scores = (whole @ up_to_date(self.items).T)[:rows]
        if self.bias is not None:
            scores = scores + up_to_date(self.bias)
        scores = scores / self.temperature
        scores = scores.log_softmax(-1) if self.log_probabilities else scores
        if exclude is None:
            return scores
        # ids to leave alone go to a column of their own
        wide = torch.nn.functional.pad(scores, (0, 1))
        wide.scatter_(1, torch.where(exclude < 0, scores.shape[1], exclude), -torch.inf)
        return wide[:, :-1]


class LazyLogits:
    """hidden @ items.T + bias, over a temperature, for the rows that have a target.

    hidden   (M, D)   one row per place where a target may stand
    items    (V, D)
    labels   (M,)     int64; rows whose label is `padding_idx` have no target and do not show
    bias     (V,) or None
    log_probabilities  the scores are log-softmax'ed, as those of releases up to 23.02
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        items: torch.Tensor,
        labels: torch.Tensor,
        *,
        bias: torch.Tensor | None = None,
        temperature: float = 1.0,
        padding_idx: int = 0,
        log_probabilities: bool = False,
    ) -> None:
        self.hidden, self.items, self.labels, self.bias = hidden, items, labels, bias
        self.temperature = temperature
        self.padding_idx = padding_idx
        self.log_probabilities = log_probabilities
        self._dense: torch.Tensor | None = None
        self._rank: TargetRank | None = None

    def detach(self) -> LazyLogits:
        """The same scores, cut from the graph."""
        cut = LazyLogits(
            self.hidden.detach(),
            up_to_date(self.items).detach(),
            self.labels,
            bias=None if self.bias is None else up_to_date(self.bias).detach(),
            temperature=self.temperature,
            padding_idx=self.padding_idx,
            log_probabilities=self.log_probabilities,
        )
        cut._rank = self._rank
        return cut

    @property
    def dtype(self) -> torch.dtype:
        # known without forming the scores: mixed precision asks for it at every step
        return self.hidden.dtype

    def target_rank(self) -> TargetRank:
        """Rank of each row's label among all items; -1 where there is none. No N x V tensor.

        That of `target_rank_and_loss` if it was called.
        """
        if self._rank is not None:
            return self._rank
        with torch.no_grad():
            found = target_rank(
                self.hidden, self.items, self.labels, bias=self.bias, ignore_index=self.padding_idx
            )
        assert isinstance(found, TargetRank)  # nothing else was asked for
        return found

    def target_rank_and_loss(self, reduction: str = "mean") -> tuple[TargetRank, torch.Tensor]:
        """`target_rank`, which it keeps, and the cross-entropy with the labels, from one pass.

        reduction  "mean" over the rows that have a label, "sum", or "none"
        returns    (TargetRank, loss); loss () or, for "none", (M,), 0 where there is no label;
                   float32 (float64 for float64), not differentiable

        Raises ValueError on another reduction.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(
                f"target_rank_and_loss: reduction must be one of {', '.join(REDUCTIONS)};"
                f" got {reduction!r}"
            )
        found = target_rank(
            self.hidden,
            self.items,
            self.labels,
            bias=self.bias,
            temperature=self.temperature,
            ignore_index=self.padding_idx,
            return_lse=True,
        )
        assert not isinstance(found, TargetRank)  # score and lse were asked for
        self._rank, score, lse = found
        loss = lse - score
        if reduction != "none":
            loss = loss.sum()
        if reduction == "mean":
            loss = loss / (self.labels != self.padding_idx).sum()
        return self._rank, loss

    def best(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, ids), both (M, k), of the best k <= 128 items for each row, also for those that
        have no target; ties by lowest id. Without gradients and without the scores of all."""
        with torch.no_grad():
            return best_items(
                self.hidden,
                self.items,
                k,
                bias=self.bias,
                temperature=self.temperature,
                log_probabilities=self.log_probabilities,
            )

    def dense(self) -> torch.Tensor:
        """The (N, V) scores of the N rows that have a target, differentiable."""
        if self._dense is None:
            hidden = self.hidden[self.labels != self.padding_idx]
            scores = hidden @ up_to_date(self.items).T
            if self.bias is not None:
                scores = scores + up_to_date(self.bias)
            scores = scores / self.temperature
            self._dense = scores.log_softmax(-1) if self.log_probabilities else scores
        return self._dense

    # -- being a tensor --------------------------------------------------------------------------

    def topk(self, k: int, dim: int = -1, largest: bool = True, sorted: bool = True):
        """As a tensor's: (values, indices) of the N rows that have a target. The scores of all
        items are formed for k > 128, the smallest, another axis, or gradients alone."""
        plain = largest and dim in (-1, 1)
        differentiable = torch.is_grad_enabled() and self._has_gradient
        if not plain or differentiable or not 1 <= k <= min(MAX_K, len(self.items)):
            return torch.topk(self.dense(), k, dim, largest, sorted)
        rows = self.labels != self.padding_idx
        scores, ids = self.best(k)
        return torch.return_types.topk((scores[rows], ids[rows]))

    @property
    def _has_gradient(self) -> bool:
        return self.hidden.requires_grad or self.items.requires_grad

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.topk and isinstance(args[0], LazyLogits):
            return args[0].topk(*args[1:], **(kwargs or {}))
        return func(*_densified(args), **_densified(kwargs or {}))

    def __getattr__(self, name: str):
        if name.startswith("__") or "hidden" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dense(), name)

    def __len__(self) -> int:
        return len(self.dense())

    def __getitem__(self, index):
        return self.dense()[index]

    def __repr__(self) -> str:
        rows, items = self.hidden.shape[0], self.items.shape[0]
        return f"LazyLogits(at most {rows} rows, {items} items, not formed)"


def _densified(value):
    if isinstance(value, LazyLogits):
        return value.dense()
    if type(value) in (list, tuple):
        return type(value)(_densified(v) for v in value)
    if isinstance(value, dict):
        return {k: _densified(v) for k, v in value.items()}
    return value


def _operator(name: str):
    def apply(self: LazyLogits, *others):
        return getattr(self.dense(), name)(*_densified(others))

    return apply


_OPERATORS = (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "matmul", "rmatmul"),
    *("neg", "pow", "eq", "ne", "lt", "le", "gt", "ge"),
)
for _name in _OPERATORS:
    setattr(LazyLogits, f"__{_name}__", _operator(f"__{_name}__"))
LazyLogits.__hash__ = object.__hash__  # type: ignore[method-assign]  # gone with __eq__
