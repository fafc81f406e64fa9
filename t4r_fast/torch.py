"""The names of transformers4rec.torch on fused ops: `import t4r_fast.torch as tr`.

They live in t4r_fast.compat.torch; this import gives that module itself.
"""

import sys

from t4r_fast.compat import torch
from t4r_fast.compat.torch import *  # noqa: F403  # for tools that read and do not run

sys.modules[__name__] = torch
