"""Masks learned from weak labels: classes of whole pictures, or one point per object."""
