"""The import names of Transformers4Rec, answered by t4r_fast.

import t4r_fast.dropin

From then on `transformers4rec` and `merlin_standard_lib` import the modules of t4r_fast, and so do
the few `nvtabular` names of the tutorial where NVTabular is not installed. Modules and classes are
the same objects under both names.

Real packages that are installed stay in use, with a warning that names the option to replace them:
`t4r_fast.dropin.install(replace=True)`, or T4R_FAST_DROPIN=replace in the environment of the first
import, for Transformers4Rec; `replace="all"`, or replace-all, for NVTabular as well.
"""

from __future__ import annotations

from t4r_fast.compat.dropin.finder import answered, install, uninstall

__all__ = ["answered", "install", "uninstall"]

install()
