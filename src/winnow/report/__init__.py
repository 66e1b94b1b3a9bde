"""Views of a study: terminal, `front.json`, `report.html`, W&B. Each can be rebuilt from the study at any time."""
