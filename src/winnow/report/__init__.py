"""Views of a finished or running study: terminal, `front.json`, `report.html`, W&B. Each can be rebuilt from the study."""
