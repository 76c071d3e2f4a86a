"""The analysis of checkpoints, by question.

memories        what does a matrix remember?     weights only
interventions   what causes it?                  ablation, patching, edges, weight patching
behaviour       what does it do?                 attention, scores of heads, losses by role
theory          what should it do?               gradients and steps in closed form
"""
