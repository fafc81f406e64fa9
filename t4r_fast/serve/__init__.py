"""From a trained model to answers: raw events in, products out; export for Triton.

from t4r_fast import serve

serve.Recommender(model, workflow).recommend(events)
serve.export(model, workflow, "models", name="shop")
"""

from t4r_fast.serve.graph import export_onnx, export_program
from t4r_fast.serve.recommender import Recommendations, Recommender
from t4r_fast.serve.repository import export

__all__ = ["Recommendations", "Recommender", "export", "export_onnx", "export_program"]
