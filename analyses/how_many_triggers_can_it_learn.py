"""How many triggers can it learn? In-context accuracy and speed by the number K of triggers (paper section 6).

python analyses/how_many_triggers_can_it_learn.py --tier laptop
"""

from __future__ import annotations

from asking import ask

from birthlens.claims.statistics.behaviours import speed

if __name__ == "__main__":
    ask(__file__, __doc__, speed)
