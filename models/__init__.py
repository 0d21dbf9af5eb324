"""The bundled pair of models, and (in `models.training`) how it was made."""
