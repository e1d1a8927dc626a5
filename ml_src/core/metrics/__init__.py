"""How good a prediction is. Next to read: `segmentation.py`, where one confusion matrix gives every score."""
