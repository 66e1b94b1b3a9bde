"""Defines `LM`, a causal language model in memory, on disk, or both."""

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
    """A causal language model in memory, on disk, or both; a model on disk is loaded on first use.

    Attributes:
        path: the folder or hub id that it was loaded from or saved to; None for a model that exists only in memory.
        manifest: its origin, written next to the weights when it is saved.
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
        """Returns a copy of the configuration, from the folder or the hub if there is a path, else from the model in memory."""
        from winnow.model.load import load_config

        return load_config(self.path, self.loading) if self.path else copy.deepcopy(self.model.config)

    def sha256(self) -> str | None:
        """Returns the model's identity: the hash of its files, or the commit of a hub model; None if it is only in memory."""
        from winnow.model.load import identity

        return identity(self.path, self.loading) if self.path else None

    def set_default_dtype(self, dtype: str) -> None:
        """Makes the weights load in `dtype`, unless they are in memory already or `model.dtype` names a type."""
        if self._model is None and self.loading.dtype == "auto":
            self.loading = dataclasses.replace(self.loading, dtype=dtype)

    def release(self) -> None:
        """Frees the model in memory; the next access loads it from `path` again."""
        if self.path is not None:
            self._model = None

    def with_model(self, model: PreTrainedModel) -> LM:
        """Returns an LM with the same manifest and the weights of `model`, which are in memory only."""
        return LM(model=model, tokenizer=self.tokenizer, manifest=self.manifest, loading=self.loading, name=self.name)

    def with_files(self, folder: str | Path) -> FileLM:
        """Returns an LM with the same manifest whose weights are files in `folder`, in the form in which they are saved."""
        tokenizer, manifest = self.tokenizer, self.manifest
        return FileLM(folder, tokenizer=tokenizer, manifest=manifest, loading=self.loading, name=self.name)


class FileLM(LM):
    """An LM whose folder `path` holds the exact files that saving copies."""

    path: str
