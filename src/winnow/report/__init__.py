"""Builds the views of a study (terminal, `front.json`, `report.html`, W&B), each from the study alone at any time."""
