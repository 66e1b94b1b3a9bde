"""A causal language model in memory, on disk, or both."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.model.loading import Loading

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class LM:
    """A causal language model in memory, on disk, or both; either is made from the other on first use.

    Attributes:
        path: the folder or hub id it was loaded from or saved to; None for a model that only exists in memory.
        manifest: where it comes from; written beside the weights when it is saved.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        manifest: Mapping[str, Any] | None = None,
        loading: Loading | None = None,
        name: str = "",
    ) -> None:
        if path is None and model is None:
            raise ValueError("an LM needs a path or a model")
        self.path = str(path) if path is not None else None
        self.manifest: dict[str, Any] = dict(manifest or {})
        self.loading = loading or Loading()
        self.name = name or (Path(self.path).name if self.path else "model")
        self.final = False  # True: `path` holds the very files to save
        self._model = model
        self._tokenizer = tokenizer

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            from winnow.model.load import load_model

            assert self.path is not None
            self._model = load_model(self.path, self.loading)
        return self._model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            from winnow.model.load import load_tokenizer

            assert self.path is not None
            self._tokenizer = load_tokenizer(self.path, self.loading)
        return self._tokenizer

    def config(self) -> PretrainedConfig:
        """The configuration, the caller's own to change: of the model in memory, else from its folder or the hub."""
        from winnow.model.load import load_config

        return load_config(self.path, self.loading) if self.path else copy.deepcopy(self.model.config)

    def sha256(self) -> str | None:
        """What the model is known by: of all its files, as they are now; a hub model's commit; None for one in memory only."""
        from winnow.model.load import identity

        return identity(self.path, self.loading) if self.path else None

    def compute_in(self, dtype: str) -> None:
        """Lets the weights come into memory in `dtype`, unless they are there already or `model.dtype` names a type."""
        if self._model is None and self.loading.dtype == "auto":
            self.loading = dataclasses.replace(self.loading, dtype=dtype)

    def release(self) -> None:
        """Lets go of the model in memory; it is read from `path` again when it is next asked for."""
        if self.path is not None:
            self._model = None

    def changed(self, model: PreTrainedModel) -> LM:
        """The same lineage with other weights in memory, not on disk yet."""
        return LM(model=model, tokenizer=self.tokenizer, manifest=self.manifest, loading=self.loading, name=self.name)

    def stored(self, folder: str | Path) -> LM:
        """The same lineage with its weights as files in `folder`, in the form in which they will be saved."""
        tokenizer, manifest = self.tokenizer, self.manifest
        lm = LM(folder, tokenizer=tokenizer, manifest=manifest, loading=self.loading, name=self.name)
        lm.final = True
        return lm
