"""verl imports this module by itself (entry-point group `verl.plugins`).

The engine imports all of verl's FSDP code, which fixes the platform that verl runs on, so it is
imported only if VERL_ENGINE_VENDOR asks for it. verl hides errors of its plugins: if this one were
not logged, verl's own engine would silently train without the alignment losses.
"""

import logging
import os

if os.environ.get("VERL_ENGINE_VENDOR") == "oisd":
    try:
        import oisd.integrations.verl  # noqa: F401
    except Exception as error:
        logging.getLogger(__name__).error(
            "VERL_ENGINE_VENDOR=oisd, but its engine cannot be imported: %s", error
        )
        raise
