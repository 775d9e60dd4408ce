# %% [markdown]
# # raysl from Python
#
# Cells of a notebook, as a script: Jupyter (with jupytext) and editors open it cell by cell, and
# `python docs/examples/notebook.py` runs it all. A test does.

# %% Pretrain: a YAML file, the name of a shipped configuration, or a mapping of settings.
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import raysl
from raysl.encoder.file import read_description
from raysl.evaluate.knn import knn_predictions

results = raysl.pretrain(
    {"extends": "quickstart", "name": "notebook"},
    [
        "train.epochs=4",
        "backbone.width=0.25",
        "evaluate.final=[knn]",
        "cluster.num_train_workers=0",  # without Ray, in this process
        "track.mlflow=false",
    ],
)
print(f"nearest neighbours: {results['knn_top1']:.1%}, in {results['run_dir']}")

# %% The encoder: an nn.Module in evaluation mode, from normalised images to features.
encoder = raysl.load_encoder(results["run_dir"])
description = read_description(results["run_dir"] + "/encoder.safetensors")

# %% Features of a few images.
digits = load_digits()
labels = torch.tensor(digits.target[:600])
images = torch.tensor(digits.images[:600], dtype=torch.float32)[:, None] / 16  # (N, 1, 8, 8)
images = F.interpolate(images, size=description["image_size_px"], mode="bilinear").expand(
    -1, 3, -1, -1
)
mean, std = (torch.tensor(description[name])[:, None, None] for name in ("mean", "std"))
with torch.no_grad():
    features = encoder((images - mean) / std)
print("features", tuple(features.shape))

# %% Nearest neighbours among them: the first 500 vote for the last 100.
predicted = knn_predictions(
    features[:500], labels[:500], features[500:], ks=[20], temperature=0.07
)[20]
top1 = float((predicted == labels[500:]).float().mean())
print(f"nearest neighbours of the last 100: {top1:.1%}")
