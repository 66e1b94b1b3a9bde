"""Trains a model: one LightningModule for recovery, distillation and pretraining."""
