"""The reference's sampler of negatives, and what it leaves in checkpoints.

p[id] = log((c + 2) / (c + 1)) / log(max_id - min_id + 1)      c = id - min_id; 0 below min_id

The chance that n draws hold an id is 1 - (1 - p)^n. The reference computes 1 - (1 + p)^-n for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from t4r_fast.compat import warn_once
from t4r_fast.ops.log_uniform_sample import log_uniform_log_prob, log_uniform_sample

_TABLES = ("sampler.dist", "sampler.unique_sampling_dist")


def log_uniform_tables(
    max_id: int, min_id: int, tries: int, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(max_id,) float32: the probability of each id, and the reference's chance that `tries` draws
    hold it."""
    dist = log_uniform_distribution(max_id, min_id, device)
    return dist, unique_distribution(dist, tries)


def log_uniform_distribution(
    max_id: int, min_id: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """(max_id,) float32, the probability of each id."""
    log = torch.arange(1.0, max_id - min_id + 2.0, device=device).log_()
    return torch.cat([log.new_zeros(min_id), log.diff() / log[-1]])


def unique_distribution(dist: torch.Tensor, tries: int) -> torch.Tensor:
    """float32, what the reference takes for the chance that `tries` draws hold an id."""
    return -torch.expm1(-tries * torch.log1p(dist.double())).float()


class LogUniformSampler(nn.Module):
    """Negatives for items sorted by falling popularity.

    max_n_samples    how many, >= 1
    max_id, min_id   ids from min_id to max_id - 1 are drawn
    unique_sampling  all different
    n_samples_multiplier_before_unique  draws per negative, with unique_sampling
    keep_lowest      with unique_sampling: of the different ids among the draws the lowest stay, as
                     in the reference, so that rare items are never drawn, and probabilities are its
                     own, which are wrong; there may be fewer than max_n_samples. None: True, with a
                     warning. False: draws until there are max_n_samples, in the order of their
                     first draw

    sample(labels (N,) int64) -> (ids (n,) int64, probabilities of the labels (N,), of the ids (n,))
    Raises ValueError on arguments out of range and labels that are not (N,) int64.
    Replaces transformers4rec.torch.model.prediction_task.LogUniformSampler. NextItemPredictionTask
    draws inside t4r_fast.sampled_softmax_loss and needs none.
    """

    def __init__(
        self,
        max_n_samples: int,
        max_id: int,
        min_id: int = 0,
        unique_sampling: bool = True,
        n_samples_multiplier_before_unique: int = 2,
        keep_lowest: bool | None = None,
    ) -> None:
        super().__init__()
        if max_n_samples < 1 or not 0 <= min_id < max_id:
            raise ValueError(
                "LogUniformSampler: max_n_samples must be >= 1 and 0 <= min_id < max_id; got"
                f" {max_n_samples}, {min_id}, {max_id}"
            )
        if keep_lowest is None and unique_sampling:
            warn_once(
                "keep_lowest",
                "LogUniformSampler keeps the lowest ids of its draws, as Transformers4Rec's does,"
                " so that rare items are never drawn; give keep_lowest=False",
            )
        self.max_n_samples, self.max_id, self.min_id = max_n_samples, max_id, min_id
        self.unique_sampling = unique_sampling
        self.keep_lowest = keep_lowest is not False
        multiplier = n_samples_multiplier_before_unique if unique_sampling else 1
        self.n_sample = int(max_n_samples * multiplier)
        own = type(self).get_log_uniform_distr is not LogUniformSampler.get_log_uniform_distr
        if own and not self.keep_lowest:
            raise ValueError(
                "LogUniformSampler: keep_lowest=False draws log-uniform ids in closed form; a"
                " subclass with a get_log_uniform_distr of its own needs keep_lowest=True"
            )
        self._of_own_table = own
        dist = self.get_log_uniform_distr(max_id, min_id)
        self.register_buffer("dist", dist)
        unique = self.get_unique_sampling_distr(dist, self.n_sample)
        self.register_buffer("unique_sampling_dist", unique)

    def get_log_uniform_distr(self, max_id: int, min_id: int = 0) -> torch.Tensor:
        """(max_id,) float32, the probability of each id, from a table of float32 logarithms.

        A subclass may give others: ids are then drawn from them.
        """
        return log_uniform_distribution(max_id, min_id)

    def get_unique_sampling_distr(self, dist: torch.Tensor, n_sample: int) -> torch.Tensor:
        """The chance that n_sample draws hold each id, float32, in the reference's form.

        1 - (1 + dist) ** -n_sample; with keep_lowest=False the right one,
        1 - (1 - dist) ** n_sample
        """
        if self.keep_lowest:
            return unique_distribution(dist, n_sample)
        return -torch.expm1(n_sample * torch.log1p(-dist.double())).float()

    def sample(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Negatives for these labels, and probabilities; see the class."""
        if labels.dtype != torch.int64 or labels.dim() != 1 or not len(labels):
            raise ValueError(
                "LogUniformSampler: labels must be int64 (N,), N >= 1; got"
                f" {labels.dtype} {tuple(labels.shape)}"
            )
        span = {"high": self.max_id, "low": self.min_id}
        if self.unique_sampling and not self.keep_lowest:
            drawn = log_uniform_sample(
                self.max_n_samples, unique=True, device=labels.device, **span
            )
            of_labels = log_uniform_log_prob(labels, tries=drawn.tries, **span)
            return drawn.ids, of_labels.exp(), drawn.log_prob.exp()
        if self._of_own_table:
            ids = torch.multinomial(self.dist, self.n_sample, replacement=True)
        else:
            ids = log_uniform_sample(self.n_sample, device=labels.device, **span).ids
        if self.unique_sampling:
            ids = ids.unique()[: self.max_n_samples]
        chances = self.unique_sampling_dist if self.unique_sampling else self.dist
        return ids, chances[labels], chances[ids]

    def forward(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.sample(labels)


def keep_tables_in_checkpoints(scorer: nn.Module, negatives: int, min_id: int) -> None:
    """Let the state dict of an output layer with sampled softmax be the reference's, keys and all.

    The reference keeps two tables of the sampler in it. They are made when a state dict is, and
    passed over when one is loaded: the model itself holds none.
    """

    def add(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
        items = module.items
        tables = log_uniform_tables(len(items), min_id, 2 * negatives, items.device)
        state.update({prefix + name: table for name, table in zip(_TABLES, tables)})

    def pass_over(_: nn.Module, state: dict[str, Any], prefix: str, *__: object) -> None:
        for name in _TABLES:
            state.pop(prefix + name, None)

    scorer.register_state_dict_post_hook(add)
    scorer.register_load_state_dict_pre_hook(pass_over)
