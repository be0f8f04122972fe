"""Preference pairs from scorers: pictures of a model ranked by reward models, and existing pairs scored or labelled again."""
