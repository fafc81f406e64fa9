"""The import names of Transformers4Rec, answered by t4r_fast.

import t4r_fast.dropin

From then on `transformers4rec` and `merlin_standard_lib` import the modules of t4r_fast, and so do
the few `nvtabular` names of the tutorial where NVTabular is not installed. Modules and classes are
the same objects under both names.

Where the real Transformers4Rec is installed it stays in use, with a warning, unless one of these
asks for t4r_fast: `t4r_fast.dropin.install(replace=True)`, or T4R_FAST_DROPIN=replace in the
environment of the first import. An installed NVTabular always stays.
"""

from __future__ import annotations

from t4r_fast.dropin.finder import answered, install, uninstall

__all__ = ["answered", "install", "uninstall"]

install()
