"""An exported model under the field's evaluators: lmms-eval by its entry point, VLMEvalKit by a class and a wrapper.

Neither is a requirement: `lmms` and `vlmevalkit` import nothing of them until they are there.
"""

from .asking import Asker

__all__ = ["Asker"]
