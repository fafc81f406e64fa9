"""Fully connected layers with an activation behind every one of them, the last included."""

from __future__ import annotations

from torch import nn

from t4r_fast.compat.torch.block.base import BuildableBlock, SequentialBlock, Size


class _OverLastAxis(nn.BatchNorm1d):
    """Batch norm of the last axis: (B, L, D) counts every position as a sample."""

    def forward(self, inputs):
        return super().forward(inputs.reshape(-1, inputs.shape[-1])).view_as(inputs)


class DenseBlock(SequentialBlock):
    """Linear -> activation -> normalization -> dropout: a layer of MLPBlock.

    input_shape    size of the inputs, e.g. (-1, 20, 64)
    in_features    width of the inputs, its last entry
    out_features   width of the outputs
    activation     module class, or None for a linear map
    use_bias       bias in the linear layer
    dropout        probability in [0, 1), or None
    normalization  None or "batch_norm", over the last axis

    Replaces transformers4rec.torch.block.mlp.DenseBlock.
    """

    def __init__(
        self,
        input_shape: Size,
        in_features: int,
        out_features: int,
        activation: type[nn.Module] | None = nn.ReLU,
        use_bias: bool = True,
        dropout: float | None = None,
        normalization: str | None = None,
    ) -> None:
        _check_normalization("DenseBlock", normalization)
        parts: list[nn.Module] = [nn.Linear(in_features, out_features, bias=use_bias)]
        if activation is not None:
            parts.append(activation())
        if normalization == "batch_norm":
            parts.append(_OverLastAxis(out_features))
        if dropout:
            parts.append(nn.Dropout(dropout))
        super().__init__(*parts, output_size=(*input_shape[:-1], out_features))

    def forward_output_size(self, input_size: Size) -> tuple[int | None, ...]:
        return (*input_size[:-1], self[0].out_features)


class MLPBlock(BuildableBlock):
    """Linear -> activation -> normalization -> dropout, once per entry of `dimensions`.

    dimensions       int or list of output widths
    activation       module class, or None for a linear map
    use_bias         bias in the linear layers
    dropout          probability in [0, 1), or None
    normalization    None or "batch_norm"
    filter_features  names of the features that are joined and used, behind a block that gives a
                     dict of features. The reference takes the argument and does nothing with it

    Replaces transformers4rec.torch.MLPBlock.
    """

    def __init__(
        self,
        dimensions: int | list[int],
        activation: type[nn.Module] | None = nn.ReLU,
        use_bias: bool = True,
        dropout: float | None = None,
        normalization: str | None = None,
        filter_features: list[str] | None = None,
    ) -> None:
        self.dimensions = [dimensions] if isinstance(dimensions, int) else list(dimensions)
        if not self.dimensions or min(self.dimensions) < 1:
            raise ValueError(f"MLPBlock: dimensions must be positive widths; got {dimensions!r}")
        _check_normalization("MLPBlock", normalization)
        self.activation = activation
        self.use_bias = use_bias
        self.dropout = dropout
        self.normalization = normalization
        self.filter_features = filter_features

    def build(self, input_size: Size | dict[str, Size]) -> SequentialBlock:
        if isinstance(input_size, dict) != (self.filter_features is not None):
            raise ValueError(
                "MLPBlock: filter_features goes with a block in front that gives a dict of features"
                f" (one without aggregation); got filter_features={self.filter_features!r} behind"
                f" outputs of size {input_size}"
            )
        if self.filter_features is not None:
            from t4r_fast.compat.torch.tabular.base import FilterFeatures, TabularBlock

            chosen = TabularBlock(pre=FilterFeatures(self.filter_features), aggregation="concat")
            chosen.build(input_size)
            return SequentialBlock(chosen, *self._layers(chosen.output_size()))
        return SequentialBlock(*self._layers(input_size))

    def _layers(self, input_size: Size) -> list[DenseBlock]:
        layers = []
        for out in self.dimensions:
            layer = DenseBlock(
                input_size,
                int(input_size[-1]),
                out,
                self.activation,
                self.use_bias,
                self.dropout,
                self.normalization,
            )
            layers.append(layer)
            input_size = layer.output_size()
        return layers


def _check_normalization(block: str, normalization: str | None) -> None:
    if normalization not in (None, "batch_norm"):
        raise ValueError(
            f"{block}: normalization must be None or 'batch_norm'; got {normalization!r}"
        )
