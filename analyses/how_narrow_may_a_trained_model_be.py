"""How narrow may a trained model be? Accuracy and speed by embedding dimension, at one learning rate.

python analyses/how_narrow_may_a_trained_model_be.py --tier laptop
"""

from __future__ import annotations

from asking import ask

from birthlens.claims.statistics.behaviours import speed

if __name__ == "__main__":
    ask(__file__, __doc__, speed)
