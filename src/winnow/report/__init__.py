"""Shows what was found: tables, `front.json`, `report.html`, Weights & Biases. Each is made from the study at any time."""
