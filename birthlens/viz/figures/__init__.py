"""Figures of tidy tables, one function each, in one style that is readable in print and for colour-blind readers.

    curves      loss and accuracy with reference predictors, recall of the memories, timelines of ablations and edges
    areas       what a matrix is made of, stacked over training
    contrast    differences of forks from their controls
    heatmaps    memory tables, attention, patching and weight patching maps
    gallery     what `birthlens plot --kind` can draw of a run

Functions return a matplotlib Figure and touch no global state; `save` writes it as PNG, SVG or PDF.
"""

from birthlens.viz.figures.areas import ledger_areas as ledger_areas
from birthlens.viz.figures.contrast import difference_curves as difference_curves
from birthlens.viz.figures.curves import birth_panels as birth_panels
from birthlens.viz.figures.curves import recall_curves as recall_curves
from birthlens.viz.figures.curves import timeline as timeline
from birthlens.viz.figures.curves import training_curves as training_curves
from birthlens.viz.figures.heatmaps import attention_maps as attention_maps
from birthlens.viz.figures.heatmaps import heatmap as heatmap
from birthlens.viz.figures.heatmaps import memory_heatmaps as memory_heatmaps
from birthlens.viz.figures.heatmaps import patching_map as patching_map
from birthlens.viz.figures.heatmaps import transplant_map as transplant_map
from birthlens.viz.figures.heatmaps import weight_patching_map as weight_patching_map
from birthlens.viz.figures.style import label as label
from birthlens.viz.figures.style import save as save
