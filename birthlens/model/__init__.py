"""The transformer: its weights, its forward pass, and the same model as a HookedTransformer."""
