"""What verl loads by itself when it is imported (entry-point group `verl.plugins`).

The engine comes with all of verl's FSDP code, and settles which platform verl runs on, so it is
imported only where VERL_ENGINE_VENDOR asks for it. verl hides the errors of its plugins; without a
word its own engine would then train without the alignment losses.
"""

import logging
import os

if os.environ.get("VERL_ENGINE_VENDOR") == "oisd":
    try:
        import oisd.integrations.verl  # noqa: F401
    except Exception as error:
        logging.getLogger(__name__).error("VERL_ENGINE_VENDOR=oisd, but no OISD: %s", error)
        raise
