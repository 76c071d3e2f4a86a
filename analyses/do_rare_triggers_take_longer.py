"""Do rare triggers take longer? Fixed triggers of decreasing frequency, and random ones, in steps and in targets seen.

python analyses/do_rare_triggers_take_longer.py --tier laptop
"""

from __future__ import annotations

from asking import ask

from birthlens.claims.statistics.behaviours import speed

if __name__ == "__main__":
    ask(__file__, __doc__, speed)
