"""Training: data sets, augmentation, recipes and the loop. Needs the extra `train`."""
