"""Tidy tables to figures, one function each, in one style that prints and that colour-blind readers can read.

    curves      loss and accuracy with reference predictors, recall of the memories, timelines of ablations and edges
    areas       what a matrix is made of, stacked over training
    heatmaps    memory tables, attention, patching and transplant maps, sweeps
    gallery     what `birthlens plot --kind` can draw of a run

Functions return a matplotlib Figure and touch no global state; `save` writes it as PNG, SVG or PDF.
"""

from birthlens.figures.areas import ledger_areas as ledger_areas
from birthlens.figures.curves import birth_panels as birth_panels
from birthlens.figures.curves import recall_curves as recall_curves
from birthlens.figures.curves import timeline as timeline
from birthlens.figures.curves import training_curves as training_curves
from birthlens.figures.heatmaps import attention_maps as attention_maps
from birthlens.figures.heatmaps import heatmap as heatmap
from birthlens.figures.heatmaps import memory_heatmaps as memory_heatmaps
from birthlens.figures.heatmaps import patching_map as patching_map
from birthlens.figures.heatmaps import sweep_heatmap as sweep_heatmap
from birthlens.figures.heatmaps import transplant_map as transplant_map
from birthlens.figures.style import label as label
from birthlens.figures.style import save as save
