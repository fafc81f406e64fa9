"""From a trained model to answers: raw events in, products out; export for Triton.

from t4r_fast import serving

serving.Recommender(model, workflow).recommend(events)
serving.export(model, workflow, "models", name="shop")
"""

from t4r_fast.serving.graph import export_onnx, export_program
from t4r_fast.serving.recommender import Recommendations, Recommender
from t4r_fast.serving.repository import export

__all__ = ["Recommendations", "Recommender", "export", "export_onnx", "export_program"]
