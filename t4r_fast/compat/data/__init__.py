"""Small data of a known shape, for trying out models and for tests."""

from t4r_fast.compat.data.testing import (
    music_streaming_testing_data,
    tabular_sequence_testing_data,
    tabular_testing_data,
)

__all__ = ["music_streaming_testing_data", "tabular_sequence_testing_data", "tabular_testing_data"]
